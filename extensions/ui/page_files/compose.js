// A mixture by sliders: both answers side by side, how the updates agree, weights from examples, saving and exporting.

import { adapterLink, ask, count, debounced, follow, h, labelled, named, number, say, send, within } from "/dom.js";
import { formulaShown } from "/formula.js";
import { blues, bothWays, heat, oranges } from "/heat.js";
import { MOST, pick, picks } from "/picks.js";

const LEAST = -1.5, LARGEST = 1.5;
const KEY = "loraweave.mixture";

export async function composeView(main, query, signal) {
  const names = picks();
  main.append(h("div", { class: "title" }, h("h1", {}, "Compose"), adder(names, signal)));
  if (!names.length) {
    main.append(h("p", { class: "empty" }, "No adapter is picked yet. Pick two to eight of them ", h("a", { href: "#/" }, "in the table"), ", or add one by its name above."));
    return;
  }
  const [about, choices] = await Promise.all([send("picked", { names }, signal), ask("choices", {}, signal)]);
  const mixture = new Mixture(names, about.blocks);
  const parts = { mixture, about, choices, signal, formula: h("div", {}) };
  const answers = tryOut(parts);
  const agreement = agree(parts, answers.task);
  main.append(h("div", { class: "bench" },
    h("div", {}, sliders(parts), search(parts, answers.task)),
    h("div", {}, answers.place, agreement, keep(parts, answers.task))));
  mixture.changed();
}

// the weights as they stand; whoever watches is told of changes
class Mixture {
  constructor(names, blocks) {
    let kept = {};
    try { kept = JSON.parse(sessionStorage.getItem(KEY) ?? "{}"); } catch { /* as if nothing were kept */ }
    this.blocks = blocks;
    this.parts = names.map((name) => {
      const own = kept[name];
      const known = own && typeof own.weight === "number" && typeof own.blocks === "object";
      return { name, weight: known ? own.weight : Number((1 / names.length).toFixed(2)), blocks: known ? own.blocks : {} };
    });
    this.watching = [];
  }

  set(part, weight) {
    Object.assign(part, { weight, blocks: {} });
    this.changed();
  }

  setBlock(part, block, weight) {
    if (!Object.keys(part.blocks).length) this.blocks.forEach((each) => { part.blocks[each] = part.weight; });
    part.blocks[block] = weight;
    const all = Object.values(part.blocks);
    part.weight = all.reduce((sum, each) => sum + each, 0) / all.length;
    this.changed();
  }

  changed() {
    sessionStorage.setItem(KEY, JSON.stringify(Object.fromEntries(this.parts.map(({ name, weight, blocks }) => [name, { weight, blocks }]))));
    this.watching.forEach((told) => told());
  }

  // the formula as the name of a file
  get title() {
    const parts = [...this.parts].sort((one, other) => (one.name < other.name ? -1 : 1));
    const differs = parts.some(({ blocks }) => Object.keys(blocks).length);
    const terms = differs ? parts.map(({ name }) => name) : parts.filter(({ weight }) => weight).map(({ name, weight }) => `${number(weight)} ${name}`);
    const text = `${terms.join(" + ").replaceAll("+ -", "- ")}${differs ? " by block" : ""}`;
    return text.replace(/[^\p{L}\p{N} .+_-]/gu, "_").slice(0, 100).trim();
  }

  get asked() {
    return this.parts.map(({ name, weight, blocks }) => ({ name, weight, blocks }));
  }
}

