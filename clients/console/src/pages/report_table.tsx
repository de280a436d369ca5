import type { ArmReport, Estimate, Report } from "../api/messages";
import { count, decimal, NONE, num, percent, seconds, word } from "../format";

type Show = (value: Estimate["value"] | undefined) => string;

function Interval({ of, show = decimal }: { of: Estimate | undefined; show?: Show }) {
  if (!of) return <>{NONE}</>;
  return (
    <>
      {show(of.value)}{" "}
      <span class="hint">
        [{show(of.low)}, {show(of.high)}]
      </span>
    </>
  );
}

/** better, worse, or empty while that is open. */
function finding(difference: Estimate | undefined): string {
  if (!difference) return "";
  if (num(difference.low) > 0) return "better";
  return num(difference.high) < 0 ? "worse" : "";
}

type Row = [string, (a: ArmReport) => preact.ComponentChildren];

/** One column an arm: what is compared stands side by side. */
export function ReportTable({ report, control }: { report: Report; control: string }) {
  const metrics = [...new Set(report.arms.flatMap((a) => Object.keys(a.shares)))].sort();
  const rows: Row[] = [
    ["users", (a) => count(a.users)],
    ["users with a reward", (a) => count(a.rewardedUsers)],
    ["requests", (a) => count(a.requests)],
    ["of these without a user", (a) => count(a.anonymousRequests)],
    ["mean reward", (a) => <Interval of={a.reward} />],
    [
      `difference from ${control}`,
      (a) => (
        <span class={finding(a.difference)}>
          <Interval of={a.difference} /> {finding(a.difference)}
        </span>
      ),
    ],
    ["the same at one look", (a) => <Interval of={a.differenceOneLook} />],
    ["detectable difference", (a) => (a.arm === control ? NONE : decimal(a.detectable))],
    ...metrics.map(
      (metric): Row => [
        `users: ${word(metric, "guardrail_metric_")}`,
        (a) => <Interval of={a.shares[metric]} show={percent} />,
      ],
    ),
    ["first token p50 / p99", (a) => both(a.firstTokenSeconds)],
    ["to the end p50 / p99", (a) => both(a.seconds)],
    ["tokens in / out", (a) => `${count(a.promptTokens)} / ${count(a.completionTokens)}`],
    [
      "variance taken away",
      (a) => (a.varianceReduction === undefined ? NONE : percent(a.varianceReduction)),
    ],
  ];
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Report by arm">
      <table>
        <thead>
          <tr>
            <td />
            {report.arms.map((a) => (
              <th key={a.arm} scope="col" class="n">
                {a.arm}
                {a.arm === control && <span class="tag">control</span>}
                {a.shadow && <span class="tag">shadow</span>}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map(([name, of]) => (
            <tr key={name}>
              <th scope="row">{name}</th>
              {report.arms.map((a) => (
                <td key={a.arm} class="n">
                  {of(a)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function both(q: ArmReport["seconds"]): string {
  return `${seconds(q?.p50)} / ${seconds(q?.p99)}`;
}
