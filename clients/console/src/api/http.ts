// Requests to the server that the page came from, with the key.
import { ask, headers } from "./key";

/** What the server refused. code: of gRPC, in lower case, or OpenAI's. field: of the request. */
export class Refused extends Error {
  constructor(
    message: string,
    readonly code: string,
    readonly field = "",
  ) {
    super(message);
  }
}

/** The page is /console/, wherever a proxy may have put that. */
export function at(path: string): URL {
  return new URL(`../${path}`, document.baseURI);
}

/** POST; asks for a key and tries again as long as the server wants one. */
export async function post(
  path: string,
  type: string,
  body: BodyInit,
  signal?: AbortSignal,
): Promise<Response> {
  for (;;) {
    const response = await fetch(at(path), {
      method: "POST",
      headers: { "Content-Type": type, ...headers() },
      body,
      signal: signal ?? null,
      credentials: "omit",
      redirect: "error",
    });
    if (response.status !== 401) return response;
    const error = await refusal(response);
    if (!(await ask(error.message))) throw error;
  }
}

/** The error that a response tells, in Connect's shape or in OpenAI's. */
export async function refusal(response: Response): Promise<Refused> {
  const text = await response.text();
  try {
    return refused(JSON.parse(text), response.status);
  } catch {
    return new Refused(text.slice(0, 200) || `HTTP ${response.status}`, `${response.status}`);
  }
}

interface Detail {
  type?: string;
  debug?: { fieldViolations?: { field?: string }[] };
}

/** body: of an error, parsed. */
export function refused(body: any, status: number): Refused {
  const error = body?.error ?? body ?? {};
  const details: Detail[] = Array.isArray(error.details) ? error.details : [];
  const bad = details.find((d) => d.debug?.fieldViolations)?.debug?.fieldViolations?.[0]?.field;
  const message = String(error.message ?? `HTTP ${status}`);
  return new Refused(message, String(error.code ?? status), bad ?? error.param ?? "");
}

/** What to show of anything that was thrown. */
export function told(error: unknown): string {
  if (error instanceof TypeError) return "the server cannot be reached";
  return error instanceof Error ? error.message : String(error);
}

export function aborted(error: unknown): boolean {
  return error instanceof DOMException && error.name === "AbortError";
}
