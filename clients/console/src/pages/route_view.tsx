import type { Arm, Guardrail, Route } from "../api/messages";
import { decimal, moment, NONE, percent, seconds, word } from "../format";

function answers(arm: Arm): string {
  if (arm.adapters.length === 0) return arm.model || "(base)";
  return arm.adapters.map((a) => `${decimal(a.strength ?? 1)} × ${a.name}`).join(" + ");
}

function bound(g: Guardrail): string {
  const than = g.versusControl ? "more than the control's" : "";
  const limit = g.seconds ? `over ${seconds(g.seconds)}` : g.tokens ? `over ${g.tokens} tokens` : "";
  const words = [word(g.metric, "GUARDRAIL_METRIC_"), limit, "at most", percent(g.tolerated), than];
  return words.filter(Boolean).join(" ");
}

/** How users come to its arms. */
function manner(route: Route): string {
  const parts = [
    route.bandit ? "weights follow rewards" : route.ramp ? "weights follow a ramp" : "fixed weights",
    `${percent(route.coverage ?? 1)} of users take part`,
  ];
  if (route.layer) {
    const { name, start, end } = route.layer;
    parts.push(`layer ${name}, ${decimal(start)} to ${decimal(end)}`);
  }
  return parts.join(", ");
}

/** What a route is and does now. */
export function RouteView({ route }: { route: Route }) {
  const state = word(route.state, "ROUTE_STATE_");
  return (
    <section aria-labelledby="route">
      <h2 id="route">
        {route.name} <span class={`state ${state.replace(" ", "-")}`}>{state}</span>
      </h2>
      {route.reason && (
        <p class={state === "active" ? "hint" : "alert warn"} data-reason>
          {route.reason}
        </p>
      )}
      <p class="hint">
        {manner(route)}. Counted since {moment(route.startTime)}, changed {moment(route.updateTime)}.
      </p>
      <div class="scroll" tabIndex={0} role="region" aria-label="Arms">
        <table>
          <thead>
            <tr>
              <th scope="col">arm</th>
              <th scope="col">answers with</th>
              <th scope="col" class="n">weight now</th>
              <th scope="col" class="n">shadow</th>
              <th scope="col">digests</th>
              <th scope="col">overrides</th>
            </tr>
          </thead>
          <tbody>
            {route.arms.map((arm) => (
              <tr key={arm.name}>
                <th scope="row">
                  {arm.name}
                  {arm.name === route.control && <span class="tag">control</span>}
                </th>
                <td>{answers(arm)}</td>
                <td class="n">{percent(route.weights[arm.name])}</td>
                <td class="n">{arm.shadow ? percent(arm.shadow) : NONE}</td>
                <td>
                  {arm.digests.map((digest) => (
                    <code key={digest} title={digest}>
                      {digest.slice(0, 12)}{" "}
                    </code>
                  ))}
                </td>
                <td>
                  <code>{overrides(arm)}</code>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {route.guardrails.length > 0 && (
        <>
          <h3>Guardrails</h3>
          <ul>
            {route.guardrails.map((g, i) => (
              <li key={i}>{bound(g)}</li>
            ))}
          </ul>
        </>
      )}
    </section>
  );
}

function overrides(arm: Arm): string {
  const set = Object.entries({ ...arm.sampling, ...arm.stop });
  const shown = set.filter(([, v]) => v && !(typeof v === "object" && Object.keys(v).length === 0));
  return shown.map(([k, v]) => `${k}=${JSON.stringify(v)}`).join(" ");
}
