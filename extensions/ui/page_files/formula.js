// A formula, and "Copy as": it as text, Python, a shell command or a request, onto the clipboard and into sight.

import { h, say, send, within } from "/dom.js";

const KINDS = [["python", "Python"], ["shell", "shell"], ["formula", "formula"], ["curl", "curl"]];

// `asked()` is what Python and curl ask: an instruction, a text, a number of tokens. Weights by block have no formula, but
// `parts`, and are copied as Python alone
export function formulaShown(formula, asked, signal, short = formula, parts = []) {
  const shown = h("div", {});
  const copy = (kind, title) => within(shown, async () => {
    const text = (await send("copied", { formula, parts, ...asked() }, signal))[kind];
    const told = h("p", { class: "soft" });
    shown.replaceChildren(told, h("pre", { tabindex: "0", "aria-label": `As ${title}` }, text));
    try {
      await navigator.clipboard.writeText(text);
      told.textContent = `Copied as ${title}.`;
    } catch {
      getSelection().selectAllChildren(shown.lastChild);
      told.textContent = "The browser gives no clipboard: the text is selected, copy it by hand.";
    }
    say(told.textContent);
  });
  return h("div", { class: "copies" }, h("p", {}, formula ? h("code", { class: "formula", title: formula }, short) : short),
    h("div", { class: "row", role: "group", "aria-label": "Copy as" }, h("span", { class: "soft" }, "Copy as"), ...KINDS.filter(([kind]) => formula || kind === "python").map(([kind, title]) => h("button", { type: "button", "aria-label": `Copy as ${title}`, onclick: () => copy(kind, title) }, title))),
    shown);
}
