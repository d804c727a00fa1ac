"use strict";
// A click on a heading sorts its table by the column: rising, falling, as it was.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = { ascending: "descending", descending: "none" };
      const next = order[head.getAttribute("aria-sort")] ?? "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next !== "none") head.setAttribute("aria-sort", next);
      body.append(...sorted(original, column, next, head.classList.contains("number")));
    });
  });
}

// Rows without a number come last in either order.
function sorted(rows, column, order, numeric) {
  if (order === "none") return rows;
  const sign = order === "ascending" ? 1 : -1;
  const key = (row) => row.cells[column].dataset.value ?? NaN;
  return [...rows].sort((one, other) => {
    if (!numeric) {
      const [left, right] = [one, other].map((row) => row.cells[column].textContent);
      return sign * left.localeCompare(right, "en", { numeric: true });
    }
    const [left, right] = [Number(key(one)), Number(key(other))];
    return isNaN(left) || isNaN(right) ? isNaN(left) - isNaN(right) : sign * (left - right);
  });
}
