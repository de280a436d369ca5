import { useSignal } from "@preact/signals";
import { useMemo, useRef } from "preact/hooks";
import { call } from "../api/connect";
import type { Quantiles, Stats, StatsPoint } from "../api/messages";
import { Chart } from "../charts/chart";
import { lines, type Point } from "../charts/options";
import { theme } from "../charts/theme";
import { bytes, count, num, rate, seconds } from "../format";
import { Alert } from "../parts/alert";
import { usePoll } from "../parts/poll";
import { info } from "../server";
import { TrafficTable } from "./traffic";

const SHOWN_SECONDS = 300;
/** Asked for again, as a second may have been read before it was over. */
const OVERLAP_SECONDS = 3;
const HEADLINE_SECONDS = 10;

interface Gauge {
  time: number;
  stats: Stats;
}

/** Live: throughput, latency, queue and memory of the last five minutes. */
export function OverviewPage() {
  const points = useRef(new Map<number, StatsPoint>());
  const gauges = useRef<Gauge[]>([]);
  const stats = useSignal<Stats | null>(null);

  const { error } = usePoll(async (signal) => {
    const newest = Math.max(...points.current.keys(), 0);
    const missed = newest ? Math.ceil((Date.now() - newest) / 1000) + OVERLAP_SECONDS : Infinity;
    const historySeconds = Math.min(SHOWN_SECONDS, missed);
    const found = await call<Stats>("ServerService/GetStats", { historySeconds }, signal);
    const now = Date.parse(found.time);
    // the clocks that give a second's begin differ by milliseconds from answer to answer
    for (const p of found.history) points.current.set(Math.round(Date.parse(p.time) / 1000) * 1000, p);
    for (const time of points.current.keys())
      if (time < now - 1000 * SHOWN_SECONDS) points.current.delete(time);
    gauges.current = gauges.current.filter((g) => g.time > now - 1000 * SHOWN_SECONDS);
    gauges.current.push({ time: now, stats: found });
    stats.value = found;
  }, 1);

  const now = stats.value;
  return (
    <>
      <Alert text={error.value} />
      {now && <Headline now={now} points={points.current} />}
      {now && <Charts now={now} points={points.current} gauges={gauges.current} />}
      {now && <TrafficTable stats={now} />}
    </>
  );
}

function Headline({ now, points }: { now: Stats; points: Map<number, StatsPoint> }) {
  const recent = [...points.entries()].sort(([a], [b]) => a - b).slice(-HEADLINE_SECONDS);
  const mean = (of: (p: StatsPoint) => number) =>
    recent.reduce((sum, [, p]) => sum + of(p), 0) / recent.length;
  const both = (q?: Quantiles) => `${seconds(q?.p50)} / ${seconds(q?.p99)}`;
  const { load } = now;
  const used = load.kvBlocksTotal ? load.kvBlocksUsed / load.kvBlocksTotal : 0;
  const cells = [
    ["tokens/s out", rate(mean((p) => p.completionTokens)), `mean of ${HEADLINE_SECONDS} s`],
    ["tokens/s in", rate(mean((p) => p.promptTokens)), `mean of ${HEADLINE_SECONDS} s`],
    ["requests/s", rate(mean((p) => p.requests)), `mean of ${HEADLINE_SECONDS} s`],
    ["running", count(load.runningRequests), "requests in the batch"],
    ["waiting", count(load.waitingRequests), "requests in the queue"],
    ["first token p50 / p99", both(now.firstTokenSeconds), "last minute"],
    ["between tokens p50 / p99", both(now.interTokenSeconds), "last minute"],
    ["turned away", count(now.shedRequests), "last minute"],
    ["KV cache in use", `${Math.round(100 * used)} %`, bytes(now.memory.kvUsedBytes)],
    ["adapters", bytes(now.memory.adapterBytes), `of ${bytes(info.value?.memory.budgetBytes)}`],
  ];
  return (
    <dl class="tiles">
      {cells.map(([name, value, hint]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
          <dd class="hint">{hint}</dd>
        </div>
      ))}
    </dl>
  );
}

interface ChartsProps {
  now: Stats;
  points: Map<number, StatsPoint>;
  gauges: Gauge[];
}

function Charts({ now, points, gauges }: ChartsProps) {
  const options = useMemo(() => {
    const to = Date.parse(now.time);
    const from = to - 1000 * SHOWN_SECONDS;
    const each = [...points.entries()].sort(([a], [b]) => a - b);
    const line = (name: string, of: (p: StatsPoint) => number | null) => ({
      name,
      points: each.map(([time, p]): Point => [time, of(p)]),
    });
    const quantile = (name: string, of: (p: StatsPoint) => Quantiles | undefined) =>
      (["p50", "p99"] as const).map((q) => line(`${name} ${q}`, (p) => (of(p) ? num(of(p)![q]) : null)));
    const gauge = (name: string, of: (s: Stats) => number) => ({
      name,
      points: gauges.map((g): Point => [g.time, of(g.stats)]),
    });
    const dots = { dots: true };
    return {
      tokens: lines(
        [line("out", (p) => p.completionTokens), line("in", (p) => p.promptTokens)],
        rate, from, to,
      ),
      requests: lines([line("ended", (p) => p.requests)], rate, from, to),
      first: lines(quantile("first", (p) => p.firstTokenSeconds), seconds, from, to, dots),
      between: lines(quantile("between", (p) => p.interTokenSeconds), seconds, from, to, dots),
      queue: lines(
        [gauge("running", (s) => s.load.runningRequests), gauge("waiting", (s) => s.load.waitingRequests)],
        count, from, to, { whole: true },
      ),
      memory: lines(
        [
          gauge("KV in use", (s) => num(s.memory.kvUsedBytes)),
          gauge("KV kept", (s) => num(s.memory.kvIdleBytes)),
          gauge("KV empty", (s) => num(s.memory.kvEmptyBytes)),
          gauge("adapters", (s) => num(s.memory.adapterBytes)),
        ],
        bytes, from, to, { stacked: true },
      ),
    };
  }, [now, theme.value]);
  const { load, memory } = now;
  const two = (q?: Quantiles) => `median ${seconds(q?.p50)}, 99th percentile ${seconds(q?.p99)}`;
  return (
    <div class="charts">
      <Chart
        title="Tokens per second"
        legend={["out", "in"]}
        summary={`${count(now.completionTokens)} out and ${count(now.promptTokens)} in during the last minute`}
        option={options.tokens}
      />
      <Chart
        title="Running and waiting"
        legend={["running", "waiting"]}
        summary={`${load.runningRequests} requests run, ${load.waitingRequests} wait`}
        option={options.queue}
      />
      <Chart
        title="Time to first token"
        legend={["p50", "p99"]}
        summary={two(now.firstTokenSeconds)}
        option={options.first}
      />
      <Chart
        title="Between tokens"
        legend={["p50", "p99"]}
        summary={two(now.interTokenSeconds)}
        option={options.between}
      />
      <Chart
        title="Requests per second"
        legend={["ended"]}
        summary={`${count(now.requests)} ended during the last minute`}
        option={options.requests}
      />
      <Chart
        title="Memory"
        legend={["KV in use", "KV kept", "KV empty", "adapters"]}
        summary={`${bytes(memory.kvUsedBytes)} of keys and values in use, ${bytes(memory.adapterBytes)} of adapters`}
        option={options.memory}
      />
    </div>
  );
}