function adder(names, signal) {
  const list = h("datalist", { id: "known" });
  const box = h("input", { list: "known", placeholder: "Name or purpose", autocomplete: "off", disabled: names.length >= MOST });
  const told = h("span", {});
  box.addEventListener("input", debounced(150, async () => {
    if (box.value.trim().length < 2) return;
    const found = await ask("search", { q: box.value, count: 8 }, signal).catch(() => ({ rows: [] }));
    list.replaceChildren(...found.rows.map((row) => h("option", { value: row.name }, row.description)));
  }));
  const add = async (event) => {
    event.preventDefault();
    await within(told, async () => {
      await ask("adapter", { name: box.value.trim() }, signal);
      pick(box.value.trim(), true);
      window.dispatchEvent(new HashChangeEvent("hashchange"));
    });
  };
  return h("form", { class: "adder", onsubmit: add }, labelled("Add an adapter", box), list, h("button", { disabled: names.length >= MOST }, "Add"), told);
}

function sliders({ mixture, about, formula }) {
  const rows = mixture.parts.map((part) => {
    const id = `weight-${mixture.parts.indexOf(part)}`;
    const slider = h("input", { type: "range", id, list: "ticks", min: LEAST, max: LARGEST, step: "0.01", "aria-label": `Weight of ${part.name}`, oninput: () => mixture.set(part, Number(slider.value)) });
    const exact = h("input", { type: "number", step: "any", min: "-100", max: "100", "aria-label": `Exact weight of ${part.name}`, onchange: () => mixture.set(part, Number(exact.value) || 0) });
    const ofBlocks = mixture.blocks.map((block, at) => {
      const own = h("input", { type: "range", min: LEAST, max: LARGEST, step: "0.01", "aria-label": `Weight of ${part.name} in ${block}`, oninput: () => mixture.setBlock(part, block, Number(own.value)) });
      const value = h("output", {});
      return { block, own, value, place: h("div", { class: "block" }, h("span", { title: block }, block.match(/\d+$/)?.[0] ?? block), own, value), at };
    });
    const state = h("span", { class: "soft" });
    mixture.watching.push(() => {
      slider.value = part.weight;
      if (document.activeElement !== exact) exact.value = number(part.weight);
      ofBlocks.forEach(({ block, own, value }) => {
        const weight = part.blocks[block] ?? part.weight;
        own.value = weight;
        own.setAttribute("aria-valuetext", number(weight));
        value.textContent = number(weight);
      });
      state.textContent = Object.keys(part.blocks).length ? "differs by block" : "";
    });
    const leave = h("button", { type: "button", class: "plain", "aria-label": `Take ${part.name} out`, onclick: () => { pick(part.name, false); window.dispatchEvent(new HashChangeEvent("hashchange")); } }, "×");
    return h("li", {},
      h("div", { class: "head" }, adapterLink(part.name), state, leave),
      h("div", { class: "slide" }, slider, exact),
      mixture.blocks.length > 1 ? h("details", {}, h("summary", {}, "Blocks"), h("div", { class: "blocks" }, ...ofBlocks.map(({ place }) => place))) : "");
  });
  const all = (weight) => () => { mixture.parts.forEach((part) => Object.assign(part, { weight, blocks: {} })); mixture.changed(); };
  const clash = new Set(Object.values(about.licenses).filter(Boolean)).size > 1;
  return h("section", { class: "card first" }, h("h2", {}, "Weights"), h("datalist", { id: "ticks" }, ...[-1, 0, 1].map((value) => h("option", { value }))),
    h("ul", { class: "weights" }, ...rows),
    h("div", { class: "row" }, h("button", { type: "button", onclick: all(Number((1 / mixture.parts.length).toFixed(2))) }, "Equal shares"), h("button", { type: "button", onclick: all(0) }, "All zero"), h("button", { type: "button", onclick: all(1) }, "All one")),
    formula,
    clash && h("p", { class: "soft" }, `Licenses: ${[...new Set(Object.values(about.licenses))].filter(Boolean).join(", ")}.`));
}

