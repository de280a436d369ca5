// What the playground asks, of whom, and what came of it.
import { signal } from "@preact/signals";
import type { Token } from "../api/completions";

/** An adapter, a route or the base (an empty name), with the factor on an adapter's change. */
export interface Part {
  name: string;
  strength: number;
}

export interface Answer {
  tokens: Token[];
  state: "running" | "finished" | "stopped" | "failed";
  error: string;
  finish: string;
  /** Seconds, by this page's clock. */
  firstToken: number | null;
  total: number | null;
  prompt: number | null;
  completion: number | null;
  arm: string;
}

/** Several parts are one composition. */
export interface Column {
  id: number;
  parts: Part[];
  answer: Answer | null;
}

export interface Settings {
  chat: boolean;
  prompt: string;
  maxTokens: number;
  temperature: number;
  seed: string;
  user: string;
  logprobs: boolean;
}

export const settings = signal<Settings>({
  chat: false,
  prompt: "",
  maxTokens: 64,
  temperature: 0,
  seed: "",
  user: "",
  logprobs: true,
});
export const columns = signal<Column[]>([]);
let last = 0;

export function addColumn(name = ""): void {
  columns.value = [...columns.value, { id: ++last, parts: [{ name, strength: 1 }], answer: null }];
}

export function removeColumn(id: number): void {
  columns.value = columns.value.filter((c) => c.id !== id);
}

export function changeColumn(id: number, change: (column: Column) => Column): void {
  columns.value = columns.value.map((c) => (c.id === id ? change(c) : c));
}

export function title(parts: Part[]): string {
  const each = parts.map((p) => (p.strength === 1 ? p.name || "(base)" : `${p.strength} × ${p.name}`));
  return each.join(" + ");
}

/** The fields of a request that say who is to answer. The base adds nothing to a composition. */
export function whom(parts: Part[], base: string): object {
  const [first, ...more] = parts.filter((part) => part.name);
  if (!first) return { model: base };
  if (more.length === 0 && first.strength === 1) return { model: first.name };
  return { adapters: [first, ...more].map(({ name, strength }) => ({ name, strength })) };
}
