// Maps, rows of time and diagrams; and the start of it all.

function leftRoom(names) {
  return Math.min(200, 14 + 7.2 * Math.max(...names.map((name) => name.length)));
}

// ---- maps

function drawHeat(holder, chart, state, redraw) {
  const groups = chart.groups || [];
  const labels = groups.length ? groups.map((group) => group[1]) : chart.rows;
  const pitch = Math.max(3, Math.min(17, 340 / chart.rows.length));
  const box = { left: leftRoom(labels), right: WIDTH - 62, top: 6, bottom: 6 + pitch * chart.rows.length };
  const svg = surface(holder, chart, Math.max(box.bottom, 100) + 42);
  const [first, last] = [chart.edges[0], chart.edges[chart.edges.length - 1]];
  const [low, high] = state.view?.x || [first, last];
  const x = scale(chart.x, low, high, box.left, box.right);
  const top = chart.ceiling ?? (Math.max(...chart.values.flat().filter(isNumber), 0) || 1);
  axes(svg, box, x, null, chart);
  const clip = clipped(svg, { ...box, top: box.top + 6, right: box.right - 6 }, chart.key);
  const [from, to] = [x.at(first), x.at(last)];
  make("image", { x: from, y: box.top, width: to - from, height: box.bottom - box.top, preserveAspectRatio: "none",
    style: "image-rendering: pixelated", href: heatImage(chart, top) }, clip);
  heatLabels(svg, box, chart, groups, pitch);
  colorBar(svg, box, chart, top);
  const catcher = make("rect", { class: "catch", x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top }, svg);
  zoomable(svg, catcher, box, x, null, state, redraw, (event, at) => {
    if (!event) return;
    const row = Math.min(chart.rows.length - 1, Math.max(0, Math.floor((at[1] - box.top) / pitch)));
    const width = (last - first) / (chart.edges.length - 1);
    const cell = Math.min(chart.edges.length - 2, Math.max(0, Math.floor((x.value(at[0]) - first) / width)));
    const value = chart.values[row][cell];
    showTip(event, [{ text: chart.rows[row] }, { text: `${show(chart.edges[cell])} to ${show(chart.edges[cell + 1])} s` },
      { color: heatColor(value, top, chart.root), text: `${chart.scale.label}: ${isNumber(value) ? show(value, 3) : "none"}` }]);
  });
}

function heatColor(value, top, root) {
  if (!isNumber(value)) return "#d9d4cc";
  const share = Math.min(1, Math.max(0, value / top));
  const colors = page.style.heat;
  return colors[Math.round((root ? Math.sqrt(share) : share) * (colors.length - 1))];
}

function heatImage(chart, top) {
  const canvas = document.createElement("canvas");
  canvas.width = chart.edges.length - 1;
  canvas.height = chart.rows.length;
  const context = canvas.getContext("2d");
  chart.values.forEach((row, y) => row.forEach((value, x) => {
    context.fillStyle = heatColor(value, top, chart.root);
    context.fillRect(x, y, 1, 1);
  }));
  return canvas.toDataURL("image/png");
}

function heatLabels(svg, box, chart, groups, pitch) {
  if (!groups.length) {
    chart.rows.forEach((name, row) => make("text", { class: "soft", x: box.left - 6, y: box.top + (row + .5) * pitch + 4, "text-anchor": "end" }, svg, name));
    return;
  }
  let lowest = -Infinity;
  groups.forEach(([first, name], i) => {
    const end = groups[i + 1]?.[0] ?? chart.rows.length;
    const y = box.top + (first + end) / 2 * pitch + 4;
    if (first) make("line", { x1: box.left - 4, x2: box.right, y1: box.top + first * pitch, y2: box.top + first * pitch, stroke: "#777", "stroke-width": .6 }, svg);
    if (y - lowest < 13) return;
    make("text", { class: "soft", x: box.left - 6, y, "text-anchor": "end" }, svg, name);
    lowest = y;
  });
}

function colorBar(svg, box, chart, top) {
  const [x, height] = [box.right + 10, Math.max(box.bottom - box.top, 90)];
  const steps = page.style.heat.length;
  for (let i = 0; i < steps; i++) {
    make("rect", { x, y: box.top + height * (1 - (i + 1) / steps), width: 10, height: height / steps + .5, fill: page.style.heat[i] }, svg);
  }
  const place = (value) => box.top + height * (1 - (chart.root ? Math.sqrt(value / top) : value / top));
  const values = chart.root ? [0, .01, .05, .1, .2, .4, .6, .8, 1].filter((value) => value <= top) : linearTicks(0, top, 4, false);
  let last = Infinity;
  for (const value of values) {
    if (last - place(value) < 13) continue;
    last = place(value);
    make("text", { class: "soft", x: x + 14, y: last + 4 }, svg, show(value));
  }
}

// ---- rows of time

const SPAN_FILLS = [6, 1, 0];

