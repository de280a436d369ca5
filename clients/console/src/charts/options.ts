// What ECharts is given: lines over time, and intervals over time.
import type { EChartsCoreOption } from "echarts/core";
import { colour, theme } from "./theme";

/** [milliseconds, value]; null where there is none. */
export type Point = [number, number | null];
/** [milliseconds, value, low, high]. */
export type Interval = [number, number, number, number];

export interface Line {
  name: string;
  points: Point[];
}

export interface Band {
  name: string;
  colour: number;
  points: Interval[];
}

type Show = (value: number) => string;

function frame(show: Show, from?: number, to?: number): EChartsCoreOption {
  const { text, muted, grid, background } = theme.value;
  return {
    animation: false,
    textStyle: { fontFamily: "inherit" },
    grid: { left: 58, right: 18, top: 10, bottom: 22 },
    tooltip: {
      trigger: "axis",
      renderMode: "richText",
      backgroundColor: background,
      borderColor: grid,
      textStyle: { color: text, fontSize: 12 },
      valueFormatter: (value: unknown) => (typeof value === "number" ? show(value) : "–"),
    },
    xAxis: {
      type: "time",
      min: from,
      max: to,
      axisLine: { lineStyle: { color: grid } },
      axisLabel: { color: muted, fontSize: 11, hideOverlap: true, ...clock(from) },
      splitLine: { show: false },
      splitNumber: 4,
    },
    yAxis: {
      type: "value",
      scale: false,
      axisLabel: { color: muted, fontSize: 11, formatter: show },
      splitLine: { lineStyle: { color: grid } },
      splitNumber: 3,
    },
  };
}

/** A chart with fixed ends is of minutes, others may be of days. */
function clock(from?: number): object {
  return from === undefined ? {} : { formatter: "{HH}:{mm}" };
}

interface Look {
  /** Filled, one on top of the other. */
  stacked?: boolean;
  /** With a dot for each point, for lines with gaps. */
  dots?: boolean;
  /** Of the axis. */
  whole?: boolean;
}

export function lines(
  given: Line[],
  show: Show,
  from: number,
  to: number,
  { stacked = false, dots = false, whole = false }: Look = {},
): EChartsCoreOption {
  const base = frame(show, from, to);
  return {
    ...base,
    yAxis: { ...(base.yAxis as object), ...(whole ? { minInterval: 1 } : {}) },
    series: given.map((line, i) => ({
      type: "line",
      name: line.name,
      data: line.points,
      showSymbol: dots,
      symbol: "circle",
      symbolSize: 3,
      color: colour(i),
      lineStyle: { width: stacked ? 0.5 : 1.5 },
      emphasis: { disabled: true },
      ...(stacked ? { stack: "all", areaStyle: { opacity: 0.55 } } : {}),
    })),
  };
}

/** Each band is filled between its ends, with its value as a line. zero: a line at 0. */
export function intervals(given: Band[], show: Show, zero: boolean): EChartsCoreOption {
  const known = (p: Interval) => p.slice(1).every(Number.isFinite);
  const base = frame(show);
  return {
    ...base,
    yAxis: { ...(base.yAxis as object), scale: !zero },
    series: given.flatMap((band) => {
      const points = band.points.filter(known);
      const ink = colour(band.colour);
      return [
        {
          type: "custom",
          name: `${band.name}, interval`,
          data: points,
          encode: { x: 0, y: [2, 3] },
          dimensions: ["time", "value", "low", "high"],
          clip: true,
          silent: true,
          tooltip: { show: false },
          renderItem: (params: { dataIndex: number }, api: { coord(p: number[]): number[] }) => {
            if (params.dataIndex !== 0) return null;
            const low = points.map((p) => api.coord([p[0], p[2]]));
            const high = points.map((p) => api.coord([p[0], p[3]]));
            const shape = { points: [...low, ...high.reverse()] };
            return { type: "polygon", shape, style: { fill: ink, opacity: 0.16 } };
          },
        },
        {
          type: "line",
          name: band.name,
          data: points.map((p) => [p[0], p[1]]),
          color: ink,
          showSymbol: points.length === 1,
          lineStyle: { width: 1.5 },
          emphasis: { disabled: true },
        },
      ];
    }),
  };
}
