// One function a kind of chart: (holder, chart, state, redraw) draws it anew into an empty holder.

function surface(holder, chart, height) {
  return make("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": `${chart.title}. ${chart.caption}` },
    holder);
}

function clipped(svg, box, key) {
  const clip = make("clipPath", { id: `clip-${key}` }, make("defs", {}, svg));
  make("rect", { x: box.left, y: box.top - 6, width: box.right - box.left + 6, height: box.bottom - box.top + 6 }, clip);
  return make("g", { "clip-path": `url(#clip-${key})` }, svg);
}

// ---- lines

function drawXy(holder, chart, state, redraw) {
  const box = { left: 64, right: WIDTH - 14, top: 12, bottom: 266 };
  const svg = surface(holder, chart, 308);
  const lines = chart.lines.map((line, i) => ({ ...line, i })).filter((line) => !state.hidden.has(line.i));
  const rules = chart.rules || [];
  const ends = (axis, key, vertical) => extent(chart, axis, key, rules.filter((rule) => Boolean(rule.vertical) === vertical));
  const [x0, x1] = state.view?.x || ends(chart.x, "x", true);
  const [y0, y1] = state.view?.y || ends(chart.y, "y", false);
  const x = scale(chart.x, x0, x1, box.left, box.right);
  const y = scale(chart.y, y0, y1, box.bottom, box.top);
  axes(svg, box, x, y, chart);
  const inner = clipped(svg, box, chart.key);
  for (const line of lines) drawLine(inner, line, x, y);
  for (const rule of rules) drawRule(svg, box, rule.vertical ? x : y, rule);
  const cross = make("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" }, svg);
  const catcher = make("rect", { class: "catch", x: box.left, y: box.top, width: box.right - box.left,
    height: box.bottom - box.top }, svg);
  const marked = lines.some((line) => line.markers);
  zoomable(svg, catcher, box, x, y, state, redraw, (event, at) => {
    if (!event) { cross.setAttribute("visibility", "hidden"); return; }
    const rows = marked ? nearestPoint(lines, x, y, at, chart) : valuesAt(lines, x.value(at[0]), chart);
    if (!rows) { hideTip(); return; }
    cross.setAttribute("visibility", marked ? "hidden" : "visible");
    cross.setAttribute("x1", at[0]);
    cross.setAttribute("x2", at[0]);
    showTip(event, rows);
  });
  if (chart.lines.length > 1) legend(holder, chart.lines.map((line) => line.name), (icon, i) => lineIcon(icon, chart.lines[i]), state, redraw);
}

