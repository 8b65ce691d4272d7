"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)"), at = document.getElementById("at");
const W = Math.min(720, document.getElementById("charts").clientWidth);   // text keeps its size on a phone
const H = 240, L = 64, B = 40, T = 10, R = 12, NS = "http://www.w3.org/2000/svg";
const colour = r => dark.matches ? r.dark : r.colour;
const make = (name, attributes, text) => {
  const element = document.createElementNS(NS, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  return element;
};
function range(values, log) {
  let low = Math.min(...values), high = Math.max(...values);
  if (high <= low) high = low + Math.abs(low || 1) * 0.01;
  if (log) return [Math.log10(low) - 0.02, Math.log10(high) + 0.02];
  return [low - (high - low) * 0.05, high + (high - low) * 0.05];
}
function ticks(low, high, whole) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(whole ? 1 : 0, power * [1, 2, 5, 10].find(n => n * power >= rough));
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({length: last - first + 1}, (_, i) => step * (first + i));
}
const shown = v => v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(3));
function chart(id, title, xs, ys, log, xlabel, ylabel) {
  const [x0, x1] = [Math.min(...xs), Math.max(...xs, xs[0] + 1)], [y0, y1] = range(ys, log);
  const x = v => L + (v - x0) / (x1 - x0) * (W - L - R);
  const y = v => H - B - ((log ? Math.log10(v) : v) - y0) / (y1 - y0) * (H - B - T);
  const svg = make("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title});
  for (const value of log ? ticks(y0, y1).map(v => 10 ** v) : ticks(y0, y1)) {
    svg.append(make("line", {class: "axis", x1: L, x2: W - R, y1: y(value), y2: y(value)}));
    svg.append(make("text", {x: L - 6, y: y(value) + 4, "text-anchor": "end"}, shown(value)));
  }
  for (const value of ticks(x0, x1, true))
    svg.append(make("text", {x: x(value), y: H - B + 18, "text-anchor": "middle"}, value));
  svg.append(make("text", {x: (L + W) / 2, y: H - 4, "text-anchor": "middle"}, xlabel));
  const heading = document.createElement("h2");
  heading.textContent = `${title}, ${ylabel}`;
  const layer = make("g", {});
  svg.append(layer);
  document.getElementById("charts").append(heading, svg);
  return {x, y, layer};
}
const line = (to, points, r, faint) => to.append(make("polyline", {fill: "none", stroke: colour(r),
  "stroke-width": faint ? 1 : 2, opacity: faint ? 0.35 : 1, points: points.map(p => p.join(",")).join(" ")}));
const losses = data.residuals.flatMap(r => [...r.lowest, ...r.highest]);
const loss = chart("loss", "Validation loss", data.steps, losses, false, "Step", "nats per token");
const panels = Object.entries(data.labels).map(([key, label]) => {
  const values = data.residuals.flatMap(r => r[key].flat()).filter(v => v > 0);
  const log = Math.max(...values) > 10 * Math.min(...values);
  return [key, chart(key, label, [1, data.blocks], values, log, "Transformer block", log ? "logarithmic" : "linear")];
});
function draw() {
  const now = +at.value;
  document.getElementById("step").textContent = `step ${data.steps[now]}`;
  loss.layer.replaceChildren();
  for (const r of data.residuals) {
    const points = data.steps.map((s, i) => [loss.x(s), loss.y(r.loss[i])]);
    const edge = (values, i) => [loss.x(data.steps[i]), loss.y(values[i])].join(","), all = [...data.steps.keys()];
    loss.layer.append(make("polygon", {fill: colour(r), opacity: 0.18,
      points: [...all.map(i => edge(r.lowest, i)), ...all.reverse().map(i => edge(r.highest, i))].join(" ")}));
    line(loss.layer, points, r, true);
    line(loss.layer, points.slice(0, now + 1), r);
    loss.layer.append(make("circle", {cx: points[now][0], cy: points[now][1], r: 4, fill: colour(r)}));
  }
  for (const [key, panel] of panels) {
    panel.layer.replaceChildren();
    for (const r of data.residuals) {
      const points = r[key][now].map((v, i) => [panel.x(i + 1), panel.y(v)]);
      line(panel.layer, points, r);
      for (const [cx, cy] of points) panel.layer.append(make("circle", {cx, cy, r: 3, fill: colour(r)}));
    }
  }
  document.getElementById("legend").replaceChildren(...data.residuals.map(r => {
    const item = document.createElement("li"), mark = document.createElement("i");
    mark.style.background = colour(r);
    item.append(mark, `${r.label} ${r.loss[now].toFixed(4)}`);
    return item;
  }));
}
at.max = data.steps.length - 1;
at.value = at.max;
at.addEventListener("input", draw);
dark.addEventListener("change", draw);
let timer = null;
const play = document.getElementById("play");
const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
play.addEventListener("click", () => {
  if (timer) return stop();
  if (+at.value >= +at.max) at.value = 0;
  play.textContent = "Pause";
  timer = setInterval(() => { at.value = +at.value + 1; draw(); if (+at.value >= +at.max) stop(); }, 400);
});
draw();
