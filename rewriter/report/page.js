"use strict";
(() => {
  // light and dark: the system's wish, until the reader says otherwise
  const root = document.documentElement, theme = document.getElementById("theme");
  const wished = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : wished.matches);
  const show = () => {
    theme.setAttribute("aria-pressed", String(dark()));
    theme.textContent = dark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", dark() ? "Use light colours" : "Use dark colours");
  };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; show(); });
  wished.addEventListener("change", show);
  show();

  // what is folded is printed too
  addEventListener("beforeprint", () => {
    for (const d of document.querySelectorAll("details:not([open])")) { d.open = true; d.dataset.was = "shut"; }
  });
  addEventListener("afterprint", () => {
    for (const d of document.querySelectorAll("details[data-was]")) { d.open = false; delete d.dataset.was; }
  });

  const table = document.getElementById("decisions");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  // sorting: figures largest first, words from A; rows without a figure stay last
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const sort = (column, up) => {
    const figures = heads[column].classList.contains("n");
    const key = (row) => {
      const cell = row.cells[column];
      return figures ? (cell.dataset.v === undefined ? null : Number(cell.dataset.v)) : cell.textContent;
    };
    const keyed = rows.map((row, place) => [key(row), place, row]);
    const sign = up ? 1 : -1;
    keyed.sort(([a, i], [b, j]) => {
      if (a === null || b === null) return (a === null) - (b === null) || i - j;
      return sign * (figures ? a - b : compare(a, b)) || i - j;
    });
    const sorted = document.createDocumentFragment();
    for (const [, , row] of keyed) sorted.append(row);
    body.append(sorted);
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : up ? "ascending" : "descending"));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    // a head that holds a button is not repeated on the pages of a print
    addEventListener("beforeprint", () => head.replaceChildren(button.textContent));
    addEventListener("afterprint", () => head.replaceChildren(button));
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      sort(column, now === "none" ? !head.classList.contains("n") : now === "descending");
    });
  });

  // searching
  const search = document.getElementById("search"), count = document.getElementById("count");
  const action = document.getElementById("action"), step = document.getElementById("step");
  const texts = new Map();
  const text = (row) => {
    if (!texts.has(row)) texts.set(row, [...row.cells].map((c) => `${c.textContent} ${c.title}`).join(" ").replaceAll("\u200b", "").toLowerCase());
    return texts.get(row);
  };
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const good = (!action.value || row.dataset.a === action.value)
        && (!step.value || row.dataset.s === step.value)
        && words.every((word) => text(row).includes(word));
      row.hidden = !good;
      shown += good;
    }
    count.textContent = shown === rows.length ? `${shown} decisions` : `${shown} of ${rows.length} decisions`;
  };
  const form = search.form;
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const field of [search, action, step]) field.addEventListener("input", filter);
  filter();
})();
