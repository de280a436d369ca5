import { useEffect, useRef } from "preact/hooks";
import { useSignal } from "@preact/signals";
import { aborted, told } from "../api/http";

/** Calls `work` at once and then every so many seconds while the page is seen, one call at a time.
 * -> why the last one failed, empty if it did not; and a way to call it now. */
export function usePoll(work: (signal: AbortSignal) => Promise<void>, seconds: number, key = "") {
  const error = useSignal("");
  const latest = useRef(work);
  const again = useRef<() => void>(() => undefined);
  latest.current = work;

  useEffect(() => {
    const end = new AbortController();
    let timer: ReturnType<typeof setTimeout> | undefined;
    let running = false;
    const turn = async () => {
      clearTimeout(timer);
      if (running || end.signal.aborted) return;
      running = true;
      try {
        if (!document.hidden) await latest.current(end.signal);
        error.value = "";
      } catch (caught) {
        if (!aborted(caught)) error.value = told(caught);
      }
      running = false;
      if (!end.signal.aborted) timer = setTimeout(turn, 1000 * seconds);
    };
    again.current = () => void turn();
    document.addEventListener("visibilitychange", turn);
    void turn();
    return () => {
      end.abort();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", turn);
    };
  }, [seconds, key]);

  return { error, now: () => again.current() };
}
