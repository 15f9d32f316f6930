// One adapter: what its card says, its layers, what is odd, its versions, its parents, and who resembles it.

import { adapterLink, ask, bytes, count, day, h, named, number, svg, within } from "/dom.js";
import { formulaShown } from "/formula.js";
import { blues, heat } from "/heat.js";
import { MOST, pick, tray, watchPicks } from "/picks.js";

export async function adapterView(main, query, signal) {
  const name = query.get("name") ?? "";
  const found = await ask("adapter", { name }, signal);
  const wanted = h("button", { type: "button", class: "primary", onclick: () => pick(name, wanted.getAttribute("aria-pressed") !== "true") });
  watchPicks((kept) => {
    const has = kept.includes(name);
    wanted.textContent = has ? "Picked for the composer" : "Pick for the composer";
    wanted.setAttribute("aria-pressed", String(has));
    wanted.disabled = !has && kept.length >= MOST;
  }, signal);
  const layers = section("Norms of the layers' updates", h("p", { class: "soft" }, "Reading the factors …"));
  const byText = h("div", {}, h("p", { class: "soft" }, "Searching …"));
  const byWeights = h("div", {}, h("p", { class: "soft" }, "Comparing weights …"));
  main.append(
    h("p", { class: "back" }, h("a", { href: "#/" }, "← All adapters")),
    h("div", { class: "title" }, h("h1", {}, named(name)), wanted),
    h("p", { class: "lead" }, found.description || "The card has no description."),
    found.quarantined ? h("p", { class: "error" }, "In quarantine: nothing finds or reads it. In a shell, ", h("code", {}, "loraweave hub release"), " lets it out.") : "",
    tray(signal),
    h("div", { class: "cards" },
      section("Card", facts(found), found.quarantined ? "" : formulaShown(found.formula, () => ({ instruction: found.description, text: found.examples[0]?.input ?? "" }), signal)),
      section("What looks odd", anomalies(found.anomalies)),
      layers,
      section("Versions", versions(found.versions)),
      section("Made of", family(found.family)),
      section("Who resembles it", h("h3", {}, "By what they do"), byText, h("h3", {}, "By their weights"), byWeights),
      section("Examples", examples(found)),
      found.card ? section("The rest of its card", h("pre", { tabindex: "0", "aria-label": "Card as JSON" }, found.card)) : ""));

  within(layers.lastChild, async () => {
    const norms = await ask("layers", { name }, signal);
    const most = Math.max(...norms.values.flat().filter((value) => value !== null));
    const notes = [];
    if (norms.unbound) notes.push(h("p", { class: "soft" }, `${count(norms.unbound, "layer")} depend on the base's weights too (DoRA or a trained bias); shown is the low-rank part.`));
    if (norms.heads.length) notes.push(h("p", { class: "soft" }, `Trained whole: ${norms.heads.join(", ")}.`));
    layers.lastChild.replaceChildren(
      h("p", { class: "soft" }, `Frobenius norm of B A; the largest is ${number(most)}.`),
      heat("Norm of each layer's update", norms, blues(most), (value) => number(value)), ...notes);
  });
  const alike = (place, by, asked) => within(place, async () => {
    const { rows, waits } = await ask("alike", { name, by, asked }, signal);
    if (waits) {
      place.replaceChildren(h("p", {}, `The first comparison reads all ${count(waits, "adapter")} once. `, h("button", { type: "button", onclick: () => { place.replaceChildren(h("p", { class: "soft" }, "Comparing weights …")); alike(place, by, true); } }, "Compare")));
      return;
    }
    place.replaceChildren(rows.length ? h("ol", { class: "alike" }, ...rows.map((row) => h("li", {}, adapterLink(row.name), h("span", { class: "meter", style: { "--part": `${Math.max(0, 100 * row.score)}%` } }, row.score.toFixed(2)), h("p", { class: "soft clip" }, row.description)))) : h("p", { class: "soft" }, "None."));
  });
  if (found.quarantined) [byText, byWeights].forEach((place) => place.replaceChildren(h("p", { class: "soft" }, "Not compared while it is in quarantine.")));
  else {
    await alike(byText, "text", false);
    await alike(byWeights, "weights", false);
  }
}

function section(title, ...content) {
  return h("section", { class: "card" }, h("h2", {}, title), h("div", {}, ...content));
}