function drawSpans(holder, chart, state, redraw) {
  const pitch = 15;
  const box = { left: Math.max(52, leftRoom(chart.rows) + 16), right: WIDTH - 14, top: 6, bottom: 6 + pitch * chart.rows.length };
  const svg = surface(holder, chart, box.bottom + 42);
  const [low, high] = state.view?.x || [chart.x.low, chart.x.high];
  const x = scale(chart.x, low, high, box.left, box.right);
  axes(svg, box, x, null, chart);
  make("text", { transform: `translate(13 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, svg, chart.row_label);
  const inner = clipped(svg, box, chart.key);
  chart.rows.forEach((name, row) => make("text", { class: "soft", x: box.left - 6, y: box.top + (row + .5) * pitch + 4, "text-anchor": "end" }, svg, name));
  const fills = chart.kinds.map((_, kind) => fillOf(svg, SPAN_FILLS[kind % 3]));
  for (const span of chart.spans) {
    if (state.hidden.has(span.kind)) continue;
    make("rect", { x: x.at(span.start), y: box.top + span.row * pitch + 2, width: Math.max(.5, x.at(span.end) - x.at(span.start)),
      height: pitch - 4, fill: fills[span.kind] }, inner);
  }
  const marks = chart.marks || [];
  for (const mark of marks) {
    if (state.hidden.has(chart.kinds.length + mark.kind)) continue;
    make("path", { d: SHAPES[MARKS[mark.kind % MARKS.length]], transform: `translate(${x.at(mark.at)} ${box.top + (mark.row + .5) * pitch})`,
      fill: "#000", stroke: "#fff" }, inner);
  }
  spanTips(svg, box, chart, state, redraw, x, pitch);
  const names = [...chart.kinds, ...(chart.mark_kinds || [])];
  legend(holder, names, (icon, i) => {
    if (i < chart.kinds.length) fillIcon(icon, SPAN_FILLS[i % 3]);
    else make("path", { d: SHAPES[MARKS[(i - chart.kinds.length) % MARKS.length]], transform: "translate(15 6)" }, icon);
  }, state, redraw);
}

function spanTips(svg, box, chart, state, redraw, x, pitch) {
  const catcher = make("rect", { class: "catch", x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top }, svg);
  zoomable(svg, catcher, box, x, null, state, redraw, (event, at) => {
    if (!event) return;
    const row = Math.floor((at[1] - box.top) / pitch);
    if (!chart.rows[row]) return;
    const rows = [{ text: `${chart.row_label} ${chart.rows[row]}` }];
    if (chart.notes?.[row]) rows.push({ text: chart.notes[row] });
    for (const span of chart.spans.filter((own) => own.row === row)) {
      rows.push({ color: fillLook(SPAN_FILLS[span.kind % 3]).color, text: `${chart.kinds[span.kind]}: ${show(span.start, 6)} to ${show(span.end, 6)} s` });
    }
    const near = (chart.marks || []).filter((mark) => mark.row === row && Math.abs(x.at(mark.at) - at[0]) < 12);
    for (const mark of near) rows.push({ text: `${chart.mark_kinds[mark.kind]} at ${show(mark.at, 6)} s` });
    showTip(event, rows);
  });
}

// ---- diagrams

const BOX_LOOKS = [["#D6E8F5", "#0072B2", ""], ["#FBE7C0", "#E69F00", "6 3"], ["#E8E8E8", "#999999", "2 2"]];

function drawDiagram(holder, chart) {
  const unit = (WIDTH - 8) / chart.width;
  const svg = surface(holder, chart, chart.height * unit + 4);
  const head = `head-${chart.key}`;
  const marker = make("marker", { id: head, viewBox: "0 0 8 8", refX: 7.5, refY: 4, markerWidth: 8, markerHeight: 8, orient: "auto" }, make("defs", {}, svg));
  make("path", { d: "M0 0L8 4L0 8Z", fill: "#444" }, marker);
  for (const arrow of chart.arrows || []) {
    const line = make("path", { d: `M${arrow.points.map(([x, y]) => `${4 + x * unit} ${y * unit}`).join("L")}`, fill: "none", stroke: "#444",
      "stroke-width": 1.3 }, svg);
    if (!arrow.plain) line.setAttribute("marker-end", `url(#${head})`);
  }
  for (const text of chart.texts || []) make("text", { x: 4 + text.x * unit, y: text.y * unit + 4, style: "font-size: 14px" }, svg, text.text);
  for (const part of chart.boxes) drawBox(svg, part, unit);
  legend(holder, chart.kinds, (icon, i) => {
    const [fill, edge, dashes] = boxLook(chart, i);
    make("rect", { x: 4, y: 1, width: 24, height: 10, fill, stroke: edge, "stroke-dasharray": dashes }, icon);
  }, { hidden: new Set() }, null);

  function drawBox(parent, part, size) {
    const group = make("g", {}, parent);
    const [fill, edge, dashes] = boxLook(chart, part.kind);
    make("rect", { x: 4 + part.x * size, y: part.y * size, width: part.width * size, height: part.height * size, fill, stroke: edge,
      "stroke-width": 1.3, "stroke-dasharray": dashes, rx: 3 }, group);
    const pitch = part.height * size / (part.lines.length + .6);
    part.lines.forEach((line, i) => make("text", { class: i ? "" : "strong", x: 4 + (part.x + part.width / 2) * size,
      y: part.y * size + pitch * (i + .8) + 4, "text-anchor": "middle", style: "font-size: 13px" }, group, line));
    if (!part.note) return;
    group.addEventListener("pointermove", (event) => showTip(event, [{ text: part.note }]));
    group.addEventListener("pointerleave", hideTip);
  }
}

function boxLook(chart, kind) {
  return BOX_LOOKS[page.style.boxes.indexOf(chart.kinds[kind])] || BOX_LOOKS[2];
}

// ---- start

const DRAW = { xy: drawXy, bars: drawBars, heat: drawHeat, spans: drawSpans, diagram: drawDiagram };

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = page.charts[figure.dataset.chart];
  const holder = figure.querySelector(".plot");
  const reset = figure.querySelector(".reset");
  const state = { hidden: new Set(), view: null };
  const redraw = () => {
    hideTip();
    holder.replaceChildren();
    DRAW[chart.kind](holder, chart, state, redraw);
    if (reset) reset.hidden = !state.view;
  };
  reset?.addEventListener("click", () => { state.view = null; redraw(); });
  redraw();
}
document.documentElement.dataset.drawn = String(document.querySelectorAll("figure[data-chart] svg[role=img]").length);
