"use strict";
// The page's data, a JSON object (page.py): texts, one per token; rows, how many of them the model has read; layers,
// heads; into, a code per head and token; votes, thousandths of log votes per head and slot; flags, per token; steps.
const data = JSON.parse(document.getElementById("data").textContent);
const DROPPED = 0, SLOT = 1, CACHED = 2, FIRST = 3; // codes of `into`; FIRST + p: merged into the token at position p
const COMPRESSED = 1, PROTECTED = 2; // bits of `flags`
const STATES = [
  ["raw", "raw", "a slot of its own, never compressed"],
  ["protected", "protected", "kept bit for bit"],
  ["kept", "kept", "keeps its slot"],
  ["merged", "merged", "joined the slot of another token"],
  ["dropped", "dropped", "is gone"],
  ["cached", "cached", "in slots that an earlier request compressed, which this record does not hold"],
  ["unread", "not read", "the answer's last token: the model has not read it, so it has no slot"],
];
const [RAW, WHOLE, KEPT, MERGED, GONE, EARLIER, UNREAD] = STATES.keys();
const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 2 });
let into, votes, flags, starts, spans, chosen = null;

async function unpack(text, Type) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Type(await new Response(stream).arrayBuffer());
}

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const codeOf = (head, token) => into[head * data.rows + token];

function stateOf(head, token) {
  if (token >= data.rows) return UNREAD;
  const code = codeOf(head, token);
  if (code >= FIRST) return MERGED;
  if (code !== SLOT) return code === DROPPED ? GONE : EARLIER;
  if (flags[token] & PROTECTED) return WHOLE;
  return flags[token] & COMPRESSED ? KEPT : RAW;
}

/** Numbers of the heads that layer and head select: layer * heads + head. */
function selected() {
  const layer = byId("layer").value, head = byId("head").value, out = [];
  for (let l = 0; l < data.layers; l++) {
    for (let h = 0; h < data.heads; h++) {
      if ((layer === "all" || +layer === l) && (head === "all" || +head === h)) out.push(l * data.heads + h);
    }
  }
  return out;
}

/** Means over the selected heads: votes by position, and how often each token is in each state. */
function tally(heads) {
  const sums = new Float64Array(data.rows), states = new Uint32Array(data.texts.length * STATES.length);
  for (const head of heads) {
    let slot = starts[head];
    for (let token = 0; token < data.texts.length; token++) {
      states[token * STATES.length + stateOf(head, token)]++;
      if (token < data.rows && codeOf(head, token) === SLOT) sums[token] += Math.exp(votes[slot++] / 1000);
    }
  }
  return { votes: sums.map((sum) => sum / heads.length), states };
}

function votesOf(head, token) {
  let slot = starts[head];
  for (let other = 0; other < token; other++) slot += codeOf(head, other) === SLOT;
  return Math.exp(votes[slot] / 1000);
}

function show() {
  const heads = selected(), found = tally(heads), totals = STATES.map(() => 0), count = STATES.length;
  spans.forEach((span, token) => {
    const own = found.states.subarray(token * count, (token + 1) * count);
    own.forEach((times, state) => { totals[state] += times; });
    span.className = STATES[own.indexOf(Math.max(...own))][0];
    span.style.setProperty("--share", (own[KEPT] / heads.length).toFixed(2));
  });
  totals.forEach((total, state) => {
    const label = byId(`state-${STATES[state][0]}`);
    label.hidden = !total;
    label.querySelector("output").value = number(total / heads.length);
  });
  byId("mean").textContent = heads.length > 1 ? `, by what most of ${heads.length} heads did; numbers are means` : "";
  drawVotes(found.votes, heads.length);
  choose(chosen);
}

