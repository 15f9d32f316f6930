// A value for each layer as a grid: a row for each kind of layer, a column for each block.

import { h, say } from "/dom.js";

// `shade(value)` is a colour, `tell(value)` what is said of a cell
export function heat(title, { blocks, kinds, values }, shade, tell) {
  const told = h("p", { class: "told", "aria-live": "polite" }, "Point at a cell, or go there with the arrow keys.");
  const cells = values.map((row, at) => row.map((value, block) => h("td", {
    class: value === null ? "absent" : "",
    style: value === null ? {} : { background: shade(value) },
    onpointerenter: () => choose(at, block),
  }, h("span", { class: "unseen" }, value === null ? "none" : tell(value)))));
  const short = shortened(kinds);
  const table = h("table", { class: "heat", tabindex: "0", "aria-label": title },
    h("thead", {}, h("tr", {}, h("td", {}), ...blocks.map((block, at) => h("th", { scope: "col", title: block }, label(block, at, blocks.length))))),
    h("tbody", {}, ...cells.map((row, at) => h("tr", {}, h("th", { scope: "row", title: kinds[at] }, short[at]), ...row))));
  let here = [0, -1];
  function choose(row, column) {
    cells[here[0]]?.[here[1]]?.classList.remove("here");
    here = [Math.max(0, Math.min(kinds.length - 1, row)), Math.max(0, Math.min(blocks.length - 1, column))];
    cells[here[0]][here[1]].classList.add("here");
    const value = values[here[0]][here[1]];
    const layer = blocks[here[1]] === kinds[here[0]] ? kinds[here[0]] : `${blocks[here[1]]}.${kinds[here[0]]}`;
    told.textContent = `${layer}: ${value === null ? "not updated" : tell(value)}`;
  }
  table.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(here[0] + step[0], here[1] + step[1]);
    cells[here[0]][here[1]].scrollIntoView({ block: "nearest", inline: "nearest" });
    say(told.textContent);
  });
  return h("div", {}, h("div", { class: "sideways" }, table), told);
}

// every fifth number where there are many blocks
function label(block, at, many) {
  const found = block.match(/(\d+)$/);
  return many <= 12 || at % 5 === 0 ? (found ? found[1] : block) : "";
}

function shortened(kinds) {
  const last = kinds.map((kind) => kind.split(".").at(-1));
  return new Set(last).size === kinds.length ? last : kinds;
}

// full at `most`
export function blues(most) {
  return (value) => `rgb(0 114 178 / ${(0.08 + 0.92 * (value / (most || 1))).toFixed(3)})`;
}

export function oranges(most) {
  return (value) => `rgb(213 94 0 / ${(0.06 + 0.94 * Math.min(1, value / (most || 1))).toFixed(3)})`;
}

// blue above 0, orange below
export function bothWays(most) {
  return (value) => (value < 0 ? oranges(most)(-value) : blues(most)(value));
}
