"""The frame of HTML pages and the look of the report: style sheet, script, a content policy that forbids requests.

Nothing is fetched: the policy allows inline styles and the one script below, known by its hash, and nothing else.
"""

import base64
import hashlib
from html import escape

from .style import INK, PAPER, RULE, SOFT, Look

_CSS = """
:root { color-scheme: light dark; --paper: %(paper)s; --ink: %(ink)s; --soft: %(soft)s; --rule: %(rule)s; %(light)s
  }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e8eaed; --soft: #a3abb6; --rule: #2e343c;
  %(dark)s } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; -webkit-text-size-adjust: 100%% }
main { max-width: 1040px; margin: 0 auto; padding: 56px 24px 80px }
h1 { font-size: clamp(1.9rem, 5vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; font-weight: 650; margin: 6px
  0 16px }
h2 { font-size: 1.25rem; letter-spacing: -.01em; font-weight: 650; margin: 64px 0 6px }
h3 { font-size: 1rem; font-weight: 650; margin: 0 }
p { margin: 0 0 12px; max-width: 68ch }
.eyebrow, .note, figcaption, .facts, summary { font-size: .875rem; color: var(--soft) }
.lede { font-size: 1.2rem; line-height: 1.5; max-width: 58ch }
.note { max-width: 78ch }
figcaption b { color: var(--ink); font-weight: 600 }
.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.mechanisms { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 24px 32px; margin:
  36px 0 0; padding: 0; list-style: none }
.mechanisms li { display: grid; grid-template-columns: 60px 1fr; gap: 14px; align-items: start }
.mechanisms p { font-size: .9rem; margin: 3px 0 0; color: var(--soft); line-height: 1.45 }
.mechanisms svg { width: 60px; height: 60px; margin-top: 4px }
.chip { display: inline-block; width: .65em; height: .65em; border-radius: 2px; margin-right: .5em; background:
  currentColor }
table { border-collapse: collapse }
.results { width: 100%%; margin: 14px 0 14px; font-size: .95rem }
.results th, .results td { padding: 10px 0 10px 18px; text-align: right; border-bottom: 1px solid var(--rule);
  font-variant-numeric: tabular-nums; vertical-align: top }
.results th:first-child { text-align: left; padding-left: 0; font-weight: 600 }
.results thead th { font-size: .8rem; font-weight: 500; color: var(--soft); vertical-align: bottom; line-height: 1.3
  }
.results small { display: block; color: var(--soft); font-size: .78rem; line-height: 1.35 }
.results .best { font-weight: 700 }
figure { margin: 26px 0 0 }
figure > svg { display: block; width: 100%%; height: auto; max-width: 560px }
figcaption { margin-top: 10px; line-height: 1.5; max-width: 78ch }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 48px }
.beside { display: grid; grid-template-columns: 1fr 1fr; gap: 48px; align-items: center }
.panels { display: grid; grid-template-columns: 1fr 1fr; gap: 16px 40px; margin-top: 12px }
.heat table { width: 100%%; table-layout: fixed; border-collapse: separate; border-spacing: 1px; cursor: crosshair }
.heat caption { text-align: left; font-size: .85rem; color: var(--soft); padding: 0 0 4px 48px }
.heat th { font: inherit; font-size: 11px; line-height: 1; font-weight: 400; color: var(--soft); padding: 0;
  white-space: nowrap; overflow: visible }
.heat thead td { width: 48px }
.heat thead th span { display: flex; justify-content: center; width: 0; margin: 0 auto; padding-bottom: 3px }
.heat tbody th { text-align: right; padding-right: 6px }
.heat tbody td { height: 15px; padding: 0; font-size: 1px; line-height: 1px; color: transparent; overflow: hidden;
  position: relative; text-align: center }
.heat .p::after { content: ""; position: absolute; inset: 0; margin: auto; width: 5px; height: 5px; border-radius:
  50%%; background: var(--paper); box-shadow: 0 0 0 1px var(--soft) }
.heat .on { outline: 2px solid var(--ink); outline-offset: 0; z-index: 1; overflow: visible }
.heat .last > * { border-top: 7px solid transparent; background-clip: padding-box; height: 22px }
.hide { visibility: hidden }
.key { display: flex; flex-wrap: wrap; gap: 6px 22px; align-items: center; margin-top: 12px; padding-left: 48px;
  font-size: .8rem; color: var(--soft) }
.key i { display: inline-block; width: 15px; height: 15px; margin: 0 5px 0 9px; vertical-align: -3px; position:
  relative }
.key output { color: var(--ink); min-width: 20em }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; margin: 12px 0 24px }
.facts dt { color: var(--soft) } .facts dd { margin: 0; color: var(--ink); overflow-wrap: anywhere }
code { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace }
summary { cursor: pointer; padding: 4px 0 } footer { margin-top: 56px; border-top: 1px solid var(--rule);
  padding-top: 16px }
:focus-visible { outline: 2px solid var(--ink); outline-offset: 4px; border-radius: 2px }
@media (max-width: 800px) { .pair, .beside, .panels { grid-template-columns: minmax(0, 1fr); gap: 20px } }
@media (max-width: 640px) {
  main { padding: 32px 16px 56px } .facts { grid-template-columns: 1fr; gap: 0 } .facts dd { margin-bottom: 10px }
  .results, .results tbody { display: block } .results thead { display: none }
    .results tr { display: grid; grid-template-columns: 1fr 1fr; gap: 10px 20px; padding: 14px 0; border-bottom: 1px
    solid var(--rule) }
  .results tbody th { grid-column: 1 / -1 } .results th, .results td { border: 0; padding: 0; text-align: left }
    .results td::before { content: attr(data-label); display: block; font-size: .78rem; color: var(--soft);
    font-weight: 400 }
  .key, .heat caption { padding-left: 0 } .heat thead td { width: 44px }
}
@media print { main { max-width: none } h2, figure { break-inside: avoid } }
"""

