// Numbers as people read them.
import type { Num } from "./api/messages";

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
export const NONE = "–";

/** proto3's JSON has 64-bit and infinite numbers as text. */
export function num(value: Num | undefined): number {
  return value === undefined ? NaN : Number(value);
}

export function bytes(value: Num | undefined): string {
  let n = num(value);
  if (Number.isNaN(n)) return NONE;
  let unit = 0;
  while (n >= 1024 && unit < UNITS.length - 1) {
    n /= 1024;
    unit++;
  }
  return `${unit && n < 100 ? n.toFixed(1) : Math.round(n)} ${UNITS[unit]}`;
}

export function seconds(value: Num | undefined): string {
  const n = num(value);
  if (Number.isNaN(n)) return NONE;
  if (n === 0) return "0";
  if (n < 1e-3) return `${(n * 1e6).toPrecision(2)} µs`;
  if (n < 1) return `${(n * 1e3).toPrecision(n < 0.1 ? 2 : 3)} ms`;
  return n < 100 ? `${n.toPrecision(3)} s` : `${Math.round(n)} s`;
}

export function count(value: Num | undefined): string {
  const n = num(value);
  return Number.isNaN(n) ? NONE : Math.round(n).toLocaleString("en");
}

export function rate(n: number): string {
  if (!Number.isFinite(n)) return NONE;
  return n === 0 ? "0" : n < 10 ? n.toFixed(1) : count(n);
}

/** With so many places that a difference of a hundredth is seen. */
export function decimal(value: Num | undefined): string {
  const n = num(value);
  if (Number.isNaN(n)) return NONE;
  if (!Number.isFinite(n)) return n > 0 ? "∞" : "−∞";
  const shown = Math.abs(n) >= 100 ? n.toFixed(0) : Math.abs(n) >= 10 ? n.toFixed(1) : n.toFixed(3);
  return shown.replace("-", "−");
}

export function percent(value: Num | undefined): string {
  const n = num(value);
  if (Number.isNaN(n)) return NONE;
  if (!Number.isFinite(n)) return decimal(n);
  const shown = 100 * n;
  return `${shown.toFixed(shown !== 0 && Math.abs(shown) < 10 ? 1 : 0).replace("-", "−")} %`;
}

/** `ADAPTER_STATE_READY` with the prefix `ADAPTER_STATE_`: `ready`. */
export function word(value: string, prefix: string): string {
  return value.replace(prefix, "").replaceAll("_", " ").toLowerCase();
}

export function moment(time: string | undefined): string {
  return time ? new Date(time).toLocaleString() : NONE;
}