function tryOut({ mixture, about, signal }) {
  const instruction = h("input", { value: about.instruction, maxlength: "20000" });
  const text = h("textarea", { value: about.text, maxlength: "20000", rows: "3" });
  const tokens = h("input", { type: "number", min: "1", max: "512", value: "24" });
  const chat = h("input", { type: "checkbox" });
  const said = { base: h("p", { class: "answer" }), composition: h("p", { class: "answer" }) };
  const state = h("p", { class: "soft", role: "status" });
  const task = () => ({ instruction: instruction.value, text: text.value, chat: chat.checked, max_new_tokens: Math.max(1, Math.min(512, Number(tokens.value) || 24)) });
  let asking = new AbortController();
  signal.addEventListener("abort", () => asking.abort());
  const ask_ = async () => {
    asking.abort();
    asking = new AbortController();
    const own = asking.signal;
    if (!text.value) {
      state.replaceChildren("Write an input to see what both say.");
      both.removeAttribute("aria-busy");
      return;
    }
    state.replaceChildren("Waiting for the model …");
    let begun = false;
    const begin = () => {
      if (begun) return;
      begun = true;
      Object.values(said).forEach((place) => place.replaceChildren());
      state.replaceChildren("Answering …");
    };
    await within(state, async () => {
      await follow("answer", { parts: mixture.asked, ...task() }, own, (event) => {
        if (event.what) state.replaceChildren(`${event.what} …`);
        if (event.base === undefined) return;
        begin();
        Object.entries(said).forEach(([key, place]) => place.append(place.textContent ? event[key] : event[key].trimStart()));
      });
      begin();
      const same = said.base.textContent === said.composition.textContent;
      state.replaceChildren(same ? "Both say the same." : "");
    });
    if (!own.aborted) both.removeAttribute("aria-busy");
  };
  const both = h("div", { class: "side", "aria-busy": "true" }, h("div", {}, h("h3", {}, "Base model"), said.base), h("div", {}, h("h3", {}, "Composition"), said.composition));
  const soon = debounced(200, ask_);
  const later = () => {
    // what is there is of other weights
    both.setAttribute("aria-busy", "true");
    soon();
  };
  mixture.watching.push(later);
  [instruction, text, tokens, chat].forEach((control) => control.addEventListener("input", later));
  const place = h("section", { class: "card second" }, h("h2", {}, "Both answers"),
    h("div", { class: "asked" }, labelled("Instruction (empty: the input is the whole prompt)", instruction), labelled("Input", text), h("div", { class: "row" }, labelled("Tokens at most", tokens, { class: "short" }), h("label", { class: "inline" }, chat, h("span", {}, "ask in the chat template")))),
    both, state);
  return { place, task };
}

