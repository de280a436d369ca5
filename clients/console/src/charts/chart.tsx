import type { ECharts, EChartsCoreOption } from "echarts/core";
import { useEffect, useRef, useState } from "preact/hooks";
import { colour } from "./theme";

interface Props {
  title: string;
  /** Names in the order of their colours; none for a single line. */
  legend: string[];
  /** Names of the legend that are not drawn, and only keep their colour. */
  hidden?: string[];
  /** What a reader who does not see the chart is told. */
  summary: string;
  option: EChartsCoreOption;
}

/** A chart with its title and legend. ECharts is fetched when the first one is drawn. */
export function Chart({ title, legend, hidden = [], summary, option }: Props) {
  const place = useRef<HTMLDivElement>(null);
  const [chart, setChart] = useState<ECharts | null>(null);

  useEffect(() => {
    const element = place.current!;
    let made: ECharts | null = null;
    let gone = false;
    const resized = new ResizeObserver(() => made?.resize());
    void import("./echarts").then(({ init }) => {
      if (gone) return;
      made = init(element, null, { renderer: "svg" });
      resized.observe(element);
      setChart(made);
    });
    return () => {
      gone = true;
      resized.disconnect();
      made?.dispose();
    };
  }, []);

  useEffect(() => chart?.setOption(option, { notMerge: true, lazyUpdate: true }), [chart, option]);

  return (
    <figure class="chart">
      <figcaption>
        <b>{title}</b>
        {legend.map((name, i) =>
          hidden.includes(name) ? null : (
            <span key={name} class="key">
              <i style={{ background: colour(i) }} />
              {name}
            </span>
          ),
        )}
      </figcaption>
      <div ref={place} class="plot" role="img" aria-label={`${title}: ${summary}`} />
    </figure>
  );
}
