// Which adapters are picked for the composer, kept for as long as the tab is open.

import { h, named, say } from "/dom.js";

export const MOST = 8;
const KEY = "loraweave.picks";
const watching = new Set();

export function picks() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEY) ?? "[]");
    return Array.isArray(kept) ? kept.filter((name) => typeof name === "string").slice(0, MOST) : [];
  } catch {
    return [];
  }
}

export function pick(name, wanted) {
  const others = picks().filter((other) => other !== name);
  const kept = wanted ? [...others, name].slice(0, MOST) : others;
  sessionStorage.setItem(KEY, JSON.stringify(kept));
  say(`${name} ${wanted ? "picked" : "put back"}: ${kept.length} of ${MOST}`);
  watching.forEach((told) => told(kept));
}

export function watchPicks(told, signal = undefined) {
  watching.add(told);
  signal?.addEventListener("abort", () => watching.delete(told));
  told(picks());
}

export function pickBox(name, signal) {
  const box = h("input", { type: "checkbox", "aria-label": `Pick ${name} for the composer`, onchange: () => pick(name, box.checked) });
  watchPicks((kept) => {
    box.checked = kept.includes(name);
    box.disabled = !box.checked && kept.length >= MOST;
    box.title = box.disabled ? `${MOST} adapters are picked already` : "";
  }, signal);
  return box;
}

// what is picked, with a way on; empty where nothing is
export function tray(signal) {
  const place = h("aside", { class: "tray", "aria-label": "Picked adapters" });
  watchPicks((kept) => {
    place.hidden = !kept.length;
    const chips = kept.map((name) => h("button", { type: "button", class: "chip", onclick: () => pick(name, false), "aria-label": `Put ${name} back` }, named(name), h("span", { "aria-hidden": "true" }, "×")));
    place.replaceChildren(h("span", { class: "soft" }, `${kept.length} picked`), h("div", { class: "chips" }, ...chips), h("a", { class: "button primary", href: "#/compose" }, "Compose"));
  }, signal);
  return place;
}
