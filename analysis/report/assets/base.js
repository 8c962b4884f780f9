"use strict";
// What all charts share: elements, numbers, scales, axes, the tip and the legend.

const page = JSON.parse(document.getElementById("report-data").textContent);
const SVG = document.getElementById("ns").namespaceURI;
const WIDTH = 560;

function make(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.appendChild(element);
  return element;
}

function makeHtml(name, attributes, parent, text) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.appendChild(element);
  return element;
}

function show(value, digits = 4) {
  if (value === null || value === undefined) return "unknown";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000 && size < 1e9) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(digits)));
}

const isNumber = (value) => value !== null && value !== undefined;

// ---- scales and ticks

function scale(axis, low, high, from, to) {
  const place = axis.log ? Math.log10 : (value) => value;
  const [a, b] = [place(low), place(high)];
  const at = (value) => from + (place(value) - a) / (b - a || 1) * (to - from);
  const value = (pixel) => {
    const found = a + (pixel - from) / (to - from) * (b - a);
    return axis.log ? 10 ** found : found;
  };
  return { low, high, from, to, at, value, log: Boolean(axis.log), whole: Boolean(axis.whole) };
}

function ticks(s, count) {
  return s.log ? logTicks(s.low, s.high, count) : linearTicks(s.low, s.high, count, s.whole);
}

function linearTicks(low, high, count, whole) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= raw * 0.999) || 10 * power;
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.5) return linearTicks(low, high, count, false).filter((value) => value > 0);
  const parts = decades < 1.2 ? [1, 2, 3, 5, 7] : decades < 2.6 ? [1, 2, 5] : [1];
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const part of parts) {
      const value = Number((part * 10 ** e).toPrecision(6));
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found;
}

