import { useSignal } from "@preact/signals";
import { call } from "../api/connect";
import { told } from "../api/http";
import type { Route } from "../api/messages";
import { Alert } from "../parts/alert";
import { Dialog } from "../parts/dialog";

interface Props {
  route: object;
  onClose: () => void;
  onPut: (name: string) => void;
}

/** A route as JSON: `PutRoute` takes the whole of it. */
export function RouteEditor({ route, onClose, onPut }: Props) {
  const text = useSignal(JSON.stringify(route, null, 2));
  const failure = useSignal("");
  const busy = useSignal(false);

  const put = async () => {
    busy.value = true;
    failure.value = "";
    try {
      const request = { route: JSON.parse(text.value) as object };
      const answer = await call<{ route: Route }>("RouteService/PutRoute", request);
      onPut(answer.route.name);
    } catch (error) {
      failure.value = told(error);
    }
    busy.value = false;
  };
  return (
    <Dialog title="Route" submit="Put" busy={busy.value} wide onClose={onClose} onSubmit={() => void put()}>
      <label>
        Route, as in deltaserve/v1/route.proto
        <textarea
          class="code"
          rows={22}
          spellcheck={false}
          value={text.value}
          onInput={(event) => (text.value = event.currentTarget.value)}
        />
      </label>
      <p class="hint">
        Arms may set model or adapters (with strengths), weight, sampling, stop and shadow; a route
        may have coverage, layer, ramp or bandit, and guardrails. Putting it ends a rollback.
      </p>
      <Alert text={failure.value} />
    </Dialog>
  );
}
