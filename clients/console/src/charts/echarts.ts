// The parts of ECharts that are used. Tooltips are drawn as SVG text: names are strangers' text, and
// the default builds HTML of them.
import { CustomChart, LineChart } from "echarts/charts";
import { GridComponent, TooltipComponent } from "echarts/components";
import { init, use } from "echarts/core";
import { SVGRenderer } from "echarts/renderers";

use([CustomChart, LineChart, GridComponent, TooltipComponent, SVGRenderer]);

export { init };
