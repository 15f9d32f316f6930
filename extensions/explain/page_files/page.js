"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { tokens, layers, experts, colours } = data;
  const T = tokens.length, L = layers.length, E = experts.length;
  const weights = unpacked(data.weights, T * L * E);
  const at = (id) => document.getElementById(id);
  const ROW = 14;
  const column = Math.max(4, Math.min(18, Math.floor(900 / T)));
  const allLayers = layers.map((_, index) => index);
  const rowsOf = {
    layers: layers.map((name, index) => [name, [index]]),
    blocks: data.blocks,
    kinds: data.kinds,
  };
  // the map as it is painted once, without the frame around the cell that is shown
  const map = document.createElement("canvas");
  let rows = [];
  // the chosen layers, the mean weights of which colour the text
  let chosen = { name: "all layers", members: allLayers };
  let held = null;
  let shown = null;

  function bytes(text) {
    return Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
  }

  function numbers(text, method, size) {
    const view = new DataView(bytes(text));
    return Array.from({ length: view.byteLength / size }, (_, index) => view[method](index * size, true));
  }

  function unpacked(packed, size) {
    const values = numbers(packed.values, "getFloat32", 4);
    if (packed.places === null) return Float32Array.from(values);
    const found = new Float32Array(size);
    numbers(packed.places, "getInt32", 4).forEach((place, index) => { found[place] = values[index]; });
    return found;
  }

  // the mean over those of the layers that see the token; NaN where none does
  function meanOver(members, token) {
    const sums = new Float64Array(E);
    let seen = 0;
    for (const layer of members) {
      const begin = (token * L + layer) * E;
      if (Number.isNaN(weights[begin])) continue;
      seen += 1;
      for (let expert = 0; expert < E; expert++) sums[expert] += weights[begin + expert];
    }
    return sums.map((sum) => sum / seen);
  }

  function strongest(of) {
    let best = -1, total = 0;
    of.forEach((weight, expert) => {
      const size = Math.abs(weight) || 0;
      total += size;
      if (size > 0 && (best < 0 || size > Math.abs(of[best]))) best = expert;
    });
    return { best, share: total ? Math.abs(of[best]) / total : 0 };
  }

  // what a cell shows: its strongest expert, or the share of the one that was picked
  function look(of) {
    const only = at("expert").value;
    const found = strongest(of);
    if (only === "") return found;
    const total = of.reduce((sum, weight) => sum + (Math.abs(weight) || 0), 0);
    return { best: total ? Number(only) : -1, share: total ? (Math.abs(of[Number(only)]) || 0) / total : 0 };
  }

  // full where the share is the highest of all that are shown beside it
  function colour(found, highest) {
    if (found.best < 0) return "transparent";
    const [faintest, fullest] = data.fullness;
    const fullness = faintest + (fullest - faintest) * (found.share / highest || 0);
    const [red, green, blue] = [1, 3, 5].map((place) => parseInt(colours[found.best].slice(place, place + 2), 16));
    return `rgba(${red},${green},${blue},${fullness})`;
  }

  // as few digits as tell an fp32 number from its neighbours; means are rounded
  function digits(value, exact) {
    if (Number.isNaN(value)) return "not seen";
    if (!exact) return String(Number(value.toPrecision(6)));
    for (let count = 1; count < 9; count++) {
      const text = value.toPrecision(count);
      if (Math.fround(Number(text)) === value) return String(Number(text));
    }
    return String(Number(value.toPrecision(9)));
  }

  function element(kind, text, parent, name) {
    const made = document.createElement(kind);
    made.textContent = text;
    if (name) made.className = name;
    parent.append(made);
    return made;
  }

  function named(row, expert) {
    element("td", String(expert + 1), row);
    const cell = element("td", "", row, "name");
    element("span", "", cell, "swatch").style.background = colours[expert];
    element("bdi", experts[expert], cell);
  }

  function header(table, names) {
    table.replaceChildren();
    const row = element("tr", "", element("thead", "", table));
    names.forEach((name) => { element("th", name, row, name === "expert" ? "name" : "").scope = "col"; });
    return element("tbody", "", table);
  }

  function placeOf(row) {
    return rows.findIndex((other) => other.name === row.name);
  }

  function showCell(row, token) {
    if (shown && shown.row === row && shown.token === token) return;
    shown = { row, token };
    const { name, members } = row;
    const of = meanOver(members, token);
    const where = at("where");
    where.replaceChildren();
    element("span", `Token ${token} `, where);
    element("bdi", JSON.stringify(tokens[token]), where);
    element("span", ", ", where);
    element("bdi", members.length > 1 ? `${name} (mean over ${members.length})` : name, where);
    const body = header(at("weights"), ["#", "expert", "weight"]);
    const order = [...of.keys()].sort((one, other) => Math.abs(of[other]) - Math.abs(of[one]) || one - other);
    const largest = Math.max(...of.map(Math.abs)) || 1;
    for (const expert of order) {
      const line = element("tr", "", body, of[expert] ? "" : "none");
      named(line, expert);
      const value = element("td", digits(of[expert], members.length === 1), line, "bar");
      value.style.setProperty("--part", `${(100 * Math.abs(of[expert])) / largest || 0}%`);
    }
    at("text").querySelectorAll(".here").forEach((old) => old.classList.remove("here"));
    at("text").children[token].classList.add("here");
    at("names").querySelectorAll(".here").forEach((old) => old.classList.remove("here"));
    const number = placeOf(row);
    if (number >= 0) at("names").children[number].classList.add("here");
    paint(number, token);
  }

  function paintText() {
    const looks = tokens.map((_, token) => look(meanOver(chosen.members, token)));
    const highest = Math.max(...looks.map((found) => found.share));
    looks.forEach((found, token) => {
      const span = at("text").children[token];
      span.style.background = colour(found, highest);
      span.querySelectorAll("sub").forEach((old) => old.remove());
      if (found.best >= 0) element("sub", String(found.best + 1), span);
    });
  }

  function paintMap() {
    map.width = T * column;
    map.height = rows.length * ROW;
    const drawn = map.getContext("2d");
    const looks = rows.map(({ members }) => tokens.map((_, token) => {
      const of = meanOver(members, token);
      return Number.isNaN(of[0]) ? null : look(of);
    }));
    const highest = looks.flat().reduce((most, found) => Math.max(most, found ? found.share : 0), 0);
    looks.forEach((line, number) => line.forEach((found, token) => {
      drawn.fillStyle = found ? colour(found, highest) : "#d9d9d9";
      drawn.fillRect(token * column, number * ROW, column - (column > 5 ? 1 : 0), ROW - 1);
    }));
  }

  function paint(hereRow, hereToken) {
    const drawn = at("cells").getContext("2d");
    drawn.clearRect(0, 0, map.width, map.height);
    drawn.drawImage(map, 0, 0);
    if (hereRow >= 0) {
      drawn.lineWidth = 2;
      drawn.strokeStyle = "#000";
      drawn.strokeRect(hereToken * column, hereRow * ROW, column - 1, ROW - 1);
    }
  }

  function showRows() {
    rows = rowsOf[at("rows").value].map(([name, members]) => ({ name, members }));
    const names = at("names");
    names.replaceChildren();
    for (const row of rows) {
      const button = element("button", "", names);
      button.type = "button";
      element("bdi", row.name.startsWith(data.prefix) ? row.name.slice(data.prefix.length) : row.name, button);
      button.title = row.name;
      button.addEventListener("click", () => choose(row));
    }
    paintMap();
    at("cells").width = map.width;
    at("cells").height = map.height;
    paint(-1, 0);
  }

  function showLoad() {
    const share = new Float64Array(E), count = new Float64Array(E), sum = new Float64Array(E);
    let total = 0, seen = 0, entropy = 0, weighed = 0;
    for (let token = 0; token < T; token++) {
      for (const layer of chosen.members) {
        const of = weights.subarray((token * L + layer) * E, (token * L + layer + 1) * E);
        if (Number.isNaN(of[0])) continue;
        seen += 1;
        const size = of.reduce((found, weight) => found + Math.abs(weight), 0);
        total += size;
        let own = 0;
        of.forEach((weight, expert) => {
          share[expert] += Math.abs(weight);
          sum[expert] += weight;
          if (weight !== 0) {
            count[expert] += 1;
            own -= (Math.abs(weight) / size) * Math.log(Math.abs(weight) / size);
          }
        });
        if (size > 0) { entropy += own; weighed += 1; }
      }
    }
    const said = weighed ? `${(entropy / weighed).toFixed(3)} nats, about ${Math.exp(entropy / weighed).toFixed(1)} experts a token` : "none";
    at("entropy").textContent = `${chosen.name}: ${seen} weighted tokens; mean entropy of a token's weights ${said}.`;
    const hasEffects = data.effects.some((effect) => effect !== null);
    const body = header(at("load"), ["#", "expert", "share", "chosen", "mean", ...(hasEffects ? ["loss without"] : [])]);
    const order = [...share.keys()].sort((one, other) => share[other] - share[one] || one - other);
    const largest = Math.max(...share) || 1;
    for (const expert of order) {
      const line = element("tr", "", body, share[expert] ? "" : "none");
      named(line, expert);
      const part = element("td", `${((100 * share[expert]) / (total || 1)).toFixed(1)}%`, line, "bar");
      part.style.setProperty("--part", `${(100 * share[expert]) / largest}%`);
      element("td", `${((100 * count[expert]) / (seen || 1)).toFixed(1)}%`, line);
      element("td", seen ? String(Number((sum[expert] / seen).toPrecision(4))) : "", line);
      if (hasEffects) {
        const effect = data.effects[expert];
        element("td", effect === null ? "" : `${effect < 0 ? "−" : "+"}${Math.abs(effect).toFixed(4)}`, line);
      }
    }
  }

  function choose(row) {
    chosen = row;
    const options = [...at("layer").options];
    at("layer").value = String(options.findIndex((option) => option.title === row.name));
    paintText();
    showLoad();
    if (held) { held = { row, token: held.token }; showCell(row, held.token); }
  }

  function under(event) {
    const box = at("cells").getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / ROW), token = Math.floor((event.clientX - box.left) / column);
    return { row: rows[Math.max(0, Math.min(rows.length - 1, row))], token: Math.max(0, Math.min(T - 1, token)) };
  }

  function move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") { held = null; return; }
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    const number = shown ? placeOf(shown.row) : -1;
    const row = rows[Math.max(0, Math.min(rows.length - 1, number + down))];
    held = { row, token: Math.max(0, Math.min(T - 1, (shown ? shown.token : 0) + right)) };
    showCell(held.row, held.token);
  }

  const choices = [["all layers", allLayers]];
  const groups = { "": choices };
  if (rowsOf.blocks.length > 1 && rowsOf.blocks.length < L) groups["means of blocks"] = rowsOf.blocks;
  if (rowsOf.kinds.length > 1 && rowsOf.kinds.length < L) groups["means of kinds"] = rowsOf.kinds;
  groups.layers = rowsOf.layers;
  const every = Object.values(groups).flat();
  let number = 0;
  for (const [label, members] of Object.entries(groups)) {
    const parent = label ? element("optgroup", "", at("layer")) : at("layer");
    if (label) parent.label = label;
    for (const [name] of members) {
      const option = element("option", name, parent);
      option.value = String(number++);
      option.title = name;
    }
  }
  element("option", "each token's strongest expert", at("expert")).value = "";
  experts.forEach((name, expert) => { element("option", `${expert + 1} ${name}`, at("expert")).value = String(expert); });
  for (const [value, label] of [["layers", "layers"], ["blocks", "blocks (means)"], ["kinds", "kinds (means)"]]) {
    element("option", label, at("rows")).value = value;
  }
  at("rows").value = L > 40 && rowsOf.blocks.length > 1 && rowsOf.blocks.length < L ? "blocks" : "layers";
  at("layer").addEventListener("change", () => {
    const [name, members] = every[Number(at("layer").value)];
    choose({ name, members });
  });
  at("expert").addEventListener("change", () => { showRows(); paintText(); });
  at("rows").addEventListener("change", () => { held = null; showRows(); });
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("cells").addEventListener("pointermove", (event) => {
    if (!held) { const { row, token } = under(event); showCell(row, token); }
  });
  at("cells").addEventListener("click", (event) => {
    held = held ? null : under(event);
    if (held) showCell(held.row, held.token);
  });
  at("cells").addEventListener("keydown", move);
  tokens.forEach((_, token) => {
    const span = at("text").children[token];
    span.addEventListener("pointerenter", () => { if (!held) showCell(chosen, token); });
    span.addEventListener("click", () => {
      held = held ? null : { row: chosen, token };
      if (held) showCell(chosen, token);
    });
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") held = null; });
  showRows();
  paintText();
  showLoad();
  showCell(chosen, 0);
})();