function choose(token) {
  for (const span of byId("text").querySelectorAll(".chosen, .same")) span.classList.remove("chosen", "same");
  chosen = token;
  if (token === null) return;
  spans[token].classList.add("chosen");
  const heads = selected(), panel = byId("token");
  const name = (other) => [`${other} `, element("code", { textContent: JSON.stringify(data.texts[other]) })];
  panel.replaceChildren(element("p", {}, "Token ", ...name(token), token < data.prompt ? " of the prompt" : " of the answer"));
  if (heads.length === 1) panel.append(element("p", {}, ...one(heads[0], token, name)));
  else panel.append(element("p", { textContent: many(heads, token) }), map(token));
  drawHere();
}

/** What became of a token in one head; marks those in the same slot. */
function one(head, token, name) {
  const state = stateOf(head, token), code = token < data.rows ? codeOf(head, token) : CACHED;
  const owner = code >= FIRST ? code - FIRST : token;
  const out = code >= FIRST ? ["merged into token ", ...name(owner)] : [STATES[state][2]];
  if (code !== SLOT && code < FIRST) return out;
  const joined = [];
  for (let other = 0; other < data.rows; other++) if (codeOf(head, other) === FIRST + owner) joined.push(other);
  if (joined.length) for (const other of [owner, ...joined]) spans[other].classList.add("same");
  out.push(`; the slot holds ${joined.length + 1} token${joined.length ? "s" : ""}, ${number(votesOf(head, owner))} votes`);
  joined.slice(0, 12).forEach((other, at) => out.push(at ? ", " : ": with ", ...name(other)));
  if (joined.length > 12) out.push(` and ${joined.length - 12} more`);
  return out;
}

function many(heads, token) {
  const times = STATES.map(() => 0);
  for (const head of heads) times[stateOf(head, token)]++;
  return times.map((n, state) => (n ? `${STATES[state][1]} in ${n}` : "")).filter(Boolean).join(", ") + ` of ${heads.length} heads`;
}

/** One square per layer (across) and head (down); a click chooses them. The two lists do the same by keyboard. */
function map(token) {
  const size = Math.min(14, 320 / Math.max(data.layers, 1) + 4), out = drawn("svg", { id: "map", "aria-hidden": "true" });
  out.setAttribute("viewBox", `0 0 ${data.layers * size} ${data.heads * size}`);
  out.style.width = `${data.layers * size}px`;
  const heads = new Set(selected());
  for (let head = 0; head < data.layers * data.heads; head++) {
    const layer = Math.floor(head / data.heads), row = head % data.heads, state = STATES[stateOf(head, token)];
    const title = drawn("title", {}, `layer ${layer}, head ${row}: ${state[1]}`);
    const box = { x: layer * size, y: row * size, width: size, height: size, class: state[0], opacity: heads.has(head) ? 1 : 0.35 };
    const square = drawn("rect", box, title);
    square.addEventListener("click", () => { byId("layer").value = layer; byId("head").value = row; show(); });
    out.append(square);
  }
  return out;
}

const LEFT = 44, BOTTOM = 22, TOP = 14, RIGHT = 12;
let atPosition = null; // x of a position in the chart of votes

