// The hub as a table, a search as you type, and a map beside them.

import { adapterLink, ask, bytes, count, day, debounced, h, labelled, say, within } from "/dom.js";
import { makeMap } from "/map.js";
import { pickBox, tray } from "/picks.js";

const PAGE = 50;
const COLUMNS = [["name", "Adapter"], ["license", "License"], ["rank", "Rank"], ["size_bytes", "Size"], ["added", "Added"]];

export async function adaptersView(main, query, signal, summary) {
  const state = { q: query.get("q") ?? "", base: "", license: "", quarantined: false, sort: "added", descending: true, start: 0, count: 20 };
  const search = h("input", { type: "search", value: state.q, placeholder: "What should it do? Or an example input", autocomplete: "off", spellcheck: "false", maxlength: "4000" });
  const base = h("select", {});
  const license = h("select", {});
  const results = h("div", { class: "results" });
  const heading = h("p", { class: "soft", id: "counted", role: "status" });
  const toMap = h("button", { type: "button", class: "narrow", onclick: () => { map.place.scrollIntoView(); map.place.querySelector("canvas").focus(); } }, "Go to the map");
  const held = h("label", { class: "inline", hidden: true }, h("input", { type: "checkbox" }), h("span", {}));
  const map = makeMap(signal, (name) => { location.hash = `#/adapter?${new URLSearchParams({ name })}`; });
  main.append(
    h("h1", { class: "unseen" }, "Adapters of this hub"),
    h("form", { class: "search", role: "search", onsubmit: (event) => { event.preventDefault(); load(); } },
      labelled("Search", search, { class: "wide" }), labelled("Base model", base), labelled("License", license), held),
    tray(signal),
    h("div", { class: "columns" }, h("section", { "aria-label": "Adapters" }, heading, toMap, results), map.place),
  );

  options(base, "all", summary.bases, "no name");
  options(license, "any", summary.licenses);
  held.hidden = !summary.quarantined;
  held.lastChild.textContent = `in quarantine (${summary.quarantined})`;

  let asking = new AbortController();
  async function load() {
    asking.abort();
    asking = new AbortController();
    signal.addEventListener("abort", () => asking.abort());
    const own = asking.signal;
    const q = state.q.trim();
    const shared = { base: state.base, license: state.license };
    results.setAttribute("aria-busy", "true");
    await within(results, async () => {
      if (q) {
        const asked = { q, count: state.count, ...shared };
        const found = await ask("search", { ...asked, evidence: false }, own);
        heading.textContent = found.rows.length ? `${found.rows.length} best hits` : "Nothing fits.";
        const more = h("button", { type: "button", onclick: () => { state.count = Math.min(200, state.count + 20); load(); } }, "Show more");
        results.replaceChildren(hits(found.rows, signal), ...(found.more && state.count < 200 ? [more] : []));
        map.found(q, shared);
        results.removeAttribute("aria-busy");
        // what speaks for the hits takes longer: not for every letter
        await new Promise((resolve) => { setTimeout(resolve, 250); });
        if (own.aborted) return;
        const { rows } = await ask("search", asked, own);
        const told = new Map(rows.map((row) => [row.name, row.evidence]));
        results.querySelectorAll(".evidence").forEach((place) => { place.textContent = told.get(place.dataset.name) ?? ""; });
      } else {
        const { sort, descending, start, quarantined } = state;
        const page = await ask("adapters", { start, count: PAGE, sort, descending, quarantined, ...shared }, own);
        heading.textContent = count(page.total, "adapter");
        results.replaceChildren(table(page.rows, state, turn, signal), pager(page, turn));
        map.found(q, shared);
      }
    });
    results.removeAttribute("aria-busy");
  }
  function turn(changes) {
    Object.assign(state, changes);
    return load();
  }

  search.addEventListener("input", debounced(120, () => {
    state.q = search.value;
    state.count = 20;
    history.replaceState(null, "", state.q.trim() ? `#/?${new URLSearchParams({ q: state.q })}` : "#/");
    load();
  }));
  base.addEventListener("change", () => turn({ base: base.value, start: 0 }));
  license.addEventListener("change", () => turn({ license: license.value, start: 0 }));
  held.firstChild.addEventListener("change", (event) => turn({ quarantined: event.target.checked, start: 0 }));
  await load();
  await map.load();
  if (!license.options[1]) options(license, "any", (await ask("hub", {}, signal)).licenses);
}

