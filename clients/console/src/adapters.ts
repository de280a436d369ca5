// The adapters that the server knows, for every page that names them.
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { call, stream } from "./api/connect";
import { aborted, told } from "./api/http";
import type { Adapter, AdapterChanges } from "./api/messages";

export const adapters = signal<ReadonlyMap<string, Adapter>>(new Map());
export const watchError = signal("");

const RETRY_SECONDS = 2;
const PAGE = 1000;

/** Takes in what a call answered, before the watch tells it. */
export function put(...changed: Adapter[]): void {
  const next = new Map(adapters.value);
  for (const adapter of changed)
    if (adapter.state === "ADAPTER_STATE_UNLOADED") next.delete(adapter.name);
    else next.set(adapter.name, adapter);
  adapters.value = next;
}

/** What a watch does not tell, as how many requests use each. Nothing for very many adapters. */
export async function refresh(signal: AbortSignal): Promise<void> {
  if (adapters.value.size > PAGE) return;
  const request = { pageSize: PAGE };
  const found = await call<{ adapters: Adapter[] }>("AdapterService/ListAdapters", request, signal);
  const known = found.adapters.filter((a) => adapters.value.has(a.name));
  if (known.length) put(...known);
}

/** Those that there are now, up to a page of them: names to choose from. */
export async function list(signal: AbortSignal): Promise<void> {
  const request = { pageSize: PAGE };
  put(...(await call<{ adapters: Adapter[] }>("AdapterService/ListAdapters", request, signal)).adapters);
}

/** Follows every change of state while the page that calls this is shown. */
export function useAdapters(): void {
  useEffect(() => {
    const end = new AbortController();
    void watch(end.signal);
    return () => end.abort();
  }, []);
}

async function watch(end: AbortSignal): Promise<void> {
  while (!end.aborted) {
    try {
      for await (const told of stream<AdapterChanges>("AdapterService/WatchAdapters", {}, end)) {
        watchError.value = "";
        if (told.snapshot) adapters.value = new Map();
        put(...told.adapters);
      }
    } catch (error) {
      if (!aborted(error)) watchError.value = told(error);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000 * RETRY_SECONDS));
  }
}
