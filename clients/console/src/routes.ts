// The routes that the server knows.
import { signal } from "@preact/signals";
import { call } from "./api/connect";
import type { Route } from "./api/messages";

export const routes = signal<Route[]>([]);

export async function loadRoutes(signal?: AbortSignal): Promise<void> {
  const found = await call<{ routes: Route[] }>("RouteService/ListRoutes", {}, signal);
  routes.value = found.routes;
}
