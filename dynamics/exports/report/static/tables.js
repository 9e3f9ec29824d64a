"use strict";
// Tables that sort and copy.

const shownNumber = (text) => {
  const plain = text.replace(/[,\s%]/g, "").replace("−", "-").replace(/^.*→/, "");
  return plain !== "" && Number.isFinite(Number(plain)) ? Number(plain) : NaN;
};

function valueOf(cell) {
  const given = cell.dataset.value;
  const value = given === undefined ? shownNumber(cell.textContent) : given === "" ? NaN : Number(given);
  return { value, text: cell.textContent };
}

function sortBy(table, column, down) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row, i) => ({ row, i, ...valueOf(row.cells[column]) }));
  const sign = down ? -1 : 1;
  rows.sort((a, b) => {
    const [x, y] = [Number.isNaN(a.value), Number.isNaN(b.value)];
    if (x !== y) return x ? 1 : -1; // what is no number comes last, in either order
    if (!x && a.value !== b.value) return sign * (a.value - b.value);
    return sign * a.text.localeCompare(b.text, undefined, { numeric: true }) || a.i - b.i;
  });
  body.append(...rows.map((each) => each.row));
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

// The cells as texts; numbers with all the digits that there are.
function cellsOf(table) {
  const rows = [...table.tHead.rows, ...table.tBodies[0].rows];
  return rows.map((row) => [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent));
}

const tsv = (cells) => cells.map((row) => row.map((text) => text.replace(/[\t\r\n]+/g, " ")).join("\t")).join("\n");
const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
const csv = (cells) => cells.map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

function download(text, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function enlivened(box) {
  const table = box.querySelector("table");
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, column, head.getAttribute("aria-sort") === "ascending"));
    head.append(button);
  });
  const tools = document.createElement("div");
  tools.className = "tools";
  const said = document.createElement("output");
  const name = table.caption.textContent;
  const add = (text, act, done) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.setAttribute("aria-label", `${text}: ${name}`);
    button.addEventListener("click", async () => {
      await act();
      said.textContent = done;
    });
    tools.append(button);
  };
  add("Copy TSV", () => copied(tsv(cellsOf(table))), "Copied.");
  add("Copy CSV", () => copied(csv(cellsOf(table))), "Copied.");
  add("Download CSV", () => download(csv(cellsOf(table)), `${name.replace(/\W+/g, "_")}.csv`), "Saved.");
  tools.append(said);
  box.append(tools);
}

// A table of numbers, built of the data: rows of [text | number].
function numbersTable(caption, columns, rows) {
  const box = document.createElement("div");
  box.className = "table";
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", caption);
  const table = document.createElement("table");
  table.createCaption().textContent = caption;
  const head = table.createTHead().insertRow();
  for (const column of columns) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = column;
    head.append(cell);
  }
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const value of row) {
      const cell = line.insertCell();
      if (typeof value === "number") {
        cell.className = "number";
        cell.dataset.value = Number.isNaN(value) ? "" : String(value);
        cell.textContent = Number.isNaN(value) ? "" : written(value);
      } else cell.textContent = value;
    }
  }
  scroll.append(table);
  box.append(scroll);
  enlivened(box);
  return box;
}
