// /v1/completions and /v1/chat/completions, streamed: server-sent events of JSON.
import { post, refusal, refused } from "./http";

export interface Token {
  text: string;
  /** Natural logarithm of its probability, where it was asked for. */
  logprob: number | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
}

/** What one event adds. */
export interface Piece {
  tokens: Token[];
  finish: string;
  usage: Usage | null;
  servedBy: ServedBy | null;
}

/** What answered, as far as it is told. */
export interface ServedBy {
  route?: string;
  arm?: string;
}

export async function* complete(
  chat: boolean,
  request: object,
  signal: AbortSignal,
): AsyncGenerator<Piece> {
  const path = chat ? "v1/chat/completions" : "v1/completions";
  const asked = { ...request, stream: true, stream_options: { include_usage: true } };
  const response = await post(path, "application/json", JSON.stringify(asked), signal);
  if (!response.ok || !response.body) throw await refusal(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw refused(chunk, response.status);
    yield piece(chunk);
  }
  throw new Error("the server's stream broke off");
}

function piece(chunk: any): Piece {
  const choice = chunk.choices?.[0];
  return {
    tokens: choice ? tokens(choice) : [],
    finish: choice?.finish_reason ?? "",
    usage: chunk.usage ?? null,
    servedBy: chunk.served_by ?? null,
  };
}

/** Logprobs come by token; the text of the whole piece is what counts. */
function tokens(choice: any): Token[] {
  const text: string = choice.text ?? choice.delta?.content ?? "";
  const found = choice.logprobs;
  const each: Token[] = found?.content
    ? found.content.map((t: any) => ({ text: t.token, logprob: t.logprob }))
    : (found?.tokens ?? []).map((t: string, i: number) => ({
        text: t,
        logprob: found.token_logprobs?.[i] ?? null,
      }));
  if (each.length && each.map((t) => t.text).join("") === text) return each;
  const mean = each.reduce((sum, t) => sum + (t.logprob ?? 0), 0) / each.length;
  return text ? [{ text, logprob: each.length ? mean : null }] : [];
}

async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.pipeThrough(new TextDecoderStream() as any).getReader();
  let kept = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (kept + value).split(/\r\n|\n/);
      kept = lines.pop()!;
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}
