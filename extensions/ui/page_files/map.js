// The hub as points on a plane, drawn on a canvas: the nearer, the more alike are the texts of two adapters.

import { ask, count, h, labelled, PALETTE, say } from "/dom.js";

const POLL = 500;
const GREY = "#9a9a9a";
// how far from a point a pointer may be, in pixels
const REACH = 14;

export function makeMap(signal, open) {
  const canvas = h("canvas", { tabindex: "0", role: "application", "aria-label": "Map of the adapters", "aria-describedby": "map-hint" });
  const tip = h("p", { class: "tip", hidden: true });
  const legend = h("ul", { class: "legend" });
  const note = h("p", { class: "soft", role: "status" }, "The map is being drawn …");
  const colour = h("select", {}, h("option", { value: "cluster" }, "cluster"), h("option", { value: "license" }, "license"), h("option", { value: "score" }, "search score"));
  const zoom = (factor, label, text) => h("button", { type: "button", "aria-label": label, onclick: () => { scaled(factor, canvas.clientWidth / 2, canvas.clientHeight / 2); } }, text);
  const place = h("section", { class: "map", "aria-label": "Map" },
    h("div", { class: "bar" }, labelled("Colour by", colour), h("span", { class: "zoom" }, zoom(1.5, "Zoom in", "+"), zoom(1 / 1.5, "Zoom out", "−"), h("button", { type: "button", onclick: reset }, "Reset"))),
    h("div", { class: "frame" }, canvas, tip), legend, note,
    h("p", { class: "soft", id: "map-hint" }, "Near points have texts that are alike. With the keyboard: arrows go from point to point, Enter opens, + and − zoom."));

  let data = null, view = { scale: 1, x: 0, y: 0 }, here = -1, asked = "", filters = {}, chosen = false;
  let scores = new Map();
  const names = new Map();

  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", draw, { signal });
  new ResizeObserver(draw).observe(canvas);
  colour.addEventListener("change", () => { chosen = true; paint(); });

  function place_(index) {
    const { x, y } = data.columns;
    const pad = 22, width = canvas.clientWidth - 2 * pad, height = canvas.clientHeight - 2 * pad;
    return [pad + (x[index] / 65535) * width * view.scale + view.x, pad + (1 - y[index] / 65535) * height * view.scale + view.y];
  }

  function shade(score) {
    const known = [...scores.values()];
    const low = Math.min(...known), high = Math.max(...known);
    const part = high > low ? (score - low) / (high - low) : 1;
    const [from, to] = dark.matches ? [[43, 66, 92], [158, 210, 255]] : [[188, 212, 234], [8, 48, 107]];
    return `rgb(${from.map((value, at) => Math.round(value + (to[at] - value) * part)).join(",")})`;
  }

  function draw() {
    if (!data || !canvas.clientWidth) return;
    const ratio = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    const size = data.count < 300 ? 5 : data.count < 5000 ? 3 : 1.5;
    const byScore = colour.value === "score";
    const column = data.columns[colour.value];
    const order = byScore ? [...data.columns.seq.keys()].sort((one, other) => (scores.get(data.columns.seq[one]) ?? -2) - (scores.get(data.columns.seq[other]) ?? -2)) : data.columns.seq.keys();
    for (const index of order) {
      const [left, top] = place_(index);
      const score = scores.get(data.columns.seq[index]);
      pen.fillStyle = byScore ? (score === undefined ? GREY : shade(score)) : PALETTE[column[index]] ?? GREY;
      pen.globalAlpha = byScore && score === undefined ? 0.35 : 1;
      if (size < 2) pen.fillRect(left - size, top - size, 2 * size, 2 * size);
      else {
        pen.beginPath();
        pen.arc(left, top, size, 0, 7);
        pen.fill();
        if (size > 3) { pen.lineWidth = 1; pen.strokeStyle = style.color; pen.globalAlpha *= 0.5; pen.stroke(); }
      }
    }
    pen.globalAlpha = 1;
    label(pen, style);
    if (here >= 0) {
      const [left, top] = place_(here);
      pen.beginPath();
      pen.arc(left, top, size + 4, 0, 7);
      pen.lineWidth = 2;
      pen.strokeStyle = style.color;
      pen.stroke();
    }
  }

  // names beside their points where there is room
  function label(pen, style) {
    const taken = [];
    pen.font = `11px ${style.fontFamily}`;
    pen.fillStyle = style.color;
    pen.textBaseline = "middle";
    data.names.forEach((name, index) => { const [left, top] = place_(index); taken.push([left - 6, top - 6, left + 6, top + 6]); });
    data.names.forEach((name, index) => {
      const text = name.length > 22 ? `${name.slice(0, 21)}…` : name;
      const [left, top] = place_(index);
      const width = pen.measureText(text).width;
      for (const from of [left + 9, left - 9 - width]) {
        const box = [from, top - 7, from + width, top + 7];
        const free = box[0] > 0 && box[2] < canvas.clientWidth && !taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1]);
        if (!free) continue;
        taken.push(box);
        pen.fillText(text, from, top);
        break;
      }
    });
  }

  function paint() {
    const entry = (text, background) => h("li", {}, h("span", { class: "swatch", style: { background } }), h("bdi", {}, text));
    if (data && colour.value === "score") {
      const known = [...scores.values()].sort((one, other) => other - one);
      legend.replaceChildren(...(known.length ? [entry(`${known[0].toFixed(2)} best`, shade(known[0])), entry(`${known.at(-1).toFixed(2)} of the ${known.length} nearest`, shade(known.at(-1)))] : [h("li", {}, "Search for something: points take the colour of their score.")]));
    } else if (data) {
      const [texts, before] = colour.value === "cluster" ? [data.clusters, "around "] : [data.licenses, ""];
      legend.replaceChildren(...texts.map((text, at) => entry(before + text, PALETTE[at])));
    }
    draw();
  }

  function near(left, top, accept = () => true) {
    let best = -1, least = Infinity;
    for (const index of data.columns.seq.keys()) {
      const [x, y] = place_(index);
      const far = (x - left) ** 2 + (y - top) ** 2;
      if (far < least && accept(x, y, index)) { best = index; least = far; }
    }
    return [best, Math.sqrt(least)];
  }

  async function nameOf(index) {
    const seq = data.columns.seq[index];
    if (data.names[index] !== undefined) return data.names[index];
    if (!names.has(seq)) names.set(seq, (await ask("point", { seq }, signal)).name);
    return names.get(seq);
  }

  async function go(index, loud) {
    here = index;
    draw();
    tip.hidden = index < 0;
    canvas.classList.toggle("over", index >= 0);
    if (index < 0) return;
    const name = await nameOf(index).catch((error) => error.message);
    if (index !== here) return;
    const [left, top] = place_(index);
    const score = scores.get(data.columns.seq[index]);
    tip.textContent = score === undefined ? name : `${name} (${score.toFixed(2)})`;
    tip.style.setProperty("top", `${top + 10}px`);
    tip.style.setProperty("left", `${Math.max(0, Math.min(left, canvas.clientWidth - tip.offsetWidth - 4))}px`);
    if (loud) say(tip.textContent);
  }

  function scaled(factor, left, top) {
    const scale = Math.max(1, Math.min(60, view.scale * factor));
    const grown = scale / view.scale;
    view = scale === 1 ? { scale, x: 0, y: 0 } : { scale, x: left - (left - view.x) * grown, y: top - (top - view.y) * grown };
    go(-1);
  }

  function reset() {
    view = { scale: 1, x: 0, y: 0 };
    go(-1);
  }

  let dragged = null;
  canvas.addEventListener("wheel", (event) => {
    if (!data || !(event.ctrlKey || document.activeElement === canvas)) return;
    event.preventDefault();
    scaled(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { dragged = { x: event.clientX, y: event.clientY, moved: false }; });
  canvas.addEventListener("pointermove", (event) => {
    if (!data) return;
    if (dragged && event.buttons && view.scale > 1) {
      view.x += event.clientX - dragged.x;
      view.y += event.clientY - dragged.y;
      dragged = { x: event.clientX, y: event.clientY, moved: true };
      draw();
      return;
    }
    const [index, far] = near(event.offsetX, event.offsetY);
    const found = far < REACH ? index : -1;
    if (found !== here) go(found);
  });
  canvas.addEventListener("pointerleave", () => { if (document.activeElement !== canvas) go(-1); });
  canvas.addEventListener("click", async () => {
    if (data && here >= 0 && !dragged?.moved) open(await nameOf(here));
  });
  canvas.addEventListener("keydown", async (event) => {
    if (!data || !data.count) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      event.preventDefault();
      const from = here < 0 ? [canvas.clientWidth / 2, canvas.clientHeight / 2] : place_(here);
      // within a quarter turn of the way that was asked for
      const ahead = (x, y, index) => {
        const [along, aside] = [(x - from[0]) * step[0] + (y - from[1]) * step[1], (x - from[0]) * step[1] + (y - from[1]) * step[0]];
        return here < 0 || (index !== here && along > 0 && Math.abs(aside) <= along);
      };
      const [index] = near(from[0], from[1], ahead);
      if (index >= 0) await go(index, true);
    } else if (event.key === "Enter" && here >= 0) open(await nameOf(here));
    else if (event.key === "+" || event.key === "-") scaled(event.key === "+" ? 1.5 : 1 / 1.5, canvas.clientWidth / 2, canvas.clientHeight / 2);
    else if (event.key === "Escape") go(-1);
  });

  return {
    place,
    // asks until the points are there; they come from a thread beside the server
    async load() {
      for (;;) {
        const found = await ask("map", {}, signal);
        if (found.columns) {
          const kinds = { seq: Uint32Array, x: Uint16Array, y: Uint16Array, cluster: Uint8Array, license: Uint8Array };
          const drawn = data;
          const columns = Object.fromEntries(Object.entries(kinds).map(([key, Kind]) => [key, new Kind(Uint8Array.from(atob(found.columns[key]), (one) => one.charCodeAt(0)).buffer)]));
          data = { ...found, columns };
          const sampled = found.count < found.placed ? `${count(found.count, "point")}, a sample of ` : "";
          const without = found.total - found.placed;
          const byWords = found.by_words ? ", placed by their words until the search has read all texts" : "";
          note.textContent = `${sampled}${count(found.placed, "adapter")}${without ? `; ${without} have no stored embedding` : ""}${byWords}.`;
          // the points have moved
          if (drawn && drawn.by_words !== found.by_words) go(-1);
          paint();
        }
        if (found.error) {
          note.className = "error";
          note.textContent = found.error;
        }
        if (!found.busy) return;
        await new Promise((resolve) => { setTimeout(resolve, POLL); });
      }
    },
    // colours the points by a search, or as before where there is none
    async found(q, shared) {
      [asked, filters] = [q, shared];
      scores = new Map();
      if (!chosen) colour.value = q ? "score" : "cluster";
      if (q) {
        // the table says what went wrong with a search
        const found = await ask("scores", { q, ...filters }, signal).catch(() => ({ seqs: [] }));
        if (asked !== q) return;
        scores = new Map(found.seqs.map((seq, at) => [seq, found.scores[at]]));
      }
      paint();
    },
  };
}
