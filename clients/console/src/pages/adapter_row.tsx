import type { Adapter } from "../api/messages";
import { bytes, count, NONE, word } from "../format";

interface Props {
  adapter: Adapter;
  onPin: () => void;
  onUnload: () => void;
}

/** One adapter; what there is to say of it in words goes under its name. */
export function AdapterRow({ adapter: a, onPin, onUnload }: Props) {
  const state = word(a.state, "ADAPTER_STATE_");
  return (
    <tr data-adapter={a.name}>
      <th scope="row">
        {a.name}
        {a.patch && <span class="tag">patch</span>}
        {a.parent && <span class="hint"> on {a.parent}</span>}
        {a.error && <div class="bad">{a.error}</div>}
        <details>
          <summary class="hint">
            {a.notes.length ? `${a.uri}, ${a.notes.length} notes` : a.uri}
          </summary>
          <ul>
            {a.notes.map((note) => (
              <li key={note}>{note}</li>
            ))}
            <li>loaded in {a.loadDuration ?? NONE}</li>
          </ul>
        </details>
      </th>
      <td>
        <span class={`state ${state}`}>{state}</span>
      </td>
      <td>{word(a.tier, "ADAPTER_TIER_")}</td>
      <td class="n">{bytes(a.residentBytes)}</td>
      <td class="n">{bytes(a.sourceBytes)}</td>
      <td class="n">{count(a.inFlight)}</td>
      <td class="n">{count(a.loads)}</td>
      <td>
        {a.format}
        <br />
        <span class="hint">{a.primitives.join(", ")}</span>
      </td>
      <td>
        <code title={a.digest}>{a.digest.slice(0, 12)}</code>
      </td>
      <td>
        <button
          type="button"
          aria-pressed={a.pinned}
          aria-label={`pin ${a.name}`}
          disabled={a.patch}
          onClick={onPin}
        >
          {a.pinned ? "pinned" : "pin"}
        </button>
      </td>
      <td>
        <button type="button" aria-label={`unload ${a.name}`} disabled={a.patch} onClick={onUnload}>
          unload
        </button>
      </td>
    </tr>
  );
}
