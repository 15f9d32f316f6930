// A router's view of a text: which adapter counts for which token.

import { ask, follow, h, labelled, named, PALETTE, say, send, within } from "/dom.js";
import { formulaShown } from "/formula.js";
import { picks, tray } from "/picks.js";

export async function routeView(main, query, signal) {
  const { routers } = await ask("choices", {}, signal);
  if (!routers.length) {
    main.append(h("h1", {}, "Which adapter for which token"), h("p", { class: "lead" }, "No extension that is installed shows the weights of tokens; loraweave comes with one."));
    return;
  }
  const router = h("select", {}, ...routers.map((name) => h("option", { value: name, selected: name === "arrow" }, name)));
  const names = picks();
  const about = names.length ? await send("picked", { names }, signal) : { instruction: "Negate the sentence.", text: "The old king thanked the lawyer." };
  const instruction = h("input", { maxlength: "20000", value: about.instruction });
  const text = h("textarea", { required: true, maxlength: "20000", rows: "3", value: about.text });
  const tokens = h("input", { type: "number", min: "0", max: "512", value: "24" });
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
      const body = { names: picks(), router: router.value, instruction: instruction.value, text: text.value, max_new_tokens: Math.max(0, Math.min(512, Number(tokens.value) || 0)) };
      await follow("route", body, asking.signal, (found) => {
        if (found.what) told.replaceChildren(h("p", { class: "soft" }, `${found.what} …`));
        if (!found.page) return;
        const order = [...found.shares].sort((one, other) => other.share - one.share);
        const asked = { instruction: body.instruction, text: body.text, max_new_tokens: body.max_new_tokens || 24 };
        told.replaceChildren(shares(order), body.max_new_tokens ? answered(found.answer, order) : "", formulaShown(found.formula, () => asked, signal));
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
  main.append(
    h("h1", {}, "Which adapter for which token"),
    h("p", { class: "lead" }, names.length ? "A router weighs the picked adapters for every token of a text, in every layer." : "A router weighs adapters for every token of a text, in every layer. None is picked, so the eight that fit the text best take part."),
    tray(signal),
    h("form", { class: "card", onsubmit: run },
      labelled("Instruction (may be empty)", instruction), labelled("Text", text),
      h("div", { class: "row" }, labelled("Router", router), labelled("Tokens of its answer", tokens, { class: "short" }), go)),
    told, frame);
}

function shade(at) {
  return PALETTE[Math.min(at, PALETTE.length - 1)];
}

function shares(order) {
  return h("ol", { class: "shares", "aria-label": "Share of all weight" }, ...order.map(({ name, share }, at) => h("li", {}, h("span", { class: "swatch", style: { background: shade(at) } }), named(name), h("span", { class: "meter", style: { "--part": `${100 * share}%` } }, `${(100 * share).toFixed(0)} %`))));
}

// the answer, each token in the colour of the adapter that counted most as the model read it
function answered(tokens, order) {
  if (!tokens.length) return h("p", {}, "The answer is empty: the model ended it at once.");
  const hint = "Point at a token, or go there with the arrow keys, for the adapters that count.";
  const told = h("p", { class: "told" }, hint);
  const strongest = tokens.map(({ shares: of }) => order.map(({ name }, at) => [of[name] ?? 0, name, at]).sort((one, other) => other[0] - one[0]));
  const pieces = tokens.map(({ token }, place) => {
    const [part, , at] = strongest[place][0];
    return h("span", { class: "piece", style: part ? { "--colour": shade(at), "--part": `${(12 + 38 * part).toFixed(0)}%` } : {}, onpointerenter: () => choose(place) }, token);
  });
  let here = -1;
  function choose(place) {
    pieces[here]?.classList.remove("here");
    here = place;
    pieces[here]?.classList.add("here");
    const counting = here < 0 ? [] : strongest[here].filter(([part]) => part >= 0.005).slice(0, 4);
    told.textContent = here < 0 ? hint : `${JSON.stringify(tokens[here].token)}: ${counting.map(([part, name]) => `${name} ${(100 * part).toFixed(0)} %`).join(", ") || "no adapter"}`;
  }
  const text = h("p", { class: "answer", tabindex: "0", role: "group", "aria-label": "The answer, token by token" }, ...pieces);
  text.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (event.key === "Escape") choose(-1);
    if (!step) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(pieces.length - 1, here + step)));
    say(told.textContent);
  });
  return h("section", { class: "card" }, h("h2", {}, "The answer"), text, told);
}