function options(select, all, given, unnamed = "") {
  const chosen = select.value;
  select.replaceChildren(h("option", { value: "" }, all), ...given.map(({ name, count: many }) => h("option", { value: name }, `${name || unnamed} (${many.toLocaleString("en")})`)));
  select.value = chosen;
}

function head(cells) {
  return h("thead", {}, h("tr", {}, ...cells));
}

function table(rows, state, turn, signal) {
  const sorted = (key, title) => {
    const here = state.sort === key;
    const way = here ? (state.descending ? "descending" : "ascending") : undefined;
    const next = { sort: key, descending: here ? !state.descending : key !== "name" && key !== "license", start: 0 };
    const sortBy = async () => {
      await turn(next);
      // the heading is a new one
      document.querySelector(`th[data-key=${key}] button`)?.focus();
      say(`sorted by ${title.toLowerCase()}, ${next.descending ? "descending" : "ascending"}`);
    };
    const arrow = way ? h("span", { "aria-hidden": "true" }, state.descending ? " ↓" : " ↑") : null;
    return h("th", { scope: "col", class: key, "data-key": key, "aria-sort": way }, h("button", { type: "button", class: "plain", onclick: sortBy }, title, arrow));
  };
  return h("table", { class: "list" },
    head([h("th", { scope: "col", class: "pick" }, h("span", { class: "unseen" }, "Pick")), ...COLUMNS.map(([key, title]) => sorted(key, title))]),
    h("tbody", {}, ...rows.map((row) => h("tr", {},
      h("td", { class: "pick" }, pickBox(row.name, signal)),
      h("td", { class: "name" }, title(row), h("p", { class: "soft clip" }, row.description)),
      h("td", { class: "license" }, row.license || "–"),
      h("td", { class: "rank" }, String(row.rank)),
      h("td", { class: "size_bytes" }, bytes(row.size_bytes)),
      h("td", { class: "added" }, day(row.created))))));
}

function hits(rows, signal) {
  return h("table", { class: "list" },
    head([h("th", { scope: "col", class: "pick" }, h("span", { class: "unseen" }, "Pick")), h("th", { scope: "col", class: "name" }, "Adapter and what speaks for it"), h("th", { scope: "col", class: "score" }, "Score"), h("th", { scope: "col", class: "license" }, "License"), h("th", { scope: "col", class: "rank" }, "Rank")]),
    h("tbody", {}, ...rows.map((row) => h("tr", {},
      h("td", { class: "pick" }, pickBox(row.name, signal)),
      h("td", { class: "name" }, title(row), h("p", { class: "soft clip" }, row.description), h("p", { class: "evidence", "data-name": row.name }, row.evidence || "…")),
      h("td", { class: "score" }, row.score === null ? "–" : h("span", { class: "meter", style: { "--part": `${Math.max(0, 100 * row.score)}%` } }, row.score.toFixed(2))),
      h("td", { class: "license" }, row.license || "–"),
      h("td", { class: "rank" }, String(row.rank))))));
}

function title(row) {
  const marks = [];
  if (row.quarantined) marks.push(h("span", { class: "mark bad" }, "quarantine"));
  else if (row.num_anomalies) marks.push(h("span", { class: "mark" }, count(row.num_anomalies, "anomaly").replace("anomalys", "anomalies")));
  return h("p", {}, adapterLink(row.name), ...marks);
}

function pager(page, turn) {
  const last = page.start + page.rows.length;
  if (!page.start && last >= page.total) return h("p", {});
  const go = (start) => async () => {
    await turn({ start });
    document.getElementById("counted").scrollIntoView({ block: "nearest" });
    say(`adapters from ${start + 1}`);
  };
  return h("nav", { class: "pager", "aria-label": "Pages" },
    h("button", { type: "button", disabled: !page.start, onclick: go(Math.max(0, page.start - PAGE)) }, "Back"),
    h("span", {}, `${(page.start + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${page.total.toLocaleString("en")}`),
    h("button", { type: "button", disabled: last >= page.total, onclick: go(page.start + PAGE) }, "Next"));
}
