"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const T = D.tokens.length, L = D.layers, reads = D.reads, block = D.reads.some(read => read.partial);
let token = null;      // the chosen position; null is the average of all
let spot = null;       // the [read, source] that the readout tells of

// --- numbers

const [low, high] = D.range;
const packed = D.weights.map(text => {
  const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0)), view = new DataView(bytes.buffer);
  return Float32Array.from({length: bytes.length / 2}, (_, i) => low + (high - low) * view.getUint16(2 * i, true) / 65535);
});
const weight = (r, s, t = token) => t === null ? reads[r].mean[s] : packed[r][s * T + t];
const weights = r => reads[r].mean.map((_, s) => weight(r, s));
const influence = (r, s) => reads[r].read_change?.[s] ?? null;
const sum = values => values.reduce((a, b) => a + b, 0);
const effective = r => {
  if (token === null) return reads[r].effective_sources;
  const all = weights(r).map(Math.abs), total = sum(all) || 1;
  return Math.exp(-sum(all.map(w => w > 0 ? w / total * Math.log(w / total) : 0)));
};
const fixed = (x, n = 3) => x === null || x === undefined ? "–" : (+x.toFixed(n) || 0).toFixed(n).replace("-", "−");   // never −0
const signed = (x, n = 4) => (+x?.toFixed(n) > 0 ? "+" : "") + fixed(x, n);
const capital = text => text[0].toUpperCase() + text.slice(1);

// --- words

const reader = r => r === L ? "the output" : `layer ${r + 1} (${reads[r].kind} of Transformer block ${(r >> 1) + 1})`;
const source = (r, s) => reads[r].partial && s === reads[r].columns.length - 1
  ? "its own block so far" : D.columns[reads[r].columns[s]].label;
const brief = text => text.replace(/ of Transformer block \d+\)/, ")");   // for lists: the layer's number says which
const GLYPHS = {"\n": "↵", "\r": "␍", "\t": "→", " ": "·", "\u00a0": "⍽"};
const spelled = text => text === "" ? "∅" : [...text].map(c => GLYPHS[c] ?? (c < " " ? String.fromCodePoint(0x2400 + c.codePointAt(0)) : c)).join("");

// --- elements

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined && child !== false));
  return node;
}
const glyphs = text => [...spelled(text)].map((c, i) => "↵␍→·⍽∅".includes(c) && c !== [...text][i] ? el("i", {}, c) : c);
const section = (id, title, note, ...children) => el("section", {id, "aria-label": title}, el("h2", {}, title), note && el("p", {class: "note"}, note), ...children);
const drawn = [];      // what is drawn again when another token is chosen
const live = draw => { drawn.push(draw); draw(); };

// --- heat maps

