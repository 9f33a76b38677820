"use strict";
// Charts as plain SVG: lines, bands, points with bars, marks of events, and a cursor for pointer and keyboard.
// Text of a run goes in by textContent alone.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 220, TOP = 8, BOTTOM = 34, RIGHT = 12;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 2"];
const NAMES = {failure: "failure or recovery", guard: "guard", other: "event"};

function make(tag, properties, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, properties || {});
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
}

function draw(parent, tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function known(value) { return typeof value === "number" && isFinite(value); }

function shown(value) {
  if (!known(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2);
  return String(+value.toPrecision(4));
}

function visible(text) {  // control, format and direction characters are written out, so that none acts
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g,
    (character) => "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0"));
}

function color(number) { return `var(--color-${number % 6})`; }

function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  const list = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place++) list.push(+(place * step).toPrecision(12));
  return list;
}

function extent(values, start) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (known(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  if (start === "ratio") return [0, 1];
  if (low === Infinity) return [0, 1];
  if (start === "zero") { low = Math.min(0, low); high = Math.max(0, high); }
  if (low === high) { const room = Math.abs(low) * 0.1 || 1; return start === "zero" ? [0, high || 1] : [low - room, high + room]; }
  const room = (high - low) * 0.06;
  return [start === "zero" && low === 0 ? 0 : low - room, start === "zero" && high === 0 ? 0 : high + room];
}

// spec: title, unit, xTitle, start, lines [{name, number, kind: line|points, x, y, low, high, xLow, xHigh, best}], marks, whole
function chart(parent, spec) {
  const figure = make("figure");
  const caption = make("figcaption", {textContent: spec.title + " "}, make("span", {textContent: `(${spec.unit})`}));
  const svg = document.createElementNS(SVG, "svg");
  const tip = make("div", {className: "tip", hidden: true});
  svg.setAttribute("tabindex", "0");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${spec.title}, ${spec.unit}, over ${spec.xTitle}. ` + spec.lines.map(spoken).join(" "));
  figure.append(caption, svg, tip);
  parent.append(figure);
  const state = {figure, svg, tip, spec, cursor: null};
  const redraw = () => paint(state);
  new ResizeObserver(redraw).observe(figure);
  svg.addEventListener("pointermove", (event) => point(state, event.clientX - svg.getBoundingClientRect().left));
  svg.addEventListener("pointerleave", () => hide(state));
  svg.addEventListener("blur", () => hide(state));
  svg.addEventListener("keydown", (event) => key(state, event));
  redraw();
  return state;
}

function spoken(line) {
  const last = line.y.length - 1;
  return `${line.name}: ${shown(line.y[0])} at ${shown(line.x[0])}, ${shown(line.y[last])} at ${shown(line.x[last])}.`;
}

function paint(state) {
  const {svg, spec} = state, width = Math.max(svg.getBoundingClientRect().width, 160);
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.setAttribute("height", HEIGHT);
  const all = spec.lines;
  const [low, high] = extent(all.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]), spec.start);
  let [first, last] = extent(all.flatMap((line) => [...line.x, ...(line.xLow || []), ...(line.xHigh || [])]), spec.xStart || "free");
  if (spec.whole && first !== last) [first, last] = [Math.min(...all.flatMap((line) => line.x)), Math.max(...all.flatMap((line) => line.x))];
  if (first === last) { first -= 1; last += 1; }
  const rows = ticks(low, high, 5), left = 14 + 6.2 * Math.max(...rows.map((value) => shown(value).length));
  const x = (value) => left + (value - first) / (last - first) * (width - left - RIGHT);
  const y = (value) => TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);
  Object.assign(state, {x, y, left, width});
  for (const value of rows) {
    draw(svg, "line", {class: "grid", x1: left, x2: width - RIGHT, y1: y(value), y2: y(value)});
    draw(svg, "text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, shown(value));
  }
  draw(svg, "line", {class: "axis", x1: left, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM});
  for (const value of ticks(first, last, Math.max(2, Math.floor(width / 80)))) {
    if (spec.whole && !Number.isInteger(value)) continue;
    draw(svg, "line", {class: "axis", x1: x(value), x2: x(value), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4});
    draw(svg, "text", {x: x(value), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle"}, shown(value));
  }
  draw(svg, "text", {x: (left + width - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle"}, spec.xTitle);
  for (const mark of spec.marks || []) drawMark(state, mark, first, last);
  for (const line of all) drawBand(state, line);
  for (const line of all) (line.kind === "points" ? drawPoints : drawLine)(state, line);
  state.layer = draw(svg, "g", {});
  svg.dataset.drawn = String(all.length);
}

function drawMark(state, mark, first, last) {
  if (mark.step < first || mark.step > last) return;
  const {svg, x} = state, place = x(mark.step), kind = `mark mark-${mark.kind}`;
  draw(svg, "line", {class: kind, x1: place, x2: place, y1: TOP, y2: HEIGHT - BOTTOM});
  draw(svg, "path", {class: kind, d: `M${place - 4} ${HEIGHT - BOTTOM}l8 0l-4 -7z`});
}

function drawBand(state, line) {
  if (!line.band || !line.low || !line.low.length) return;
  const {svg, x, y} = state;
  const upper = line.x.map((value, place) => `${x(value)},${y(line.high[place])}`);
  const lower = line.x.map((value, place) => `${x(value)},${y(line.low[place])}`).reverse();
  draw(svg, "polygon", {points: [...upper, ...lower].join(" ")}).style.cssText = `fill:${color(line.number)};opacity:.18`;
}

function drawLine(state, line) {
  const {svg, x, y} = state;
  const path = line.x.map((value, place) => `${place ? "L" : "M"}${x(value).toFixed(1)} ${y(line.y[place]).toFixed(1)}`).join("");
  const node = draw(svg, "path", {class: "line", d: path, "stroke-dasharray": line.dashed ? "4 4" : DASHES[line.number % 6]});
  node.style.stroke = color(line.number);
  if (line.faint) node.style.opacity = ".55";
  if (line.x.length === 1) shape(state, x(line.x[0]), y(line.y[0]), line.number);
}

function drawPoints(state, line) {
  const {svg, x, y} = state;
  if (line.joined) drawLine(state, {...line, faint: true, dashed: line.training});
  line.x.forEach((value, place) => {
    if (!line.band && line.low && known(line.low[place])) whisker(svg, line, x(value), x(value), y(line.low[place]), y(line.high[place]));
    if (line.xLow && known(line.xLow[place])) whisker(svg, line, x(line.xLow[place]), x(line.xHigh[place]), y(line.y[place]), y(line.y[place]));
    shape(state, x(value), y(line.y[place]), line.number);
    if (line.best === place) {
      const right = x(value) > state.width - 90;
      draw(svg, "circle", {cx: x(value), cy: y(line.y[place]), r: 8, fill: "none", "stroke-width": 1.5}).style.stroke = color(line.number);
      if (line.alone) draw(svg, "text", {x: x(value) + (right ? -11 : 11), y: y(line.y[place]) - 7, "text-anchor": right ? "end" : "start"}, `best: step ${line.steps[place]}`);
    }
  });
}

function whisker(svg, line, x1, x2, y1, y2) {
  draw(svg, "line", {class: "whisker", x1, x2, y1, y2}).style.stroke = color(line.number);
}

function shape(state, x, y, number) {  // a shape besides the color: colors alone are not told apart by everyone
  const paths = [`M${x - 3.5} ${y}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z`, `M${x - 3.3} ${y - 3.3}h6.6v6.6h-6.6z`, `M${x} ${y - 4.5}l4.2 7.4h-8.4z`,
    `M${x} ${y - 4.8}l4.8 4.8l-4.8 4.8l-4.8 -4.8z`, `M${x} ${y + 4.5}l4.2 -7.4h-8.4z`, `M${x - 4} ${y - 1.2}h2.8v-2.8h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8z`];
  draw(state.svg, "path", {d: paths[number % 6]}).style.fill = color(number);
}

function places(state) { return [...new Set(state.spec.lines.flatMap((line) => line.x))].sort((a, b) => a - b); }

function point(state, pixels) {
  const all = places(state);
  if (all.length) show(state, all.reduce((best, value) => Math.abs(state.x(value) - pixels) < Math.abs(state.x(best) - pixels) ? value : best));
}

function key(state, event) {
  const all = places(state), now = all.indexOf(state.cursor);
  const next = {ArrowRight: Math.min(now + 1, all.length - 1), ArrowLeft: now < 0 ? all.length - 1 : Math.max(now - 1, 0), Home: 0, End: all.length - 1}[event.key];
  if (event.key === "Escape") return hide(state);
  if (next === undefined || !all.length) return;
  event.preventDefault();
  show(state, all[next]);
}

function show(state, value) {
  const {spec, tip, layer, x, y, width} = state;
  state.cursor = value;
  layer.replaceChildren();
  draw(layer, "line", {class: "cursor", x1: x(value), x2: x(value), y1: TOP, y2: HEIGHT - BOTTOM});
  const rows = [];
  for (const line of spec.lines) {
    const place = line.x.indexOf(value);
    if (place < 0) continue;
    draw(layer, "circle", {cx: x(value), cy: y(line.y[place]), r: 4.5, fill: "none"}).style.stroke = color(line.number);
    const swatch = make("span", {className: "swatch"});
    swatch.style.background = color(line.number);
    const interval = line.low && known(line.low[place]) ? ` [${shown(line.low[place])}, ${shown(line.high[place])}]` : "";
    const step = line.steps ? `, step ${line.steps[place]}` : "";
    rows.push(make("div", {}, swatch, make("span", {textContent: `${visible(line.name)}${step}: ${shown(line.y[place])}${interval}`})));
  }
  const marks = (spec.marks || []).filter((mark) => mark.step === value);
  for (const mark of marks.slice(0, 3)) rows.push(make("div", {textContent: visible(`${NAMES[mark.kind]}: ${mark.name} ${mark.detail}`).slice(0, 80)}));
  if (marks.length > 3) rows.push(make("div", {textContent: `${marks.length - 3} more in the list of events`}));
  tip.replaceChildren(make("div", {textContent: `${spec.xTitle} ${shown(value)}`}), ...rows);
  tip.hidden = false;
  const left = x(value) > width / 2 ? x(value) - tip.offsetWidth - 10 : x(value) + 10;
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = "34px";
}

function hide(state) {
  state.cursor = null;
  state.tip.hidden = true;
  state.layer.replaceChildren();
}
