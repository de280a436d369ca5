// The messages of proto/deltaserve/v1 that are used here, as proto3's JSON has them: 64-bit integers
// are text, as are infinite doubles; fields of a message's type may be missing.

export type Num = number | string;

export interface Adapter {
  name: string;
  digest: string;
  uri: string;
  state: string;
  tier: string;
  format: string;
  primitives: string[];
  residentBytes: Num;
  sourceBytes: Num;
  pinned: boolean;
  inFlight: number;
  loads: number;
  lastUsedTime?: string;
  loadDuration?: string;
  error: string;
  notes: string[];
  parent: string;
  patch: boolean;
}

export interface AdapterChanges {
  snapshot: boolean;
  adapters: Adapter[];
}

export interface ServerInfo {
  version: string;
  device: string;
  base: {
    name: string;
    architecture: string;
    quantization: string;
    dtype: string;
    maxLength: number;
    chat: boolean;
  };
  adapterFormats: string[];
  memory: { weightsBytes: Num; budgetBytes: Num };
}

export interface Quantiles {
  p50: Num;
  p90: Num;
  p99: Num;
  mean: Num;
}

export interface StatsPoint {
  time: string;
  promptTokens: number;
  completionTokens: number;
  requests: number;
  firstTokenSeconds?: Quantiles;
  interTokenSeconds?: Quantiles;
}

export interface ModelTraffic {
  model: string;
  requests: Num;
  promptTokens: Num;
  completionTokens: Num;
}

export interface MemoryUse {
  kvUsedBytes: Num;
  kvIdleBytes: Num;
  kvEmptyBytes: Num;
  adapterBytes: Num;
  freeBytes: Num;
}

export interface Stats {
  time: string;
  windowSeconds: number;
  promptTokens: Num;
  completionTokens: Num;
  requests: Num;
  shedRequests: Num;
  firstTokenSeconds?: Quantiles;
  interTokenSeconds?: Quantiles;
  models: ModelTraffic[];
  load: {
    runningRequests: number;
    waitingRequests: number;
    kvBlocksTotal: number;
    kvBlocksUsed: number;
  };
  memory: MemoryUse;
  history: StatsPoint[];
}

export interface Arm {
  name: string;
  model: string;
  adapters: { name: string; strength?: number }[];
  weight?: number;
  shadow?: number;
  digests: string[];
  sampling?: object;
  stop?: object;
}

export interface Guardrail {
  metric: string;
  tolerated: number;
  versusControl: boolean;
  seconds: number;
  tokens: number;
}

export interface Route {
  name: string;
  arms: Arm[];
  control: string;
  salt: string;
  coverage?: number;
  layer?: { name: string; start: number; end: number };
  ramp?: object;
  guardrails: Guardrail[];
  bandit?: object;
  etag: string;
  state: string;
  reason: string;
  weights: Record<string, number>;
  startTime?: string;
  updateTime?: string;
}

export interface Estimate {
  value: Num;
  low: Num;
  high: Num;
}

export interface ArmReport {
  arm: string;
  shadow: boolean;
  requests: Num;
  anonymousRequests: Num;
  users: Num;
  rewardedUsers: Num;
  reward?: Estimate;
  difference?: Estimate;
  differenceOneLook?: Estimate;
  detectable: Num;
  shares: Record<string, Estimate>;
  firstTokenSeconds?: Quantiles;
  seconds?: Quantiles;
  promptTokens: Num;
  completionTokens: Num;
  varianceReduction?: number;
}

export interface ReportPoint {
  time: string;
  arm: string;
  rewardedUsers: Num;
  reward?: Estimate;
  difference?: Estimate;
}

export interface Report {
  route: Route;
  startTime?: string;
  arms: ArmReport[];
  sampleRatio?: {
    mismatch: boolean;
    pValue: Num;
    anytimePValue: Num;
    expected: Record<string, Num>;
  };
  history: ReportPoint[];
  warnings: string[];
}
