import { useSignal } from "@preact/signals";
import { put } from "../adapters";
import { call } from "../api/connect";
import { told } from "../api/http";
import type { Adapter } from "../api/messages";
import { Alert } from "../parts/alert";
import { Dialog } from "../parts/dialog";

/** An adapter to load. Closed before it is there, it is loaded all the same; the table tells. */
export function LoadForm({ onClose }: { onClose: () => void }) {
  const failure = useSignal("");
  const busy = useSignal(false);
  const form = useSignal({
    name: "",
    uri: "",
    parent: "",
    task: "",
    maxError: "",
    mismatch: false,
    pinned: false,
    registerOnly: false,
  });
  type Form = typeof form.value;
  const change = (some: Partial<Form>) => (form.value = { ...form.value, ...some });

  const load = async () => {
    const f = form.value;
    busy.value = true;
    failure.value = "";
    const request = {
      name: f.name.trim(),
      uri: f.uri.trim(),
      pinned: f.pinned,
      registerOnly: f.registerOnly,
      options: {
        allowBaseMismatch: f.mismatch,
        parent: f.parent.trim(),
        ...(f.task ? { taskId: Number(f.task) } : {}),
        ...(f.maxError ? { maxError: Number(f.maxError) } : {}),
      },
    };
    try {
      const answer = await call<{ adapter: Adapter }>("AdapterService/LoadAdapter", request);
      put(answer.adapter);
      onClose();
    } catch (error) {
      failure.value = told(error);
    }
    busy.value = false;
  };

  const text = (label: string, field: "name" | "uri" | "parent", hint: string, required = false) => (
    <label>
      {label}
      <input
        value={form.value[field]}
        required={required}
        placeholder={hint}
        autocomplete="off"
        spellcheck={false}
        onInput={(event) => change({ [field]: event.currentTarget.value })}
      />
    </label>
  );
  const tick = (label: string, field: "mismatch" | "pinned" | "registerOnly") => (
    <label class="tick">
      <input
        type="checkbox"
        checked={form.value[field]}
        onChange={(event) => change({ [field]: event.currentTarget.checked })}
      />
      {label}
    </label>
  );
  return (
    <Dialog
      title="Load an adapter"
      submit={busy.value ? "Loading…" : "Load"}
      busy={busy.value}
      onClose={onClose}
      onSubmit={() => void load()}
    >
      {text("Name", "name", "what requests will call it", true)}
      {text("Folder", "uri", "on the server, inside one of its adapter roots", true)}
      {tick("Pinned: never evict it", "pinned")}
      {tick("Register only: load it when a request asks for it", "registerOnly")}
      <details>
        <summary>Options</summary>
        {text("Parent", "parent", "the adapter that its files are relative to")}
        <label>
          Task
          <input
            type="number"
            min="0"
            step="1"
            value={form.value.task}
            onInput={(event) => change({ task: event.currentTarget.value })}
          />
        </label>
        <label>
          Largest relative error of a smaller form
          <input
            type="number"
            min="0"
            max="1"
            step="any"
            placeholder="0: exact forms only"
            value={form.value.maxError}
            onInput={(event) => change({ maxError: event.currentTarget.value })}
          />
        </label>
        {tick("Take it even if it was made for another base of the same shapes", "mismatch")}
      </details>
      <Alert text={failure.value} />
    </Dialog>
  );
}