// Ends of an axis: the data of all series, hidden ones too, so that hiding one moves nothing.
function extent(chart, axis, key, rules) {
  let [low, high] = [Infinity, -Infinity];
  for (const line of chart.lines) {
    const sets = key === "x" ? [line.x] : [line.y, line.low, line.high];
    for (const set of sets) {
      for (const value of set || []) {
        if (!isNumber(value) || (axis.log && value <= 0)) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
  }
  if (low > high) [low, high] = axis.log ? [0.1, 1] : [0, 1];
  for (const rule of rules) {
    if (axis.log ? rule.value <= high * 30 && rule.value >= low / 30 : rule.value <= high * 3) {
      low = Math.min(low, rule.value);
      high = Math.max(high, rule.value);
    }
  }
  if (axis.log) {
    const room = Math.max((high / low) ** 0.04, 1.02);
    return [axis.low ?? low / room, axis.high ?? high * room];
  }
  const room = (high - low || Math.abs(high) || 1) * 0.05;
  return [axis.low ?? low - room, axis.high ?? high + room];
}

function drawLine(parent, line, x, y) {
  const look = lineLook(line.style);
  const known = (i) => isNumber(line.y[i]) && !(y.log && line.y[i] <= 0) && !(x.log && line.x[i] <= 0);
  if (line.band && line.low) make("path", { d: bandPath(line, x, y), fill: look.color, "fill-opacity": .15 }, parent);
  let path = "";
  let pen = "M";
  line.x.forEach((value, i) => {
    if (!known(i)) { pen = "M"; return; }
    const [px, py] = [x.at(value).toFixed(2), y.at(line.y[i]).toFixed(2)];
    path += pen === "M" ? `M${px} ${py}` : line.step ? `H${px}V${py}` : `L${px} ${py}`;
    pen = "L";
  });
  const dashes = look.dashes.map((length) => length * 1.8).join(" ");
  if (!line.scattered) {
    make("path", { d: path, fill: "none", stroke: look.color, "stroke-width": 1.8, "stroke-dasharray": dashes,
      "stroke-linejoin": "round" }, parent);
  }
  if (!line.band && line.low) whiskers(parent, line, x, y, look.color);
  if (!line.markers) return;
  line.x.forEach((value, i) => {
    if (!known(i)) return;
    make("path", { d: SHAPES[look.marker], transform: `translate(${x.at(value)} ${y.at(line.y[i])})`, stroke: look.color,
      fill: line.hollow?.[i] ? "#fff" : look.color, "stroke-width": 1.4 }, parent);
  });
}

function bandPath(line, x, y) {
  const forward = [];
  const back = [];
  line.x.forEach((value, i) => {
    if (!isNumber(line.low[i]) || !isNumber(line.high[i])) return;
    const px = x.at(value);
    if (line.step && forward.length) {
      forward.push([px, forward[forward.length - 1][1]]);
      back.push([px, back[back.length - 1][1]]);
    }
    forward.push([px, y.at(line.high[i])]);
    back.push([px, y.at(line.low[i])]);
  });
  const points = forward.concat(back.reverse());
  return points.length ? `M${points.map(([px, py]) => `${px.toFixed(2)} ${py.toFixed(2)}`).join("L")}Z` : "";
}

function whiskers(parent, line, x, y, color) {
  line.x.forEach((value, i) => {
    if (!isNumber(line.y[i])) return;
    const px = x.at(value);
    for (const limit of [line.low[i], line.high[i]]) {
      if (!isNumber(limit) || (y.log && limit <= 0)) continue;
      make("path", { d: `M${px} ${y.at(line.y[i])}V${y.at(limit)}M${px - 3} ${y.at(limit)}h6`, stroke: color, fill: "none" }, parent);
    }
  });
}

function drawRule(svg, box, s, rule) {
  if (rule.value < s.low || rule.value > s.high) return;
  const at = s.at(rule.value);
  if (rule.vertical) {
    const right = at < (box.left + box.right) / 2;
    make("line", { class: "rule", x1: at, x2: at, y1: box.top, y2: box.bottom }, svg);
    make("text", { class: "halo", transform: `translate(${at + (right ? 13 : -5)} ${box.bottom - 6}) rotate(-90)` }, svg, rule.label);
  } else {
    make("line", { class: "rule", x1: box.left, x2: box.right, y1: at, y2: at }, svg);
    make("text", { class: "halo", x: box.left + 5, y: at < box.top + 16 ? at + 14 : at - 5 }, svg, rule.label);
  }
}

function lineIcon(icon, line) {
  const look = lineLook(line.style);
  const dashes = look.dashes.map((length) => length * 1.6).join(" ");
  make("path", { d: "M1 6H29", stroke: look.color, "stroke-width": 2, "stroke-dasharray": dashes }, icon);
  if (line.markers) make("path", { d: SHAPES[look.marker], transform: "translate(15 6)", fill: look.color }, icon);
}

function valuesAt(lines, value, chart) {
  const rows = [{ text: `${chart.x.label}: ${show(value)}` }];
  for (const line of lines) {
    const found = valueAt(line, value);
    if (found) rows.push({ color: lineLook(line.style).color, text: `${line.name}: ${found}` });
  }
  return rows.length > 1 ? rows : null;
}

function valueAt(line, value) {
  let [low, high] = [0, line.x.length - 1];
  if (high < 0 || value < line.x[0] || value > line.x[high]) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (line.x[middle] <= value) low = middle; else high = middle;
  }
  const share = line.step ? 0 : (value - line.x[low]) / (line.x[high] - line.x[low] || 1);
  const mix = (set) => (isNumber(set[low]) && isNumber(set[high]) ? set[low] + share * (set[high] - set[low]) : null);
  const y = mix(line.y);
  if (!isNumber(y)) return null;
  return line.low ? `${show(y)} (${show(mix(line.low))} to ${show(mix(line.high))})` : show(y);
}

function nearestPoint(lines, x, y, at, chart) {
  let best = null;
  for (const line of lines) {
    line.x.forEach((value, i) => {
      if (!isNumber(line.y[i])) return;
      const distance = Math.hypot(x.at(value) - at[0], y.at(line.y[i]) - at[1]);
      if (!best || distance < best.distance) best = { distance, line, i };
    });
  }
  if (!best || best.distance > 60) return null;
  const { line, i } = best;
  const limits = line.low && (isNumber(line.low[i]) || isNumber(line.high[i]))
    ? ` [${isNumber(line.low[i]) ? show(line.low[i]) : "?"}, ${isNumber(line.high[i]) ? show(line.high[i]) : "?"}]` : "";
  const rows = [{ color: lineLook(line.style).color, text: line.name }, { text: `${chart.x.label}: ${show(line.x[i])}` },
    { text: `${chart.y.label}: ${show(line.y[i])}${limits}` }];
  if (line.hollow?.[i]) rows.push({ text: "the queue grew for as long as the run lasted" });
  return rows;
}

// ---- bars

function drawBars(holder, chart, state, redraw) {
  const pitch = 36;
  const rules = chart.rules || [];
  const above = rules.length ? 16 : 0;
  const box = { left: 12, right: WIDTH - 14, top: 8 + above, bottom: 8 + above + pitch * chart.categories.length };
  const svg = surface(holder, chart, box.bottom + 42);
  const shown = chart.series.map((series, i) => ({ ...series, i })).filter((series) => !state.hidden.has(series.i));
  const sums = chart.categories.map((_, row) => shown.reduce((sum, series) => sum + (series.values[row] || 0), 0));
  const limits = shown.flatMap((series) => series.high || []).filter(isNumber);
  const top = Math.max(...sums, ...limits, ...rules.map((rule) => rule.value), 0) || 1;
  const x = scale(chart.axis, 0, (chart.axis.high ?? top) * 1.14, box.left, box.right);
  axes(svg, box, x, null, chart);
  const start = sums.map(() => 0);
  for (const series of shown) drawSeries(svg, box, chart, series, x, start, pitch);
  chart.categories.forEach((name, row) => {
    const y = box.top + row * pitch;
    make("text", { class: "halo", x: box.left + 4, y: y + 12 }, svg, name);
    const single = shown.length === 1 && isNumber(shown[0].high?.[row]) ? shown[0].high[row] : 0;
    const known = shown.every((series) => isNumber(series.values[row]));
    make("text", { class: "soft", x: x.at(Math.max(sums[row], single)) + 5, y: y + 28 }, svg, known ? show(sums[row], 3) : "unknown");
  });
  for (const rule of rules) {
    const at = x.at(rule.value);
    const left = at > (box.left + box.right) / 2;
    make("line", { class: "rule", x1: at, x2: at, y1: box.top - above, y2: box.bottom }, svg);
    make("text", { class: "halo", x: at + (left ? -5 : 5), y: box.top - 4, "text-anchor": left ? "end" : "start" }, svg, rule.label);
  }
  if (chart.series.length > 1) legend(holder, chart.series.map((series) => series.name), (icon, i) => fillIcon(icon, chart.series[i].fill), state, redraw);
}

function drawSeries(svg, box, chart, series, x, start, pitch) {
  const fill = fillOf(svg, series.fill);
  chart.categories.forEach((name, row) => {
    const value = series.values[row];
    if (!isNumber(value)) return;
    const y = box.top + row * pitch + 16;
    const bar = make("rect", { x: x.at(start[row]), y, width: Math.max(0, x.at(start[row] + value) - x.at(start[row])), height: 16, fill,
      stroke: "#fff", "stroke-width": .5 }, svg);
    const limit = (set) => (isNumber(set?.[row]) ? show(set[row]) : "?");
    const interval = isNumber(series.low?.[row]) || isNumber(series.high?.[row]) ? ` [${limit(series.low)}, ${limit(series.high)}]` : "";
    bar.addEventListener("pointermove", (event) => showTip(event, [{ text: name },
      { color: fillLook(series.fill).color, text: `${series.name}: ${show(value)}${interval}` }, { text: chart.axis.label }]));
    bar.addEventListener("pointerleave", hideTip);
    start[row] += value;
    for (const end of [series.low?.[row], series.high?.[row]]) {
      if (isNumber(end)) make("path", { d: `M${x.at(value)} ${y + 8}H${x.at(end)}M${x.at(end)} ${y + 4}v8`, stroke: "#000", fill: "none" }, svg);
    }
  });
}

function fillIcon(icon, number) {
  make("rect", { x: 4, y: 0, width: 24, height: 12, fill: fillOf(icon, number) }, icon);
}
