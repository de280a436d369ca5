import { signal } from "@preact/signals";
import { asking, hasKey } from "./api/key";
import { KeyDialog } from "./parts/key_dialog";
import { AdaptersPage } from "./pages/adapters";
import { OverviewPage } from "./pages/overview";
import { PlaygroundPage } from "./pages/playground";
import { RoutesPage } from "./pages/routes";
import { info, infoError } from "./server";

const PAGES = {
  overview: ["Overview", OverviewPage],
  adapters: ["Adapters", AdaptersPage],
  playground: ["Playground", PlaygroundPage],
  routes: ["Routes", RoutesPage],
} as const;
type PageName = keyof typeof PAGES;

function named(): PageName {
  const name = location.hash.slice(2).split("/")[0] ?? "";
  return name in PAGES ? (name as PageName) : "overview";
}

const page = signal(named());
addEventListener("hashchange", () => (page.value = named()));

export function App() {
  const [title, Page] = PAGES[page.value];
  const base = info.value?.base;
  document.title = `${title} · ${base?.name ?? "deltaserve"}`;
  return (
    <>
      <header>
        <a class="skip" href="#main" onClick={toMain}>
          Skip to the page
        </a>
        <strong class="brand">deltaserve</strong>
        <nav aria-label="Pages">
          {Object.entries(PAGES).map(([name, [text]]) => (
            <a key={name} href={`#/${name}`} aria-current={name === page.value ? "page" : undefined}>
              {text}
            </a>
          ))}
        </nav>
        <span class="base" title={base?.architecture}>
          {base ? `${base.name} · ${base.dtype} · ${base.quantization}` : infoError.value}
          {info.value ? ` · ${info.value.device} · ${info.value.version}` : ""}
        </span>
        <button type="button" onClick={() => (asking.value = "The key for all that is asked from here on.")}>
          {hasKey.value ? "Change key" : "Key"}
        </button>
      </header>
      <main id="main" tabIndex={-1}>
        <h1>{title}</h1>
        <Page />
      </main>
      <KeyDialog />
    </>
  );
}

/** The address after # is the page's name, so the link cannot do it by itself. */
function toMain(event: Event) {
  event.preventDefault();
  document.getElementById("main")?.focus();
}
