// The Connect protocol with JSON: https://connectrpc.com/docs/protocol
import { post, refusal, refused } from "./http";
import { ask } from "./key";

const END = 0b10;
const HEAD = 5;

export async function call<T>(method: string, request: object, signal?: AbortSignal): Promise<T> {
  const body = JSON.stringify(request);
  const response = await post(`deltaserve.v1.${method}`, "application/json", body, signal);
  if (!response.ok) throw await refusal(response);
  return (await response.json()) as T;
}

/** The messages of a server's stream, as they come. A stream tells at its end that it wants a key;
 * with one it is begun anew. */
export async function* stream<T>(
  method: string,
  request: object,
  signal: AbortSignal,
): AsyncGenerator<T> {
  for (;;) {
    const body = envelope(JSON.stringify(request));
    const type = "application/connect+json";
    const response = await post(`deltaserve.v1.${method}`, type, body, signal);
    if (!response.ok || !response.body) throw await refusal(response);
    let end: any = null;
    for await (const [flags, text] of envelopes(response.body)) {
      if (flags & END) end = JSON.parse(text);
      else yield JSON.parse(text) as T;
    }
    if (!end) throw new Error("the server's stream broke off");
    if (!end.error) return;
    const error = refused(end, response.status);
    if (error.code !== "unauthenticated" || !(await ask(error.message))) throw error;
  }
}

function envelope(text: string): Uint8Array<ArrayBuffer> {
  const data = new TextEncoder().encode(text);
  const framed = new Uint8Array(HEAD + data.length);
  new DataView(framed.buffer).setUint32(1, data.length);
  framed.set(data, HEAD);
  return framed;
}

async function* envelopes(body: ReadableStream<Uint8Array>): AsyncGenerator<[number, string]> {
  const reader = body.getReader();
  let kept = new Uint8Array(0);
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const joined = new Uint8Array(kept.length + value.length);
      joined.set(kept);
      joined.set(value, kept.length);
      kept = joined;
      for (;;) {
        if (kept.length < HEAD) break;
        const size = new DataView(kept.buffer, kept.byteOffset).getUint32(1);
        if (kept.length < HEAD + size) break;
        yield [kept[0]!, new TextDecoder().decode(kept.subarray(HEAD, HEAD + size))];
        kept = kept.subarray(HEAD + size);
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}
