import { render } from "preact";
import { App } from "./app";

// The server's policy forbids building HTML from text anywhere in the page. ECharts empties an
// element so when a chart goes; that, and nothing else, is let through.
(globalThis as any).trustedTypes?.createPolicy("default", {
  createHTML: (text: string) => (text === "" || text === "null" ? "" : null),
});

render(<App />, document.getElementById("app")!);