function agree({ mixture, signal, formula }, task) {
  const shown = h("select", {});
  const place = h("div", {}, h("p", { class: "soft" }, "Reading the factors …"));
  let asking = new AbortController();
  signal.addEventListener("abort", () => asking.abort());
  const ask_ = debounced(300, () => {
    asking.abort();
    asking = new AbortController();
    within(place, async () => {
      const found = await send("mixed", { parts: mixture.asked }, asking.signal);
      const most = Math.max(...found.norms);
      const cells = (row) => found.names.map((_, at) => h("td", { style: { background: bothWays(1)(row[at]) } }, h("span", { class: "figure" }, row[at].toFixed(2))));
      const map = h("div", {});
      const several = found.names.length > 1;
      const kinds = [
        ...(several ? [["entries whose signs conflict", found.conflict, () => oranges(1), (value) => `signs conflict in ${(100 * value).toFixed(0)} % of the entries`],
          ["cosine, mean over pairs", found.agreement, (largest) => bothWays(largest), (value) => `mean cosine ${number(value)}`]] : []),
        ...found.names.map((name, at) => [`norm of ${name}`, found.shares[at], (largest) => blues(largest), (value) => `norm ${number(value)}`]),
      ];
      const draw = () => {
        const [title, grid, shade, tell] = kinds[Number(shown.value)] ?? kinds[0];
        const largest = Math.max(...grid.values.flat().map((value) => Math.abs(value ?? 0)), 1e-9);
        map.replaceChildren(heat(title, grid, shade(largest), tell));
      };
      const kept = shown.value;
      shown.replaceChildren(...kinds.map(([title], at) => h("option", { value: String(at) }, title)));
      shown.value = kinds[Number(kept)] ? kept || "0" : "0";
      shown.onchange = draw;
      formula.replaceChildren(found.formula ? formulaShown(found.formula, task, signal, found.shown) : formulaShown("", task, signal, "Weights differ by block, so that no formula has them: save the mixture, whose formula is its name.", mixture.asked));
      place.replaceChildren(
        h("h3", {}, "Cosines of the weighted updates"),
        h("div", { class: "sideways", tabindex: "0", role: "region", "aria-label": "Cosines" }, h("table", { class: "cosines" },
          h("thead", {}, h("tr", {}, h("td", {}), ...found.names.map((_, at) => h("th", { scope: "col" }, String(at + 1))), h("th", { scope: "col" }, "norm"))),
          h("tbody", {}, ...found.names.map((name, at) => h("tr", {}, h("th", { scope: "row" }, `${at + 1} `, named(name)), ...cells(found.cosines[at]), h("td", {}, h("span", { class: "meter", style: { "--part": `${(100 * found.norms[at]) / (most || 1)}%` } }, number(found.norms[at])))))))),
        h("h3", {}, "Layer by layer"), labelled("Show", shown, { class: "medium" }), map);
      draw();
    });
  });
  mixture.watching.push(ask_);
  return h("section", { class: "card third" }, h("h2", {}, "Interference"), place);
}

