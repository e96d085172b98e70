// A click on a column's head sorts the table; a link to a cell opens the fold that it is in.
document.addEventListener("DOMContentLoaded", () => {
  for (const button of document.querySelectorAll("table.sortable th button")) button.onclick = () => {
    const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const x = value(a), y = value(b), m = parseFloat(x), n = parseFloat(y);
      if (isNaN(m) !== isNaN(n)) return isNaN(m) ? 1 : -1;
      return (isNaN(m) ? x.localeCompare(y) : m - n) * (down ? -1 : 1);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  };
  const open = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let e = target; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
    target?.scrollIntoView();
  };
  addEventListener("hashchange", open);
  if (location.hash) open();
});
