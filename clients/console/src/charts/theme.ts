// Colours of charts, which SVG attributes cannot take from style sheets.
import { signal } from "@preact/signals";

interface Theme {
  text: string;
  muted: string;
  grid: string;
  background: string;
  series: string[];
}

const LIGHT: Theme = {
  text: "#1b1f24",
  muted: "#57606a",
  grid: "#d8dee4",
  background: "#ffffff",
  series: ["#0b62c4", "#b35900", "#1a7f37", "#a1269a", "#8a6d00", "#c4314b", "#00788a", "#5a4fcf"],
};
const DARK: Theme = {
  text: "#e6edf3",
  muted: "#9aa6b2",
  grid: "#2d343c",
  background: "#14181d",
  series: ["#6cb2ff", "#f2a14a", "#5fd07c", "#e58be0", "#e3c84b", "#ff8896", "#4fd0e3", "#a79dff"],
};

const dark = matchMedia("(prefers-color-scheme: dark)");
export const theme = signal(dark.matches ? DARK : LIGHT);
dark.addEventListener("change", () => (theme.value = dark.matches ? DARK : LIGHT));

export function colour(i: number): string {
  const { series } = theme.value;
  return series[i % series.length]!;
}
