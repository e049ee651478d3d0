// The robustness table: sorted by its headers, filtered by text and settings, in views of its columns.
function setUpTable() {
  const table = document.getElementById("robustness");
  const controls = document.getElementById("table-controls");
  const [body, heads] = [table.tBodies[0], [...table.tHead.rows[0].cells]];
  const rows = [...body.rows].map((row, at) => ({
    row,
    at,
    cells: [...row.cells],
    text: row.textContent.toLowerCase(),
  }));
  const chosen = new Map();
  const search = el("input", { type: "search", placeholder: "any text", oninput: filter });
  const told = el("output", { class: "count" });

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const one of rows) {
      const fits = [...chosen].every(([test, value]) => value === "" || test(one, value));
      one.row.hidden = !(fits && words.every((word) => one.text.includes(word)));
      left += !one.row.hidden;
    }
    told.textContent = `${left} of ${rows.length} rows`;
  }
  function addSelect(name, values, test) {
    chosen.set(test, "");
    controls.append(
      select(name, [["", "all"], ...values.map((value) => [value, value])], "", (value) => {
        chosen.set(test, value);
        filter();
      }),
    );
  }
  function sort(at) {
    const down =
      heads[at].getAttribute("aria-sort") === "ascending" ||
      (heads[at].getAttribute("aria-sort") === "none" && at > lastLabel);
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === at ? (down ? "descending" : "ascending") : "none"));
    const value = (one) => {
      const v = one.cells[at].dataset.v;
      return v === undefined ? null : v === "inf" ? Infinity : Number(v);
    };
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null && y === null) {
        const [s, t] = [one(a), one(b)];
        return (s === "–") - (t === "–") || (down ? -1 : 1) * s.localeCompare(t, "en", { numeric: true });
      }
      if (x === null || y === null) return (x === null) - (y === null); // what is missing comes last, either way
      return x === y ? 0 : (down ? -1 : 1) * (x < y ? -1 : 1);
    };
    const one = (row) => row.cells[at].textContent;
    rows.sort((a, b) => compare(a, b) || a.at - b.at);
    body.append(...rows.map(({ row }) => row));
  }
  const lastLabel = heads.findLastIndex((head) => head.classList.contains("v-label"));

  controls.append(el("label", {}, "Filter ", search));
  heads.slice(0, lastLabel).forEach((head, at) => {
    const values = [...new Set(rows.map(({ cells }) => cells[at].textContent))];
    if (values.length > 1) addSelect(head.textContent, values, ({ cells }, value) => cells[at].textContent === value);
  });
  const states = [...new Set(rows.flatMap(({ row }) => row.dataset.states.split(" ")))];
  if (states.length > 1) addSelect("state", states, ({ row }, value) => row.dataset.states.split(" ").includes(value));
  const views = [
    ["main", "main"],
    ["attacks", "attacks"],
    ["bounds", "bounds and costs"],
    ["all", "all"],
  ];
  controls.append(
    radios("view", "Columns", views, "main", (view) => table.setAttribute("data-view", view)),
    told,
  );
  table.setAttribute("data-view", "main");
  heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => sort(at)));
  filter();
}
