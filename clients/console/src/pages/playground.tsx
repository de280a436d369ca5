import { useSignal } from "@preact/signals";
import { useEffect, useId, useRef } from "preact/hooks";
import { adapters, list } from "../adapters";
import { ColumnView } from "../playground/column";
import { addColumn, columns, settings, type Settings } from "../playground/model";
import { run } from "../playground/run";
import { Alert } from "../parts/alert";
import { loadRoutes, routes } from "../routes";
import { info, infoError } from "../server";

/** One prompt to several adapters, their answers side by side as they come. */
export function PlaygroundPage() {
  const names = useId();
  const running = useSignal(false);
  const stop = useRef<AbortController | null>(null);
  const s = settings.value;
  const change = (some: Partial<Settings>) => (settings.value = { ...settings.value, ...some });

  useEffect(() => {
    // names to choose from, no more; a watch would take one of the six connections that browsers open
    const end = new AbortController();
    Promise.all([list(end.signal), loadRoutes(end.signal)]).catch(() => undefined);
    if (columns.value.length === 0) {
      addColumn();
      addColumn();
    }
    return () => {
      end.abort();
      stop.current?.abort();
    };
  }, []);

  const base = info.value?.base;
  const ask = async () => {
    if (running.value || !base) return;
    running.value = true;
    stop.current = new AbortController();
    await run(settings.value, base.name, stop.current.signal);
    running.value = false;
  };
  const keys = (event: KeyboardEvent) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) void ask();
  };
  const number = (label: string, field: "maxTokens" | "temperature", step: string) => (
    <label>
      {label}
      <input
        type="number"
        min="0"
        step={step}
        value={s[field]}
        onInput={(event) => change({ [field]: event.currentTarget.valueAsNumber || 0 })}
      />
    </label>
  );
  const text = (label: string, field: "seed" | "user", hint: string) => (
    <label>
      {label}
      <input
        value={s[field]}
        placeholder={hint}
        autocomplete="off"
        onInput={(event) => change({ [field]: event.currentTarget.value })}
      />
    </label>
  );
  return (
    <>
      <Alert text={infoError.value} />
      <label class="prompt">
        Prompt
        <textarea
          rows={4}
          value={s.prompt}
          onInput={(event) => change({ prompt: event.currentTarget.value })}
          onKeyDown={keys}
        />
      </label>
      <div class="bar">
        {base?.chat && (
          <label class="tick">
            <input
              type="checkbox"
              checked={s.chat}
              onChange={(event) => change({ chat: event.currentTarget.checked })}
            />
            chat
          </label>
        )}
        {number("Most tokens", "maxTokens", "1")}
        {number("Temperature", "temperature", "0.1")}
        {text("Seed", "seed", "drawn")}
        {text("User", "user", "for routes")}
        <label class="tick">
          <input
            type="checkbox"
            checked={s.logprobs}
            onChange={(event) => change({ logprobs: event.currentTarget.checked })}
          />
          colour doubtful tokens
        </label>
        <button type="button" class="main" disabled={running.value || !base} onClick={() => void ask()}>
          Run
        </button>
        <button type="button" disabled={!running.value} onClick={() => stop.current?.abort()}>
          Stop
        </button>
        <button type="button" onClick={() => addColumn()}>
          Add a column
        </button>
      </div>
      <datalist id={names}>
        {[...routes.value.map((r) => r.name), ...adapters.value.keys()].map((name) => (
          <option key={name} value={name} />
        ))}
      </datalist>
      <div class="columns">
        {columns.value.map((column) => (
          <ColumnView
            key={column.id}
            column={column}
            names={names}
            alone={columns.value.length === 1}
          />
        ))}
      </div>
    </>
  );
}
