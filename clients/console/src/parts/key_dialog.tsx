import { useRef } from "preact/hooks";
import { answer, asking } from "../api/key";
import { Dialog } from "./dialog";

/** Asks for the key when a call was refused without one. */
export function KeyDialog() {
  const field = useRef<HTMLInputElement>(null);
  if (asking.value === null) return null;
  return (
    <Dialog
      title="Key"
      submit="Use it"
      onClose={() => answer(null)}
      onSubmit={() => answer(field.current!.value)}
    >
      <p>{asking.value}</p>
      <label>
        API key
        <input ref={field} type="password" autocomplete="off" spellcheck={false} />
      </label>
      <p class="hint">It stays in this page's memory and is forgotten when the page is closed.</p>
    </Dialog>
  );
}