_SCRIPT = """
for (const heat of document.querySelectorAll(".heat")) {
  const output = heat.querySelector("output");
  let current;
  const show = cell => {
    if (!cell?.matches("td[class]")) return;
    current?.classList.remove("on");
    current = cell;
    cell.classList.add("on");
    const row = cell.parentNode, column = cell.closest("table").tHead.rows[0].cells[cell.cellIndex].textContent;
    const reader = row.className ? "The output" : `Layer ${row.cells[0].textContent}`;
    const source = column === "emb" ? "the embedding"
      : cell.classList.contains("p") ? "its own block so far" : `${heat.dataset.kind} ${column}`;
    output.textContent = `${reader} reads ${source} with weight ${cell.textContent}`;
  };
  for (const table of heat.querySelectorAll("table")) {
    const rows = table.tBodies[0].rows;
    table.addEventListener("pointerover", event => show(event.target.closest("td")));
    table.addEventListener("focus", () => table.contains(current) || show(rows[0].cells[1]));
    table.addEventListener("keydown", event => {
      const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
      if (!move) return;
      event.preventDefault();
      show(rows[current.parentNode.sectionRowIndex + move[0]]?.cells[current.cellIndex + move[1]]);
    });
  }
}
"""


def page(title: str, body: str, named: dict[str, Look], heat: tuple[list[str], list[str]]) -> str:
    """A complete HTML document that makes no request.

    Args:
        title: plain text.
        body: HTML; its colours are the style sheet's variables, --m0, --m1, ... for the mechanisms in order.
        named: the mechanisms' looks.
        heat: colours of the heat levels, lowest first, on light and on dark paper; classes h0, h1, ... take them.
    """
    light = [f"--m{i}: {look.colour};" for i, look in enumerate(named.values())]
    dark = [f"--m{i}: {look.dark};" for i, look in enumerate(named.values())]
    light += [f"--h{i}: {colour};" for i, colour in enumerate(heat[0])]
    dark += [f"--h{i}: {colour};" for i, colour in enumerate(heat[1])]
    colours = {"paper": PAPER, "ink": INK, "soft": SOFT, "rule": RULE}
    css = _CSS % {**colours, "light": "\n  ".join(light), "dark": "\n  ".join(dark)}
    css += "".join(f".h{i} {{ background-color: var(--h{i}) }}\n" for i in range(len(heat[0])))
    return document(title, f"<main>\n{body}\n</main>", css, _SCRIPT)


def document(title: str, body: str, css: str, script: str) -> str:
    """A complete HTML document with one style sheet and one script, whose policy forbids every request.

    title: plain text; body: HTML.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{css}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
