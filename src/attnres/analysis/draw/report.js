"use strict";
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