function heat(caption, rows, columns, cell, {enter, wide = columns.length > 48, label}) {
  const numbered = columns.length <= 14 ? 1 : 0, every = columns.length <= 12 ? 1 : 4 * Math.ceil(columns.length / 32);
  const head = el("tr", {}, el("td"), ...columns.map((c, i) => el("th", {scope: "col"}, el("span", {}, i % every ? "" : c))));
  const body = el("tbody"), cells = new Map();
  const table = el("table", {class: "heat", role: "grid", "aria-label": label}, el("caption", {}, caption), el("thead", {}, head), body);
  if (wide) table.style.minWidth = `${columns.length * 9 + 40}px`;
  for (const row of rows) {
    const line = el("tr", {class: row.last ? "last" : null}, el("th", {scope: "row"}, row.label));
    columns.forEach((_, column) => {
      const found = cell(row.key, column);
      const td = el("td", found ? {role: "gridcell", tabindex: "-1"} : {"aria-hidden": "true"});
      if (found) cells.set(`${row.key} ${column}`, td), td.at = [row.key, column];
      line.append(td);
    });
    body.append(line);
  }
  const all = [...cells.values()];
  let stop = all[0];
  const visit = (td, focus) => {
    if (!td?.at) return;
    stop?.setAttribute("tabindex", "-1");
    stop = td;
    td.setAttribute("tabindex", "0");
    td.setAttribute("aria-label", enter(...td.at));
    if (focus) td.focus();
  };
  stop?.setAttribute("tabindex", "0");
  table.addEventListener("pointerover", event => visit(event.target.closest("td"), false));
  table.addEventListener("click", event => visit(event.target.closest("td"), true));
  table.addEventListener("focusin", event => visit(event.target.closest("td"), false));
  table.addEventListener("keydown", event => {
    const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -999], End: [0, 999]}[event.key];
    if (!move || !event.target.at) return;
    event.preventDefault();
    let y = event.target.parentNode.sectionRowIndex + move[0], x = event.target.cellIndex + Math.sign(move[1]);
    const line = body.rows[y];
    if (Math.abs(move[1]) > 1) { const there = [...line.cells].filter(td => td.at); return visit(there[move[1] > 0 ? there.length - 1 : 0], true); }
    if (!line) return;
    while (move[0] && x > 0 && !line.cells[x]?.at) x--;     // a row above is shorter
    visit(line.cells[x], true);
  });
  const draw = () => {
    for (const td of all) {
      const {t, negative, partial, missing, text} = cell(...td.at);
      td.style.setProperty("--t", missing ? 0 : t.toFixed(4));
      td.className = (missing ? "unmeasured" : "c") + (negative ? " neg" : "") + (partial ? " p" : "");
      td.textContent = numbered && text ? text : "";
    }
    mark();
  };
  drawn.push(draw);
  return {node: el("div", {class: "scroll"}, table), cells, draw, visit};
}

const maps = [];
function mark() {
  for (const on of document.querySelectorAll(".heat .on")) on.classList.remove("on");
  if (!spot) return;
  const key = `${spot[0]} ${reads[spot[0]].columns[spot[1]]}`;
  for (const map of maps) map.cells.get(key)?.classList.add("on");
}
const readout = el("output", {class: "read", "aria-live": "polite"});
function tell() {
  readout.classList.toggle("told", spot !== null);
  if (!spot) {
    readout.replaceChildren("Point at a cell, tap it, or move with the arrow keys: what the layer of its row reads from the source of its column.");
    return "";
  }
  const [r, s] = spot, w = weight(r, s), equal = sum(weights(r)) / reads[r].mean.length, change = influence(r, s);
  const words = [`${capital(reader(r))} reads ${source(r, s)} with weight `, el("b", {}, fixed(w)),
    ` (${equal ? fixed(w / equal, 2) : "–"} × an equal share`, token === null ? ", all tokens)" : `, at “${spelled(D.tokens[token])}”)`, "."];
  if (change !== null) words.push(" Without it there the loss changes by ", el("b", {}, signed(change)), " nats a token.");
  readout.replaceChildren(...words);
  return readout.textContent;
}
const point = (r, column) => { spot = [r, reads[r].columns.indexOf(column)]; mark(); return tell(); };

const changes = reads.flatMap(read => read.read_change ?? []).filter(x => x !== null).map(Math.abs);
const largest = Math.max(1e-9, ...changes);
const isPartial = (r, s) => reads[r].partial && s === reads[r].columns.length - 1;
const weightCell = (r, column) => {
  const s = reads[r].columns.indexOf(column);
  if (s < 0) return null;
  const w = weight(r, s);
  return {t: Math.sqrt(Math.min(1, Math.abs(w))), negative: w < 0, partial: isPartial(r, s), text: fixed(w, 2).replace(/^0/, "")};
};
const influenceCell = (r, column) => {
  const s = reads[r].columns.indexOf(column);
  if (s < 0) return null;
  const x = influence(r, s);
  return {t: x === null ? 0 : Math.sqrt(Math.abs(x) / largest), negative: x < 0, missing: x === null, partial: isPartial(r, s),
    text: x === null ? "" : fixed(x, Math.abs(x) < .1 ? 3 : 2).replace(/^(−?)0\./, "$1.")};
};
const short = D.columns.map(column => column.short);
const rowsOf = first => [...Array(L + 1).keys()].filter(r => r === L ? first === 0 : r % 2 === first)
  .map(r => ({key: r, label: r === L ? "out" : `${r + 1}`, last: r === L}));
