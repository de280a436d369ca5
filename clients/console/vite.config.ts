import { createHash } from "node:crypto";
import { readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join, relative, sep } from "node:path";
import { defineConfig, type Plugin } from "vite";

const HERE = import.meta.dirname;
const OUT = process.env.CONSOLE_OUT ?? join(HERE, "../../server/deltaserve/server/http/assets");
const SERVER = process.env.DELTASERVE_HTTP ?? "http://127.0.0.1:8000";

function files(path: string): string[] {
  if (!statSync(path).isDirectory()) return [path];
  return readdirSync(path).flatMap((name) => files(join(path, name)));
}

// tests/server/http/test_console.py computes the same, and so knows without node whether the
// assets in the repository are those of the sources.
function digestOfSources(): string {
  const roots = ["index.html", "package-lock.json", "tsconfig.json", "vite.config.ts", "src"];
  const found = roots.flatMap((root) => files(join(HERE, root)));
  const named = found.map((path) => [relative(HERE, path).split(sep).join("/"), path] as const);
  const hash = createHash("sha256");
  for (const [name, path] of named.sort(([a], [b]) => (a < b ? -1 : 1))) {
    const data = readFileSync(path);
    hash.update(`${name} ${data.length}\n`).update(data);
  }
  return hash.digest("hex");
}

const digest: Plugin = {
  name: "digest-of-sources",
  writeBundle: () => writeFileSync(join(OUT, "sources.sha256"), `${digestOfSources()}\n`),
};

// Names without hashes keep the history of the assets readable; the server's ETags are what
// browsers go by.
export default defineConfig({
  base: "./",
  plugins: [digest],
  server: { proxy: { "/v1": SERVER, "^/deltaserve\\.v1\\.": SERVER } },
  build: {
    outDir: OUT,
    emptyOutDir: true,
    assetsDir: "",
    assetsInlineLimit: 0,
    modulePreload: false,
    license: { fileName: "licenses.md" },
    target: "es2024",
    chunkSizeWarningLimit: 700,
    rollupOptions: {
      output: {
        entryFileNames: "console.js",
        chunkFileNames: "[name].js",
        assetFileNames: "console[extname]",
      },
    },
  },
});