function search({ mixture, signal }, task) {
  const rows = h("tbody", {});
  const add = (input = "", output = "") => {
    const at = rows.children.length + 1;
    const made = h("tr", {}, h("td", {}, h("input", { value: input, "aria-label": `Input ${at}` })), h("td", {}, h("input", { value: output, "aria-label": `Output ${at}` })));
    // lines of a spreadsheet are rows
    made.addEventListener("paste", (event) => {
      const pasted = event.clipboardData.getData("text");
      if (!/[\t\n]/.test(pasted.trim())) return;
      event.preventDefault();
      const lines = pasted.trim().split(/\r?\n/).map((line) => line.split("\t"));
      const [mine, ...rest] = lines;
      [...made.querySelectorAll("input")].forEach((box, place) => { box.value = mine[place] ?? ""; });
      rest.forEach(([one, other]) => add(one, other ?? ""));
    });
    rows.append(made);
  };
  for (let at = 0; at < 3; at++) add();
  const per = h("select", {}, h("option", { value: "adapter" }, "each adapter"), ...(mixture.blocks.length > 1 ? [h("option", { value: "block" }, "each adapter and block")] : []));
  const heldOut = h("input", { type: "checkbox" });
  const told = h("div", { "aria-live": "polite" });
  const bar = h("progress", { max: "1", "aria-label": "Search of weights" });
  const start = h("button", { class: "primary" }, "Find weights");
  const stop = h("button", { type: "button", hidden: true }, "Stop");
  let searching = new AbortController();
  signal.addEventListener("abort", () => searching.abort());
  stop.addEventListener("click", () => {
    searching.abort();
    told.replaceChildren(h("p", {}, "Stopped; the weights are as they were."));
    say("stopped");
  });
  const run = async (event) => {
    event.preventDefault();
    searching = new AbortController();
    const line = h("p", { class: "soft" }, "Waiting for the model …");
    told.replaceChildren(bar, line);
    bar.removeAttribute("value");
    [start.hidden, stop.hidden] = [true, false];
    stop.focus();
    await within(told, async () => {
      const examples = [...rows.children].map((row) => [...row.querySelectorAll("input")].map((box) => box.value)).filter(([input, output]) => input || output);
      if (!examples.length) throw new Error("There is no example yet: write an input and the output that you want for it, better three or more.");
      const { instruction, chat } = task();
      const body = { names: mixture.parts.map(({ name }) => name), instruction, examples, chat, per: per.value, held_out: heldOut.checked };
      await follow("find", body, searching.signal, (found) => {
        if (found.total) bar.value = found.done / found.total;
        if (found.what) line.textContent = `${found.what} …${found.seconds_left ? ` about ${count(Math.ceil(found.seconds_left), "second")} left` : ""}`;
        if (!found.parts) return;
        found.parts.forEach((part, at) => Object.assign(mixture.parts[at], part));
        mixture.changed();
        told.replaceChildren(compared(found));
      });
    });
    [start.hidden, stop.hidden] = [false, true];
    if (document.activeElement === document.body) start.focus();
  };
  return h("section", { class: "card" }, h("h2", {}, "Find weights from examples"),
    h("form", { onsubmit: run },
      h("table", { class: "examples" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Input"), h("th", { scope: "col" }, "Output"))), rows),
      h("div", { class: "row" }, h("button", { type: "button", onclick: () => add() }, "Add a row"), h("span", { class: "soft" }, "or paste two columns")),
      h("div", { class: "row" }, labelled("A weight for", per), h("label", { class: "inline" }, heldOut, h("span", {}, "compare on held-out examples (four times as long)"))),
      h("div", { class: "row" }, start, stop)),
    told);
}

function compared({ rows, reason }) {
  const figure = (value) => (value === null ? "–" : value.toFixed(3));
  return h("div", {}, h("p", {}, `The sliders are where the search ended. ${reason[0].toUpperCase()}${reason.slice(1)}.`),
    h("table", {}, h("thead", {}, h("tr", {}, ...["Way", "Loss", "Held out"].map((title, at) => h("th", { scope: "col", class: at ? "" : "left" }, title)))),
      h("tbody", {}, ...rows.map((row) => h("tr", { class: row.chosen ? "chosen" : "" }, h("td", { class: "left" }, row.name.replaceAll("_", " ")), h("td", {}, figure(row.loss)), h("td", {}, figure(row.held_out_loss)))))));
}

function keep({ mixture, choices, signal }, task) {
  const name = h("input", { required: true, maxlength: "1024" });
  const replace = h("input", { type: "checkbox" });
  const target = h("select", {}, ...choices.targets.map((each) => h("option", { value: each, selected: each === "peft" }, each)));
  const licenses = h("input", { type: "checkbox" });
  const told = h("div", { "aria-live": "polite" });
  const body = () => ({ parts: mixture.asked, instruction: task().instruction, allow_licenses: licenses.checked });
  const waiting = () => told.replaceChildren(h("p", { class: "soft" }, "Working …"));
  const save = (event) => {
    event.preventDefault();
    waiting();
    within(told, () => follow("save", { ...body(), name: name.value, replace: replace.checked }, signal, (found) => {
      if (found.formula) told.replaceChildren(h("p", {}, "Saved. Formulas and servers know it by its name:"), formulaShown(found.formula, task, signal));
    }));
  };
  const download = () => {
    waiting();
    within(told, async () => {
      const response = await send("export", { ...body(), target: target.value }, signal);
      const file = `${mixture.title} (${target.value}).zip`;
      const link = h("a", { href: URL.createObjectURL(await response.blob()), download: file });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
      told.replaceChildren(h("p", {}, `“${file}” is in your downloads.`));
    });
  };
  return h("section", { class: "card" }, h("h2", {}, "Keep it"),
    h("form", { class: "row", onsubmit: save }, labelled("Name in the hub", name), h("label", { class: "inline" }, replace, h("span", {}, "replace")), h("button", {}, "Save")),
    h("div", { class: "row" }, labelled("Export for", target), h("button", { type: "button", onclick: download }, "Download")),
    h("label", { class: "inline" }, licenses, h("span", {}, "also where licenses exclude each other")), told);
}