const mapOf = (title, first, cell) => {
  const kinds = [...new Set(reads.filter(read => read.layer < L && read.layer % 2 === first).map(read => read.kind))].join(", ");
  const map = heat(`Before ${kinds}`, rowsOf(first), short, cell, {enter: point, label: `${title} before ${kinds}: rows are layers, columns are sources`});
  maps.push(map);
  return map.node;
};
const swatches = (ticks, scale, show) => ticks.map(x => el("span", {}, el("i", {class: "swatch", "--t": scale(x)}), show(x)));
const weightKey = el("div", {class: "key"}, "Weight", ...swatches([0, .05, .1, .25, .5, 1], Math.sqrt, String),
  block && el("span", {}, "dot: the block's own sum so far"),
  reads.some(read => !read.columns.length) && el("span", {}, "empty row: a layer without a read, which sees a plain sum"));
const influenceKey = el("div", {class: "key"}, "Nats", ...swatches([0, .05, .25, 1], Math.sqrt, x => x ? fixed(x * largest, 4) : "0"),
  el("span", {}, el("i", {class: "swatch neg", "--t": .5}), "the loss falls"));

// --- the token strip

const strip = el("div", {class: "strip", role: "listbox", "aria-label": "Tokens of the text", "aria-orientation": "horizontal"});
const chips = D.tokens.map((text, t) => el("span", {class: "token", role: "option", tabindex: "-1", "aria-selected": "false",
  "aria-label": `token ${t}: ${spelled(text)}`, onclick: () => choose(t, true)}, ...glyphs(text)));
chips.forEach((chip, t) => strip.append(chip, ...(/\n$/.test(D.tokens[t]) ? [el("br")] : [])));
const average = el("button", {type: "button", "aria-pressed": "true", onclick: () => choose(null)}, "All tokens");
const said = el("p", {class: "said", "aria-live": "polite"});
strip.addEventListener("keydown", event => {
  const at = chips.indexOf(event.target.closest(".token")), near = 24;
  const to = {ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: lineAway(at, 1), ArrowUp: lineAway(at, -1), Home: 0, End: T - 1, PageDown: at + near, PageUp: at - near}[event.key];
  if (event.key === "Escape") choose(null), chips[Math.max(0, at)].focus();
  else if (to !== undefined) choose(Math.max(0, Math.min(T - 1, to)), true);
  else if (event.key === "Enter" || event.key === " ") choose(at, true);
  else return;
  event.preventDefault();
});
function lineAway(at, step) {   // the token above or below
  const from = chips[at].getBoundingClientRect();
  let best = at, found = null;
  for (let t = at + step; t >= 0 && t < T; t += step) {
    const box = chips[t].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    if (found !== null && Math.abs(box.top - found) > 4) break;
    if (found === null || Math.abs(box.left - from.left) < Math.abs(chips[best].getBoundingClientRect().left - from.left)) best = t;
    found = box.top;
  }
  return best;
}
function choose(t, focus = false) {
  chips.forEach((chip, i) => { chip.setAttribute("aria-selected", i === t); chip.tabIndex = i === (t ?? 0) ? 0 : -1; });
  average.setAttribute("aria-pressed", t === null);
  token = t;
  for (const draw of drawn) draw();
  tell();
  if (focus) chips[t].focus({preventScroll: false});
}
function describe() {
  if (token === null) return said.replaceChildren(`Averages over ${T} tokens; the loss is ${fixed(D.mean_loss)} nats a token. Choose a token to see where its own layers listened.`);
  const next = token + 1 < T ? [", then predicts ", el("b", {}, `“${spelled(D.tokens[token + 1])}”`), ` at a loss of ${fixed(D.loss[token])} nats`] : [], f = D.focus[token];
  said.replaceChildren(`Position ${token}: the model reads `, el("b", {}, `“${spelled(D.tokens[token])}”`), ...next, `. Its reads are ${fixed(100 * f, 0)} % of the way from equal weights to a single source each.`);
}
const MARKS = {nothing: () => 0, loss: t => (D.loss[t - 1] ?? 0) / Math.max(...D.loss.filter(x => x !== null)), focus: t => {
  const lowest = Math.min(...D.focus), most = Math.max(...D.focus); return (D.focus[t] - lowest) / (most - lowest || 1); }};
