import { useSignal } from "@preact/signals";
import { call } from "../api/connect";
import { told } from "../api/http";
import type { Route } from "../api/messages";
import { word } from "../format";
import { Alert } from "../parts/alert";
import { Dialog } from "../parts/dialog";
import { usePoll } from "../parts/poll";
import { loadRoutes, routes } from "../routes";
import { ReportView } from "./report";
import { RouteEditor } from "./route_editor";
import { RouteView } from "./route_view";

const TEMPLATE: Partial<Route> = {
  name: "",
  arms: [
    { name: "base", model: "", weight: 0.5 } as Route["arms"][0],
    { name: "tuned", model: "", weight: 0.5 } as Route["arms"][0],
  ],
  control: "base",
};

/** What a client may set: the rest is the server's to say. */
function editable(route: Route): object {
  const { etag, state, reason, weights, startTime, updateTime, ...rest } = route;
  const arms = rest.arms.map(({ digests, ...arm }) => arm);
  return { ...rest, arms, etag };
}

/** Routes, their arms, and how the arms compare. */
export function RoutesPage() {
  const chosen = useSignal(decodeURIComponent(location.hash.split("/")[2] ?? ""));
  const editing = useSignal<object | null>(null);
  const asking = useSignal<"roll back" | "delete" | null>(null);
  const reason = useSignal("");
  const failure = useSignal("");
  const { error, now } = usePoll(loadRoutes, 5);
  const route = routes.value.find((r) => r.name === chosen.value) ?? routes.value[0];

  const act = async (work: Promise<unknown>) => {
    failure.value = "";
    asking.value = null;
    await work.catch((caught: unknown) => (failure.value = told(caught)));
    now();
  };
  const confirmed = () => {
    const { name } = route!;
    return asking.value === "delete"
      ? act(call("RouteService/DeleteRoute", { name }))
      : act(call("RouteService/RollBackRoute", { name, reason: reason.value }));
  };

  return (
    <>
      <Alert text={failure.value || error.value} />
      <div class="bar">
        <label>
          Route
          <select
            value={route?.name ?? ""}
            disabled={!route}
            onChange={(event) => (chosen.value = event.currentTarget.value)}
          >
            {routes.value.map((r) => (
              <option key={r.name} value={r.name}>
                {r.name} ({word(r.state, "ROUTE_STATE_")})
              </option>
            ))}
          </select>
        </label>
        <button type="button" onClick={() => (editing.value = TEMPLATE)}>
          New route
        </button>
        {route && (
          <>
            <button type="button" onClick={() => (editing.value = editable(route))}>
              Edit
            </button>
            <button
              type="button"
              class="danger"
              disabled={route.state === "ROUTE_STATE_ROLLED_BACK"}
              onClick={() => (asking.value = "roll back")}
            >
              Roll back
            </button>
            <button type="button" onClick={() => (asking.value = "delete")}>
              Delete
            </button>
          </>
        )}
      </div>
      {!route && !error.value && <p class="hint">No routes.</p>}
      {route && <RouteView route={route} />}
      {route && <ReportView key={route.name} route={route.name} control={route.control} />}
      {editing.value && (
        <RouteEditor
          route={editing.value}
          onClose={() => (editing.value = null)}
          onPut={(name) => {
            editing.value = null;
            chosen.value = name;
            now();
          }}
        />
      )}
      {asking.value && route && (
        <Dialog
          title={asking.value === "delete" ? "Delete a route" : "Roll back a route"}
          submit={asking.value === "delete" ? "Delete it" : "Roll it back"}
          onClose={() => (asking.value = null)}
          onSubmit={() => void confirmed()}
        >
          {asking.value === "delete" ? (
            <p>
              Requests for <b>{route.name}</b> are refused from now on. What was recorded stays.
            </p>
          ) : (
            <>
              <p>
                All requests for <b>{route.name}</b> get its control, <b>{route.control}</b>, at once.
              </p>
              <label>
                Why, for the log
                <input
                  value={reason.value}
                  onInput={(event) => (reason.value = event.currentTarget.value)}
                />
              </label>
            </>
          )}
        </Dialog>
      )}
    </>
  );
}
