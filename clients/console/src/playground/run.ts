// One prompt to all columns at once.
import { complete } from "../api/completions";
import { aborted, told } from "../api/http";
import { type Answer, changeColumn, type Column, columns, type Settings, whom } from "./model";

const NEW: Answer = {
  tokens: [],
  state: "running",
  error: "",
  finish: "",
  firstToken: null,
  total: null,
  prompt: null,
  completion: null,
  arm: "",
};

/** Ends when all of them have. base: its name. */
export async function run(settings: Settings, base: string, signal: AbortSignal): Promise<void> {
  await Promise.all(columns.value.map((column) => one(column, settings, base, signal)));
}

function fields(column: Column, s: Settings, base: string): object {
  const logprobs = s.chat ? { logprobs: true } : { logprobs: 0 };
  return {
    ...whom(column.parts, base),
    ...(s.chat ? { messages: [{ role: "user", content: s.prompt }] } : { prompt: s.prompt }),
    max_tokens: s.maxTokens,
    temperature: s.temperature,
    ...(s.seed === "" ? {} : { seed: Number(s.seed) }),
    ...(s.user === "" ? {} : { user: s.user }),
    ...(s.logprobs ? logprobs : {}),
  };
}

async function one(
  column: Column,
  settings: Settings,
  base: string,
  signal: AbortSignal,
): Promise<void> {
  const begin = performance.now();
  const passed = () => (performance.now() - begin) / 1000;
  let now: Answer = NEW;
  const show = (some: Partial<Answer>) => {
    now = { ...now, ...some };
    changeColumn(column.id, (c) => ({ ...c, answer: now }));
  };
  show({});
  try {
    for await (const piece of complete(settings.chat, fields(column, settings, base), signal)) {
      show({
        tokens: piece.tokens.length ? [...now.tokens, ...piece.tokens] : now.tokens,
        firstToken: now.firstToken ?? (piece.tokens.length ? passed() : null),
        finish: piece.finish || now.finish,
        prompt: piece.usage?.prompt_tokens ?? now.prompt,
        completion: piece.usage?.completion_tokens ?? now.completion,
        arm: piece.servedBy?.arm ?? now.arm,
      });
    }
    show({ state: "finished", total: passed() });
  } catch (error) {
    if (aborted(error)) show({ state: "stopped", total: passed() });
    else show({ state: "failed", error: told(error), total: passed() });
  }
}
