// The bearer key: in memory alone, gone with the page.
import { signal } from "@preact/signals";

/** Why a key is asked for; null while none is. */
export const asking = signal<string | null>(null);
export const hasKey = signal(false);

let key = "";
let waiting: PromiseWithResolvers<boolean> | null = null;

export function headers(): Record<string, string> {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Resolves when the dialog is closed; true if there is a new key. All who ask share one dialog. */
export function ask(why: string): Promise<boolean> {
  if (!waiting) {
    waiting = Promise.withResolvers<boolean>();
    asking.value = why;
  }
  return waiting.promise;
}

/** The dialog's answer: a key, empty to forget it, or null when it was dismissed. */
export function answer(given: string | null): void {
  if (given !== null) {
    key = given.trim();
    hasKey.value = key !== "";
  }
  asking.value = null;
  waiting?.resolve(given !== null);
  waiting = null;
}
