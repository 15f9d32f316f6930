// Which view is shown: the part of the address after "#".

import { adapterView } from "/adapter.js";
import { adaptersView } from "/adapters.js";
import { composeView } from "/compose.js";
import { ask, failure, h } from "/dom.js";
import { watchPicks } from "/picks.js";
import { routeView } from "/route.js";

const VIEWS = { "": [adaptersView, "Adapters"], adapter: [adapterView, "Adapter"], compose: [composeView, "Compose"], route: [routeView, "Route"] };
const main = document.getElementById("main");
let left = new AbortController();

async function show() {
  left.abort();
  left = new AbortController();
  const { signal } = left;
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [view, title] = VIEWS[path] ?? VIEWS[""];
  document.querySelectorAll("nav a").forEach((link) => {
    const here = link.dataset.view === path || (path === "adapter" && link.dataset.view === "");
    link.toggleAttribute("aria-current", here);
    if (here) link.setAttribute("aria-current", "page");
  });
  const query_ = new URLSearchParams(query ?? "");
  document.title = `${query_.get("name") ?? title} – loraweave`;
  main.replaceChildren();
  try {
    const hub = await ask("hub", {}, signal);
    const place = document.getElementById("place");
    place.textContent = place.title = hub.place;
    if (hub.count || hub.quarantined || path === "adapter") await view(main, query_, signal, hub);
    else main.append(howToFill(hub.place));
  } catch (error) {
    if (error.name !== "AbortError") main.replaceChildren(failure(error));
  }
}

function howToFill(place) {
  const quoted = /^[\w@%+=:,.\/-]+$/.test(place) ? place : `'${place.replaceAll("'", "'\\''")}'`;
  const command = (verb) => h("p", {}, h("code", {}, `loraweave hub ${verb} --hub ${quoted}`));
  return h("section", { class: "empty" },
    h("h1", {}, "This hub has no adapters yet"),
    h("p", {}, "Add some in a shell, then load this page again. One adapter, by its folder, its file or its id on the model hub:"), command("add FOLDER"),
    h("p", {}, "Or every adapter below a folder:"), command("add-tree FOLDER"));
}

window.addEventListener("hashchange", () => {
  // a reader goes on at the top of the new view
  main.focus({ preventScroll: true });
  window.scrollTo(0, 0);
  show();
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
watchPicks((kept) => {
  const badge = document.getElementById("picked");
  badge.textContent = String(kept.length);
  badge.hidden = !kept.length;
});
show();
