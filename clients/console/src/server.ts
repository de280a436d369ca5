// What is served; asked for once.
import { signal } from "@preact/signals";
import { call } from "./api/connect";
import { told } from "./api/http";
import type { ServerInfo } from "./api/messages";

export const info = signal<ServerInfo | null>(null);
export const infoError = signal("");

call<ServerInfo>("ServerService/GetServerInfo", {})
  .then((found) => (info.value = found))
  .catch((error: unknown) => (infoError.value = told(error)));