/** Axes of a chart; returns x(value) and y(value). ticks: values of y. */
function axes(svg, most, ticks, scale) {
  const width = svg.clientWidth, height = svg.clientHeight, top = scale(ticks.at(-1));
  const x = (value) => LEFT + ((width - LEFT - RIGHT) * value) / most;
  const y = (value) => height - BOTTOM - ((height - BOTTOM - TOP) * scale(value)) / top;
  svg.replaceChildren();
  for (const tick of ticks) {
    svg.append(drawn("path", { class: "axis", d: `M${LEFT} ${y(tick)}H${width - RIGHT}` }));
    svg.append(drawn("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const part of [0, 0.5, 1]) {
    const anchor = part === 1 ? "end" : part ? "middle" : "start";
    svg.append(drawn("text", { x: x(part * most), y: height - 6, "text-anchor": anchor }, number(Math.round(part * most))));
  }
  return { x, y };
}

function drawVotes(values, heads) {
  const largest = values.reduce((a, b) => Math.max(a, b), 0), ticks = [0, 1];
  while (ticks.at(-1) < largest) ticks.push(ticks.at(-1) * 4);
  const svg = byId("votes"), { x, y } = axes(svg, data.rows, ticks, (value) => Math.log2(1 + value));
  let line = "";
  values.forEach((value, token) => { if (value) line += `M${x(token + 0.5).toFixed(1)} ${y(0)}V${y(value).toFixed(1)}`; });
  svg.append(drawn("path", { d: line }), drawn("path", { class: "here", id: "here" }));
  atPosition = { x, bottom: y(0), top: TOP };
  const mean = heads > 1 ? ", a mean over the heads that are shown" : "";
  const sum = values.reduce((a, b) => a + b, 0);
  byId("votes-note").textContent = `How many tokens the slot of each token stands for${mean}. In all ${number(sum)} votes; the largest ${number(largest)}.`;
}

function drawHere() {
  if (chosen === null || !byId("here")) return;
  byId("here").setAttribute("d", `M${atPosition.x(chosen + 0.5)} ${atPosition.top}V${atPosition.bottom}`);
}

function drawSlots() {
  const last = data.steps.at(-1), most = Math.max(...data.steps.map(([tokens]) => tokens));
  const { x, y } = axes(byId("slots"), most, [0, most / 2, most].map(Math.round), (value) => value);
  const line = data.steps.map(([tokens, slots]) => `${x(tokens)} ${y(slots)}`).join("L");
  byId("slots").append(drawn("path", { class: "full", d: `M${x(0)} ${y(0)}L${x(most)} ${y(most)}` }), drawn("path", { d: `M${line}` }));
  byId("slots-note").textContent = `Slots held against tokens computed, ${number(last[1])} of ${number(last[0])} at the end. Dashed: without compression.`;
}

/** The next token, in a direction, that is shown. */
function step(from, by) {
  for (let token = from + by; token >= 0 && token < spans.length; token += by) {
    if (spans[token].offsetParent !== null && data.texts[token]) return token;
  }
  return null;
}

function onKey(event) {
  const moves = { ArrowRight: [chosen ?? -1, 1], ArrowLeft: [chosen ?? spans.length, -1], Home: [-1, 1], End: [spans.length, -1] };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const token = step(...moves[event.key]);
  if (token === null) return;
  choose(token);
  spans[token].scrollIntoView({ block: "nearest" });
}

function fill() {
  byId("about").textContent = data.about;
  for (const [name, value] of data.numbers) byId("numbers").append(element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })));
  for (const [id, count] of [["layer", data.layers], ["head", data.heads]]) {
    byId(id).append(element("option", { value: "all", textContent: "all" }));
    for (let i = 0; i < count; i++) byId(id).append(element("option", { value: i, textContent: i }));
    byId(id).addEventListener("change", show);
  }
  for (const [name, label, help] of STATES) {
    const box = element("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => byId("text").classList.toggle(`hide-${name}`, !box.checked));
    byId("states").append(element("label", { id: `state-${name}`, title: help }, box, element("i", { className: name, textContent: label }), element("output")));
  }
  spans = data.texts.map((text) => element("span", { textContent: text }));
  spans.forEach((span, token) => { span.dataset.token = token; });
  byId("text").append(...spans);
  byId("text").addEventListener("click", (event) => { if (event.target.dataset.token) choose(+event.target.dataset.token); });
  byId("text").addEventListener("keydown", onKey);
  byId("choose").addEventListener("submit", (event) => event.preventDefault());
}

async function main() {
  into = await unpack(data.into, data.wide ? Uint32Array : Uint16Array);
  votes = await unpack(data.votes, Int16Array);
  flags = await unpack(data.flags, Uint8Array);
  starts = [0];
  for (const slots of data.slots) starts.push(starts.at(-1) + slots);
  fill();
  show();
  drawSlots();
  new ResizeObserver(() => { drawVotes(tally(selected()).votes, selected().length); drawHere(); drawSlots(); }).observe(byId("votes"));
  document.documentElement.dataset.ready = Math.round(performance.now());
}
main();