const marks = el("select", {onchange: () => underline()}, el("option", {value: "loss"}, "how surprising it was"), el("option", {value: "focus"}, "how narrowly its layers listened"), el("option", {value: "nothing"}, "nothing"));
const underline = () => chips.forEach((chip, t) => chip.style.setProperty("--mark", MARKS[marks.value](t).toFixed(3)));

// --- lists

const meter = (x, most, warm) => el("span", {class: `meter${warm ? " warm" : ""}${x < 0 ? " less" : ""}`, "--w": Math.min(1, Math.abs(x ?? 0) / (most || 1))});
const named = row => capital(row.column === null ? row.label : brief(D.columns[row.column].label));
const header = (...names) => el("thead", {}, el("tr", {}, ...names.map(([name, kind]) => el("th", {scope: "col", class: kind}, name))));

function worth() {
  const body = el("tbody"), table = el("table", {class: "list", id: "worth"}, header(["Source"], ["Weight", "b"], ["", "n"], ["Loss without it", "b"], ["", "n"]), body);
  live(() => {
    const rows = D.ablation.map(row => token === null ? [row, row.mean_weight, row.mean_change] : [row, row.token_weight[token], row.change[token]]);
    const w = Math.max(...rows.map(row => row[1])), c = Math.max(...rows.map(row => Math.abs(row[2] ?? 0)));
    body.replaceChildren(...rows.map(([row, mean, change]) => el("tr", {}, el("th", {scope: "row"}, named(row)),
      el("td", {class: "b"}, meter(mean, w)), el("td", {class: "n"}, fixed(mean)), el("td", {class: "b"}, meter(change, c, true)), el("td", {class: "n"}, signed(change, 3)))));
  });
  return table;
}

const skipsNow = () => reads.flatMap((read, r) => {
  const all = weights(r), equal = sum(all) / all.length;
  return all.slice(1, -1).map((w, i) => ({r, s: i + 1, w, more: w - equal}));
}).filter(skip => skip.more > 0).sort((a, b) => b.more - a.more).slice(0, 12);
function skips() {
  const body = el("tbody"), table = el("table", {class: "list", id: "skips"}, header(["Reader and source"], ["Weight", "n"], ["Beyond equal", "n"], ["Loss without it", "n"]), body);
  live(() => body.replaceChildren(...skipsNow().map(({r, s, w, more}) => el("tr", {}, el("td", {},
    el("button", {class: "go", type: "button", onclick: () => { point(r, reads[r].columns[s]); document.getElementById("maps").scrollIntoView({behavior: "smooth"}); }}, `${capital(brief(reader(r)))} ← ${brief(source(r, s))}`)),
  el("td", {class: "n"}, fixed(w)), el("td", {class: "n"}, signed(more, 3)), el("td", {class: "n"}, signed(influence(r, s)))))));
  return table;
}

