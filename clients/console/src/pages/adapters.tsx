import { useSignal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { adapters, put, refresh, useAdapters, watchError } from "../adapters";
import { call } from "../api/connect";
import { told } from "../api/http";
import type { Adapter } from "../api/messages";
import { bytes, count, num } from "../format";
import { Alert } from "../parts/alert";
import { Dialog } from "../parts/dialog";
import { usePoll } from "../parts/poll";
import { AdapterRow } from "./adapter_row";
import { LoadForm } from "./load_form";

const SHOWN = 300;
const COLUMNS: [string, (a: Adapter) => string | number, string?][] = [
  ["name", (a) => a.name],
  ["state", (a) => a.state],
  ["tier", (a) => a.tier],
  ["memory", (a) => -num(a.residentBytes), "n"],
  ["files", (a) => -num(a.sourceBytes), "n"],
  ["in flight", (a) => -a.inFlight, "n"],
  ["loads", (a) => -a.loads, "n"],
  ["format", (a) => a.format],
  ["digest", (a) => a.digest],
  ["pinned", (a) => (a.pinned ? 0 : 1)],
];

function matches(a: Adapter, words: string[]): boolean {
  const text = [a.name, a.digest, a.uri, a.format, a.state, a.tier, a.parent, ...a.primitives];
  const all = text.join("\n").toLowerCase();
  return words.every((word) => all.includes(word));
}

/** Every adapter, live; load, unload, pin. */
export function AdaptersPage() {
  useAdapters();
  const search = useSignal("");
  const order = useSignal(0);
  const loading = useSignal(false);
  const unloading = useSignal<string | null>(null);
  const failure = useSignal("");
  const { error } = usePoll(refresh, 3);

  const found = useMemo(() => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const key = COLUMNS[order.value]![1];
    const compare = (a: Adapter, b: Adapter) => {
      const [x, y] = [key(a), key(b)];
      return x < y ? -1 : x > y ? 1 : a.name < b.name ? -1 : 1;
    };
    return [...adapters.value.values()].filter((a) => matches(a, words)).sort(compare);
  }, [adapters.value, search.value, order.value]);

  const attempt = async (work: Promise<unknown>) => {
    failure.value = "";
    await work.catch((caught: unknown) => (failure.value = told(caught)));
  };
  const pin = (a: Adapter) =>
    attempt(
      call<{ adapter: Adapter }>("AdapterService/PinAdapter", {
        name: a.name,
        pinned: !a.pinned,
      }).then((answer) => put(answer.adapter)),
    );
  const unload = (name: string) => {
    unloading.value = null;
    return attempt(call("AdapterService/UnloadAdapter", { name }));
  };
  const held = found.reduce((sum, a) => sum + num(a.residentBytes), 0);

  return (
    <>
      <p class="bar">
        <label>
          Search
          <input
            type="search"
            value={search.value}
            placeholder="name, format, state, digest"
            onInput={(event) => (search.value = event.currentTarget.value)}
          />
        </label>
        <span class="hint" role="status">
          {count(found.length)} of {count(adapters.value.size)}, {bytes(held)} in memory
        </span>
        <button type="button" class="main" onClick={() => (loading.value = true)}>
          Load an adapter
        </button>
      </p>
      <Alert text={failure.value || watchError.value || error.value} />
      <div class="scroll" tabIndex={0} role="region" aria-label="Adapters">
        <table>
          <thead>
            <tr>
              {COLUMNS.map(([name, , kind], i) => (
                <th
                  key={name}
                  scope="col"
                  class={kind}
                  aria-sort={i === order.value ? "ascending" : undefined}
                >
                  <button type="button" class="sort" onClick={() => (order.value = i)}>
                    {name}
                  </button>
                </th>
              ))}
              <th scope="col">
                <span class="unseen">actions</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {found.slice(0, SHOWN).map((a) => (
              <AdapterRow
                key={a.name}
                adapter={a}
                onPin={() => void pin(a)}
                onUnload={() => (unloading.value = a.name)}
              />
            ))}
          </tbody>
        </table>
      </div>
      {found.length > SHOWN && (
        <p class="hint">{count(found.length - SHOWN)} more: search to see them.</p>
      )}
      {loading.value && <LoadForm onClose={() => (loading.value = false)} />}
      {unloading.value !== null && (
        <Dialog
          title="Unload"
          submit="Unload it"
          onClose={() => (unloading.value = null)}
          onSubmit={() => void unload(unloading.value!)}
        >
          <p>
            New requests for <b>{unloading.value}</b> are refused at once; running ones finish first.
          </p>
        </Dialog>
      )}
    </>
  );
}
