import { useSignal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { call } from "../api/connect";
import type { Estimate, Report } from "../api/messages";
import { Chart } from "../charts/chart";
import { type Band, type Interval, intervals } from "../charts/options";
import { theme } from "../charts/theme";
import { decimal, moment, num } from "../format";
import { Alert } from "../parts/alert";
import { usePoll } from "../parts/poll";
import { ReportTable } from "./report_table";

const POINTS = 60;

/** How the arms of a route compare, and how that came about. */
export function ReportView({ route, control }: { route: string; control: string }) {
  const cuped = useSignal(false);
  const report = useSignal<Report | null>(null);
  const { error } = usePoll(
    async (signal) => {
      const request = { route, points: POINTS, cuped: cuped.value };
      report.value = await call<Report>("RouteService/GetReport", request, signal);
    },
    10,
    `${cuped.value}`,
  );
  const found = report.value;
  const ratio = found?.sampleRatio;
  return (
    <section aria-labelledby="report">
      <h2 id="report">Report</h2>
      <label class="tick">
        <input
          type="checkbox"
          checked={cuped.value}
          onChange={(event) => (cuped.value = event.currentTarget.checked)}
        />
        adjust by each user's rewards before the experiment (CUPED)
      </label>
      <Alert text={error.value} />
      {found && (
        <>
          {ratio?.mismatch && (
            <Alert
              text={
                "Sample ratio mismatch: the arms do not have the users that their weights say " +
                `(p = ${num(ratio.anytimePValue).toPrecision(2)}). Something is wrong with the ` +
                "experiment, and its differences mean nothing."
              }
            />
          )}
          {found.warnings.map((text) => (
            <Alert key={text} kind="warn" text={text} />
          ))}
          <p class="hint">
            Counted since {moment(found.startTime)}. The intervals hold however often one looks.
            {ratio && !ratio.mismatch && ` No sample ratio mismatch (p = ${decimal(ratio.anytimePValue)}).`}
          </p>
          <ReportTable report={found} control={control} />
          <ReportCharts report={found} control={control} />
        </>
      )}
    </section>
  );
}

function ReportCharts({ report, control }: { report: Report; control: string }) {
  const arms = report.arms.map((a) => a.arm);
  const others = arms.filter((arm) => arm !== control);
  const [means, differences] = useMemo(() => {
    const band = (arm: string, of: "reward" | "difference"): Band => ({
      name: arm,
      colour: arms.indexOf(arm),
      points: report.history.flatMap((p): Interval[] => {
        const e: Estimate | undefined = p.arm === arm ? p[of] : undefined;
        return e ? [[Date.parse(p.time), num(e.value), num(e.low), num(e.high)]] : [];
      }),
    });
    return [
      intervals(arms.map((arm) => band(arm, "reward")), decimal, false),
      intervals(others.map((arm) => band(arm, "difference")), decimal, true),
    ];
  }, [report, theme.value]);
  if (report.history.length === 0) return null;
  const of = (e?: Estimate) => `${decimal(e?.value)} in ${decimal(e?.low)} to ${decimal(e?.high)}`;
  const say = (which: "reward" | "difference") =>
    report.arms
      .filter((a) => a[which])
      .map((a) => `${a.arm} ${of(a[which])}`)
      .join("; ");
  return (
    <div class="charts">
      <Chart title="Mean reward" legend={arms} summary={say("reward")} option={means} />
      <Chart
        title={`Difference from ${control}`}
        legend={arms}
        hidden={[control]}
        summary={say("difference")}
        option={differences}
      />
    </div>
  );
}