function facts(found) {
  const rows = [
    ["Base model", found.base || "not named"],
    ["Revision of the base", found.base_revision],
    ["License", found.license || "not stated"],
    ["Rank", String(found.rank)],
    ["Layers", found.modules.join(", ")],
    ["Size", bytes(found.size_bytes)],
    ["Tags", found.tags.join(", ")],
    ["Language", found.language.join(", ")],
    ["Added", found.created.replace("T", " ").slice(0, 16)],
    ["From", found.source],
    ["Content", h("code", { title: found.hash }, found.hash.slice(0, 16))],
  ];
  return h("dl", {}, ...rows.filter(([, value]) => value).flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, value)]));
}

function anomalies(found) {
  if (!found.length) return h("p", { class: "soft" }, "Nothing, beside the hub's other adapters of its base.");
  return h("ul", { class: "anomalies" }, ...found.map(({ kind, detail, score }) => h("li", {}, h("span", { class: "mark" }, kind), ` ${detail} (score ${number(score)})`)));
}

function versions(found) {
  const rows = found.map((each) => h("tr", {},
    h("td", { class: "left" }, `${each.version}${each.restored ? `, restored from ${each.restored}` : ""}`),
    h("td", {}, String(each.rank)), h("td", {}, bytes(each.size_bytes)), h("td", {}, day(each.created)), h("td", {}, h("code", { title: each.hash }, each.hash.slice(0, 8)))));
  return h("table", {}, h("thead", {}, h("tr", {}, ...["Version", "Rank", "Size", "Added", "Content"].map((title, at) => h("th", { scope: "col", class: at ? "" : "left" }, title)))), h("tbody", {}, ...rows));
}

function examples(found) {
  if (!found.examples.length) return h("p", { class: "soft" }, "The card has no sample inputs.");
  const outputs = found.examples.some(({ output }) => output);
  const more = found.num_examples - found.examples.length;
  return h("div", {}, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Sample inputs" }, h("table", { class: "texts" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Input"), outputs && h("th", { scope: "col" }, "Output"))),
    h("tbody", {}, ...found.examples.map(({ input, output }) => h("tr", {}, h("td", {}, input), outputs && h("td", {}, output)))))),
    more > 0 && h("p", { class: "soft" }, `and ${more} more`));
}

// the adapter on the left, what it was merged from to the right, generation by generation
function family(found) {
  if (found.length < 2) return h("p", { class: "soft" }, "It was trained, not merged from others.");
  const [WIDE, HIGH, GAP, ROW] = [136, 30, 62, 42];
  const children = found.map((_, at) => found.flatMap((other, number_) => (other.child === at ? [number_] : [])));
  const row = [];
  let next = 0;
  // parents first: a node stands in the middle of them
  (function place(at) {
    children[at].forEach(place);
    row[at] = children[at].length ? (row[children[at][0]] + row[children[at].at(-1)]) / 2 : next++;
  })(0);
  const left = (at) => found[at].generation * (WIDE + GAP) + 1;
  const top = (at) => row[at] * ROW + 1;
  const width = (Math.max(...found.map(({ generation }) => generation)) + 1) * (WIDE + GAP) - GAP + 2;
  const drawn = svg("svg", { width, height: next * ROW, viewBox: `0 0 ${width} ${next * ROW}`, role: "group", "aria-label": "What it was merged from" });
  found.forEach(({ child, weight }, at) => {
    if (child === null) return;
    const [from, to] = [[left(child) + WIDE, top(child) + HIGH / 2], [left(at), top(at) + HIGH / 2]];
    drawn.append(svg("path", { class: "edge", d: `M${from} C${from[0] + GAP / 2},${from[1]} ${to[0] - GAP / 2},${to[1]} ${to}` }));
    if (weight !== null) drawn.append(svg("text", { class: "weight", x: to[0] - 6, y: to[1] - 5, "text-anchor": "end" }, number(weight)));
  });
  found.forEach(({ name, known, method }, at) => {
    const text = name.length > 17 ? `${name.slice(0, 16)}…` : name;
    const box = [svg("title", {}, `${name}${method ? `, by ${method}` : ""}${known ? "" : ", not in this hub with this content"}`), svg("rect", { x: left(at), y: top(at), width: WIDE, height: HIGH, rx: 6, class: known ? "" : "gone" }), svg("text", { x: left(at) + 10, y: top(at) + 20 }, text)];
    drawn.append(known && at ? svg("a", { href: `#/adapter?${new URLSearchParams({ name })}` }, ...box) : svg("g", {}, ...box));
  });
  const methods = found[0].method ? h("p", { class: "soft" }, `Merged by ${found[0].method}.`) : "";
  return h("div", {}, methods, h("div", { class: "sideways" }, drawn));
}
