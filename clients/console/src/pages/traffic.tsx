import type { Stats } from "../api/messages";
import { count, rate, num } from "../format";

/** Who asked for how much in the last minute. */
export function TrafficTable({ stats }: { stats: Stats }) {
  return (
    <section aria-labelledby="traffic">
      <h2 id="traffic">Last minute by model</h2>
      {stats.models.length === 0 && <p class="hint">No requests.</p>}
      {stats.models.length > 0 && (
        <div class="scroll" tabIndex={0} role="region" aria-label="Traffic">
          <table>
            <thead>
              <tr>
                <th scope="col">model</th>
                <th scope="col" class="n">requests</th>
                <th scope="col" class="n">tokens in</th>
                <th scope="col" class="n">tokens out</th>
                <th scope="col" class="n">out/s</th>
              </tr>
            </thead>
            <tbody>
              {stats.models.map((m) => (
                <tr key={m.model}>
                  <th scope="row">{m.model || "(base)"}</th>
                  <td class="n">{count(m.requests)}</td>
                  <td class="n">{count(m.promptTokens)}</td>
                  <td class="n">{count(m.completionTokens)}</td>
                  <td class="n">{rate(num(m.completionTokens) / stats.windowSeconds)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </section>
  );
}
