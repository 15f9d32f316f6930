// Elements, questions to the server, and errors where they happen. Text is only ever text: nothing here parses HTML.

export function h(tag, given = {}, ...children) {
  return filled(document.createElement(tag), given, children);
}

export function svg(tag, given = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), given, children);
}

function filled(made, given, children) {
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, part] of Object.entries(value)) made.style.setProperty(name, part);
    else if (key === "value" || key === "checked") made[key] = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// a name in any script, kept apart from the direction of what stands around it
export function named(text) {
  return h("bdi", {}, text);
}

export function adapterLink(name) {
  return h("a", { class: "adapter", href: `#/adapter?${new URLSearchParams({ name })}` }, named(name));
}

export function labelled(text, control, given = {}) {
  return h("label", given, h("span", {}, text), control);
}

export function say(text) {
  document.getElementById("said").textContent = text;
}

export async function ask(path, query = {}, signal = undefined) {
  return answer(await reached(fetch(`/api/${path}?${new URLSearchParams(query)}`, { signal })));
}

export async function send(path, body, signal = undefined) {
  const response = await reached(fetch(`/api/${path}`, posted(body, signal)));
  return response.headers.get("content-type")?.startsWith("application/json") ? answer(response) : checked(response);
}

// what a long act tells as it goes on, as server-sent events; leaving it (signal) ends the act
export async function follow(path, body, signal, told) {
  const response = await checked(await reached(fetch(`/api/${path}`, posted(body, signal))));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reached(reader.read());
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const text of events) {
      const event = JSON.parse(text.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      told(event);
    }
  }
}

function posted(body, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
}

async function reached(asked) {
  try {
    return await asked;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is `loraweave ui` still running?");
  }
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answered with status ${response.status}.`);
}

async function answer(response) {
  return (await checked(response)).json();
}

export function failure(error) {
  return h("p", { class: "error", role: "alert" }, error.message || String(error));
}

// runs the work; shows an error in its place, and ignores that the view was left
export async function within(place, work) {
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") place.replaceChildren(failure(error));
    return undefined;
  }
}

export function debounced(wait, work) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), wait);
  };
}

export function bytes(size) {
  const units = ["B", "kB", "MB", "GB"];
  let at = 0;
  for (; size >= 1000 && at < units.length - 1; at++) size /= 1000;
  return `${at && size < 10 ? size.toFixed(1) : Math.round(size)} ${units[at]}`;
}

export function day(created) {
  return created.slice(0, 10);
}

export function number(value, digits = 3) {
  return String(Number(value.toPrecision(digits)));
}

export function count(value, noun) {
  return `${value.toLocaleString("en")} ${noun}${value === 1 ? "" : "s"}`;
}

// Okabe and Ito's colours, as in explanations; the last is for all others
export const PALETTE = ["#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00", "#999999"];
