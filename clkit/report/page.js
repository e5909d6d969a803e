"use strict";
// Sort a table by the column whose head is pressed; empty cells stay at the end.
function sortBy(button) {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending", column = head.cellIndex;
  const key = row => { const raw = row.cells[column].dataset.value; return raw === undefined ? row.cells[column].textContent.trim() : raw === "" ? null : Number(raw); };
  const rows = [...body.rows].map(row => [key(row), row]);
  rows.sort(([a], [b]) => a === null ? (b === null ? 0 : 1) : b === null ? -1 :
    (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true })) * (up ? 1 : -1));
  body.append(...rows.map(([, row]) => row));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
}
// Show the rows that contain every word.
function filterRows(input) {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...document.getElementById(input.getAttribute("aria-controls")).tBodies[0].rows];
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  input.parentElement.querySelector("output").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} runs`;
}
document.addEventListener("click", event => { const button = event.target.closest("th button"); if (button) sortBy(button); });
document.addEventListener("input", event => { if (event.target.matches("input[type=search]")) filterRows(event.target); });
function openTarget() { const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1))); if (target && target.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); } }
window.addEventListener("hashchange", openTarget); openTarget();
