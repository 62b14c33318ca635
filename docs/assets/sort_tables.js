// A click on the head of a column sorts its table, a second one the other way.
const NUMBER = /^-?\d[\d,]*(\.\d+)?/;

function keyOf(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = text.match(NUMBER);
  return { text, number: number ? Number(number[0].replaceAll(",", "")) : NaN };
}

// Numbers before words; empty cells last, in both directions.
function compare(a, b, sign) {
  if (!a.text || !b.text) return !a.text - !b.text;
  const numeric = !isNaN(a.number) - !isNaN(b.number);
  if (numeric) return -numeric;
  return sign * (a.number - b.number || a.text.localeCompare(b.text));
}

function sortBy(table, head) {
  const sign = head.ariaSort === "ascending" ? -1 : 1;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.ariaSort = sign > 0 ? "ascending" : "descending";
  const rows = [...table.tBodies[0].rows]
    .map((row) => ({ row, key: keyOf(row, head.cellIndex) }))
    .sort((a, b) => compare(a.key, b.key, sign));
  table.tBodies[0].append(...rows.map(({ row }) => row));
}

for (const table of document.querySelectorAll(".md-content table:not([class])")) {
  if (table.closest(".doc") || !table.tHead || table.tBodies[0].rows.length < 3)
    continue;
  for (const head of table.tHead.rows[0].cells) {
    if (!head.textContent.trim()) continue;
    const button = document.createElement("button");
    button.className = "sort";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, head));
    head.append(button);
  }
}
