// A router's view of a text: which adapter counts for which token.

import { ask, follow, h, labelled, named, within } from "/dom.js";
import { picks, tray } from "/picks.js";

export async function routeView(main, query, signal) {
  const { routers } = await ask("choices", {}, signal);
  if (!routers.length) {
    main.append(h("h1", {}, "Which adapter for which token"), h("p", { class: "lead" }, "No extension that is installed shows the weights of tokens; loraweave comes with one."));
    return;
  }
  const router = h("select", {}, ...routers.map((name) => h("option", { value: name, selected: name === "arrow" }, name)));
  const instruction = h("input", { maxlength: "20000" });
  const text = h("textarea", { required: true, maxlength: "20000", rows: "4", value: "Translate to German: The old king thanked the lawyer who had not lost seventeen letters." });
  const tokens = h("input", { type: "number", min: "0", max: "512", value: "0" });
  const go = h("button", { class: "primary" }, "Show the weights");
  const told = h("div", { "aria-live": "polite" });
  const frame = h("iframe", { title: "Which adapter counts for which token", hidden: true });
  let asking = new AbortController();
  signal.addEventListener("abort", () => asking.abort());
  const run = (event) => {
    event.preventDefault();
    asking.abort();
    asking = new AbortController();
    told.replaceChildren(h("p", { class: "soft" }, "Waiting for the model …"));
    within(told, async () => {
      const body = { names: picks(), router: router.value, instruction: instruction.value, text: text.value, max_new_tokens: Number(tokens.value) || 0 };
      await follow("route", body, asking.signal, (found) => {
        if (found.what) told.replaceChildren(h("p", { class: "soft" }, `${found.what} …`));
        if (!found.page) return;
        told.replaceChildren(shares(found.shares));
        frame.hidden = false;
        frame.src = `/explanation/${found.page}`;
      });
    });
  };
  frame.addEventListener("load", () => {
    const shown = frame.contentDocument?.body;
    if (!shown) return;
    // as high as what it shows, so that only one thing scrolls
    new ResizeObserver(() => frame.style.setProperty("height", `${frame.contentDocument.documentElement.scrollHeight + 4}px`)).observe(shown);
  });
  const many = picks().length;
  main.append(
    h("h1", {}, "Which adapter for which token"),
    h("p", { class: "lead" }, many ? "A router weighs the picked adapters for every token of a text, in every layer." : "A router weighs adapters for every token of a text, in every layer. None is picked, so the eight that fit the text best take part."),
    tray(signal),
    h("form", { class: "card", onsubmit: run },
      labelled("Instruction (may be empty)", instruction), labelled("Text", text),
      h("div", { class: "row" }, labelled("Router", router), labelled("Tokens of its answer", tokens, { class: "short" }), go)),
    told, frame);
}

function shares(found) {
  const ordered = [...found].sort((one, other) => other.share - one.share);
  return h("ol", { class: "shares", "aria-label": "Share of all weight" }, ...ordered.map(({ name, share }) => h("li", {}, named(name), h("span", { class: "meter", style: { "--part": `${100 * share}%` } }, `${(100 * share).toFixed(0)} %`))));
}
