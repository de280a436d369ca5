import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef } from "preact/hooks";

interface Props {
  title: string;
  children: ComponentChildren;
  /** Escape, or the button that says so. */
  onClose: () => void;
  onSubmit: () => void;
  submit: string;
  busy?: boolean;
  wide?: boolean;
}

/** A modal form. The focus stays in it, and goes back to where it was. */
export function Dialog({ title, children, onClose, onSubmit, submit, busy, wide }: Props) {
  const element = useRef<HTMLDialogElement>(null);
  const id = useId();
  useEffect(() => {
    const before = document.activeElement;
    element.current!.showModal();
    // it is taken out of the page without being closed, so the browser does not do this
    return () => (before instanceof HTMLElement ? before.focus() : undefined);
  }, []);
  const cancel = (event: Event) => {
    event.preventDefault();
    onClose();
  };
  return (
    <dialog ref={element} aria-labelledby={id} onCancel={cancel} class={wide ? "wide" : ""}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (!busy) onSubmit();
        }}
      >
        <h2 id={id}>{title}</h2>
        {children}
        <p class="actions">
          <button type="button" onClick={onClose}>
            Cancel
          </button>
          <button type="submit" class="main" disabled={busy}>
            {submit}
          </button>
        </p>
      </form>
    </dialog>
  );
}