function axes(svg, box, x, y, chart) {
  for (const value of ticks(x, 7)) {
    make("line", { class: "grid", x1: x.at(value), x2: x.at(value), y1: box.top, y2: box.bottom }, svg);
    make("text", { class: "soft", x: x.at(value), y: box.bottom + 16, "text-anchor": "middle" }, svg, show(value));
  }
  if (y) {
    for (const value of ticks(y, 5)) {
      make("line", { class: "grid", x1: box.left, x2: box.right, y1: y.at(value), y2: y.at(value) }, svg);
      make("text", { class: "soft", x: box.left - 6, y: y.at(value) + 4, "text-anchor": "end" }, svg, show(value));
    }
    make("text", { transform: `translate(13 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, svg,
      chart.y.label);
  }
  make("path", { class: "frame", d: `M${box.left} ${box.top}V${box.bottom}H${box.right}` }, svg);
  make("text", { x: (box.left + box.right) / 2, y: box.bottom + 34, "text-anchor": "middle" }, svg,
    (chart.x || chart.axis).label);
}

// ---- looks

const lineLook = (number) => page.style.lines[(number || 0) % page.style.lines.length];
const fillLook = (number) => page.style.fills[(number || 0) % page.style.fills.length];
const HATCHES = {
  rising: "M-1 3L3 -1M0 8L8 0M5 9L9 5", falling: "M-1 5L3 9M0 0L8 8M5 -1L9 3",
  cross: "M0 8L8 0M0 0L8 8", level: "M0 4H8", upright: "M4 0V8", dots: "M2 2h1.6M6 6h1.6",
};
let hatchCount = 0;

function fillOf(svg, number) {
  const look = fillLook(number);
  if (!look.hatch) return look.color;
  const id = `hatch-${hatchCount++}`;
  const pattern = make("pattern", { id, width: 8, height: 8, patternUnits: "userSpaceOnUse" }, svg);
  make("rect", { width: 8, height: 8, fill: look.color }, pattern);
  make("path", { d: HATCHES[look.hatch], stroke: "#fff", "stroke-width": look.hatch === "dots" ? 1.8 : 1.1, fill: "none" },
    pattern);
  return `url(#${id})`;
}

const SHAPES = {
  circle: "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z", square: "M-3.6 -3.6H3.6V3.6H-3.6Z", up: "M0 -4.6L4.4 3.6H-4.4Z",
  down: "M0 4.6L4.4 -3.6H-4.4Z", diamond: "M0 -5L4.4 0L0 5L-4.4 0Z",
  cross: "M-4 -2.4L-2.4 -4L0 -1.6L2.4 -4L4 -2.4L1.6 0L4 2.4L2.4 4L0 1.6L-2.4 4L-4 2.4L-1.6 0Z",
  plus: "M-1.4 -4.4H1.4V-1.4H4.4V1.4H1.4V4.4H-1.4V1.4H-4.4V-1.4H-1.4Z",
};
const MARKS = ["down", "diamond", "up", "square", "circle"];

// ---- tip and legend

const tip = makeHtml("div", { id: "tip", role: "status" }, document.body);
tip.hidden = true;

function showTip(event, rows) {
  tip.replaceChildren();
  for (const row of rows) {
    const line = makeHtml("div", {}, tip);
    if (row.color) makeHtml("i", {}, line).style.background = row.color;
    makeHtml("span", {}, line, row.text || row);
  }
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 14 + width > window.innerWidth ? event.clientX - 14 - width : event.clientX + 14;
  const top = event.clientY + 14 + height > window.innerHeight ? event.clientY - 14 - height : event.clientY + 14;
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${Math.max(0, top)}px`;
}

const hideTip = () => { tip.hidden = true; };

// One button a series; pressing it hides or shows the series. Without ``toggle`` it only explains.
function legend(parent, names, swatch, state, redraw) {
  const box = makeHtml("div", { class: "legend" }, parent);
  names.forEach((name, i) => {
    const shown = !state.hidden.has(i);
    const entry = redraw ? makeHtml("button", { type: "button", "aria-pressed": String(shown) }, box)
      : makeHtml("span", {}, box);
    const icon = make("svg", { width: 30, height: 12, viewBox: "0 0 30 12", "aria-hidden": "true" }, entry);
    swatch(icon, i);
    makeHtml("span", {}, entry, name);
    if (!redraw) { entry.style.fontSize = ".8rem"; entry.style.marginRight = ".6rem"; return; }
    entry.addEventListener("click", () => {
      if (state.hidden.has(i)) state.hidden.delete(i); else state.hidden.add(i);
      redraw();
      parent.querySelectorAll(".legend button")[i]?.focus();
    });
  });
}

// ---- zoom: drag to choose a stretch, double click to see all again

function pointer(svg, event) {
  const place = svg.getBoundingClientRect();
  const view = svg.viewBox.baseVal;
  return [(event.clientX - place.left) / place.width * view.width, (event.clientY - place.top) / place.height * view.height];
}

function zoomable(svg, catcher, box, x, y, state, redraw, move) {
  let start = null;
  let frame = null;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const within = (event) => {
    const [px, py] = pointer(svg, event);
    return [clamp(px, box.left, box.right), clamp(py, box.top, box.bottom)];
  };
  catcher.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = within(event);
    catcher.setPointerCapture(event.pointerId);
  });
  catcher.addEventListener("pointermove", (event) => {
    const now = within(event);
    if (!start) { move(event, now); return; }
    hideTip();
    if (!frame) frame = make("rect", { class: "select" }, svg);
    const tall = y && Math.abs(now[1] - start[1]) > 20;
    const [top, bottom] = tall ? [Math.min(now[1], start[1]), Math.max(now[1], start[1])] : [box.top, box.bottom];
    for (const [key, value] of Object.entries({ x: Math.min(now[0], start[0]), y: top, width: Math.abs(now[0] - start[0]),
      height: bottom - top })) frame.setAttribute(key, value);
  });
  catcher.addEventListener("pointerup", (event) => {
    if (!start) return;
    const [begin, end] = [start, within(event)];
    start = null;
    frame?.remove();
    frame = null;
    if (Math.abs(end[0] - begin[0]) < 6) return;
    const tall = y && Math.abs(end[1] - begin[1]) > 20;
    const ends = (s, a, b) => [s.value(a), s.value(b)].sort((one, other) => one - other);
    state.view = { x: ends(x, begin[0], end[0]), y: tall ? ends(y, begin[1], end[1]) : state.view?.y };
    redraw();
  });
  catcher.addEventListener("pointerleave", () => { hideTip(); move(null, null); });
  catcher.addEventListener("dblclick", () => { state.view = null; redraw(); });
}