function spread() {
  const most = Math.max(...reads.map(read => read.columns.length));
  const bars = reads.map((read, r) => el("div", {class: r === L ? "out" : r % 2 ? "mlp" : "", "--n": read.columns.length / most, role: "img"}, el("span", {class: "of"}), el("span", {class: "is"})));
  live(() => bars.forEach((bar, r) => {
    const text = `${capital(reader(r))}: ${fixed(effective(r), 1)} effective of ${reads[r].columns.length} sources, entropy ${fixed(Math.log(effective(r)), 2)} nats`;
    bar.style.setProperty("--e", effective(r) / most); bar.title = text; bar.setAttribute("aria-label", text);
  }));
  const every = Math.ceil((L + 1) / 26);
  return [el("div", {class: "spread", id: "spread"}, ...bars), el("div", {class: "axis", "aria-hidden": "true"}, ...reads.map((_, r) => el("span", {}, r === L ? "out" : r % (2 * every) ? "" : `${r + 1}`))),
    el("p", {class: "note bar"}, el("span", {}, el("i", {class: "chip"}), `before ${reads[0].kind}`), el("span", {}, el("i", {class: "chip", style: "background: var(--warm)"}), `before ${reads[1]?.kind ?? "MLP"}`), el("span", {}, `height: effective sources, of at most ${most}; frame: equal weights`))];
}

const amid = t => [el("i", {}, spelled(D.tokens.slice(Math.max(0, t - 12), t).join("")).slice(-12)), el("b", {}, spelled(D.tokens[t])),
  el("i", {}, spelled(D.tokens.slice(t + 1, t + 9).join("")).slice(0, 8))];   // a token, and faintly what is around it
function sinks() {
  const sources = [...D.ablation].filter(row => row.readers > 1).sort((a, b) => b.relative_weight - a.relative_weight).slice(0, 8);
  const tokens = D.focus.map((f, t) => [f, t]).sort((a, b) => b[0] - a[0]).slice(0, 8);
  return el("div", {class: "pair"},
    el("div", {}, el("h3", {}, "Sources"), el("table", {class: "list"}, header(["Source"], ["× equal share", "n"], ["reads above 2 ×", "n"]), el("tbody", {}, ...sources.map(row =>
      el("tr", {}, el("th", {scope: "row"}, named(row)), el("td", {class: "n"}, fixed(row.relative_weight, 2)), el("td", {class: "n"}, `${fixed(100 * row.persistence, 0)} %`)))))),
    el("div", {}, el("h3", {}, "Tokens"), el("table", {class: "list"}, header(["Token"], ["Position", "n"], ["Focus", "n"]), el("tbody", {}, ...tokens.map(([f, t]) =>
      el("tr", {}, el("td", {}, el("button", {class: "go", type: "button", onclick: () => choose(t, true)}, el("code", {}, ...amid(t)))), el("td", {class: "n"}, t), el("td", {class: "n"}, `${fixed(100 * f, 0)} %`)))))));
}

function mixing() {
  const said = el("output", {class: "note", "aria-live": "polite"}), most = Math.max(...D.mixing.flat().map(x => Math.abs(x ?? 0))) || 1;
  const cell = (r, column) => column > r ? null : {t: Math.sqrt(Math.abs(D.mixing[r][column] ?? 0) / most), negative: D.mixing[r][column] < 0, text: fixed(D.mixing[r][column], 2)};
  const enter = (r, column) => said.textContent = `${capital(reader(r))} is made of ${column ? `the output of layer ${column}` : "the embedding"} times ${fixed(D.mixing[r][column])}.`;
  const map = heat("", reads.map((_, r) => ({key: r, label: r === L ? "out" : `${r + 1}`, last: r === L})), [...Array(L + 1).keys()].map(i => i ? `${i}` : "emb"), cell,
    {enter, label: "Depth mixing matrix: rows are layers, columns are the embedding and layer outputs"});
  return el("div", {class: "mixing"}, map.node, el("p", {}, said));
}

// --- the page

