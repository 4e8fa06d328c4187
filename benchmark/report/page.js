"use strict";
// Every column head becomes a button that sorts its table: numbers by their value, all else as words; blanks stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(table, head, column));
  });
}
function sort(table, head, column) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  const keys = new Map([...body.rows].map((row) => [row, key(row.cells[column])]));
  const numeric = [...keys.values()].some((value) => typeof value === "number");
  const order = (a, b) => (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  const blank = (value) => numeric && typeof value !== "number";
  body.append(...[...body.rows].sort((a, b) => {
    const x = keys.get(a), y = keys.get(b);
    if (blank(x) || blank(y)) return blank(x) - blank(y);
    return up ? order(x, y) : order(y, x);
  }));
}
function key(cell) {
  return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort);
}
const root = document.documentElement;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