const worst = [...D.ablation].filter(row => row.column !== null && row.mean_change !== null).sort((a, b) => b.mean_change - a.mean_change)[0], first = D.skips[0];
const missing = (done, of, what) => of === 0 ? el("p", {class: "note"}, "Not measured (--no-per-read).")   // of what needs further passes
  : done === of ? null : el("p", {class: "note missing"}, D.minutes === null
    ? `Not measured yet: this page was written before any of the ${of} ${what}, and is written anew once they are measured. If the command was stopped, it stays so.`
    : `Measured: ${done} of ${of} ${what} within --minutes ${D.minutes}; dashes and hatched cells were not.`);
const facts = Object.entries({Model: D.model, Residual: D.residual, Size: `${L / 2} Transformer blocks, ${D.parameters.toLocaleString("en")} parameters`, Text: `${T} tokens`, Loss: `${fixed(D.mean_loss, 4)} nats a token over ${T - 1} predictions`,
  Command: D.command, Version: `attnres ${D.version}, torch ${D.torch}`}).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, name === "Command" ? el("code", {}, value) : value)]);

document.getElementById("app").replaceChildren(
  el("header", {}, el("p", {class: "eyebrow"}, `attnres inspect · ${D.model}`), el("h1", {}, "Where each layer listens"),
    el("p", {class: "lede"}, `Every layer of this model chooses, token by token, how much of the embedding and of earlier ${block ? "blocks" : "layers"} it reads. `,
      first ? `Its strongest learned skip: ${reader(first.layer)} reads ${D.columns[first.column].label} with weight ${fixed(first.weight, 2)}. ` : "",
      worst ? `It can least do without ${D.columns[worst.column].label}: unheard by every later layer, the loss changes by ${signed(worst.mean_change, 2)} nats a token.` : "")),
  section("tokens", "The text", null, el("div", {class: "bar"}, average, el("label", {}, "Underlined by", marks)), strip, said),
  section("maps", "Weight and influence", "Rows are layers, columns what they can read. Weight: of all tokens or of the one chosen above. Influence: how much the mean loss changes when that one read goes without that one source, the others sharing its weight in proportion. Weight is not influence: compare the two.",
    el("div", {class: "maps"}, el("div", {}, el("h3", {}, "Weight"), mapOf("Weight", 0, weightCell), mapOf("Weight", 1, weightCell), weightKey),
      el("div", {}, el("h3", {}, "Influence"), mapOf("Influence", 0, influenceCell), mapOf("Influence", 1, influenceCell), changes.length ? influenceKey : null, missing(D.measured[2], D.measured[3], "cells"))), readout),
  section("sources", "What each source is worth", "Mean weight where the source is read beside others, and the change of the loss, in nats, when no later layer hears it. At a chosen token: its weights, and the change of the loss of the prediction made there.", worth(), missing(D.measured[0], D.measured[1], "sources")),
  section("learned", "Strongest learned skips", "Reads of neither the embedding nor the newest source with the most weight beyond an equal share, which is where training starts.", skips()),
  section("entropy", "How widely each layer listens", "The exponential of the entropy of a read's weights: as many equally weighted sources would be as spread out.", ...spread()),
  section("sinks", "Sinks", "Sources that hold more than an equal share wherever they are read, and tokens whose layers listen most narrowly: 0 % is equal weights, 100 % one source in every read.", sinks()),
  section("mixing", "What layers are made of", `The depth mixing matrix: weights of the embedding and of each layer's output in what a layer reads, on the scale of the read, the mean over tokens. Its semiseparable rank is ${D.semiseparable_rank} of at most ${(L + 2) >> 1}: as many states as a recurrence over depth would need.`, mixing()),
  el("footer", {}, el("dl", {class: "facts"}, ...facts), el("p", {class: "note"}, "Weights of several heads are averaged. A read with one source alone keeps it when that source is left out. The change of the loss is measured on this text only.")));
live(describe);
chips[0].tabIndex = 0;
underline();
for (const draw of drawn) draw();
tell();
