// Single cells: brackets of the layers, closest adversarial images, configuration.
const cellsOf = (setting) => report.cells.filter((cell) => cell.setting === setting);

/** On paper: the best cell of every constraint; on screen the chosen one. */
function cellsShown(setting) {
  const cells = cellsOf(setting);
  if (!state.printing) return [cells.find((cell) => cell.id === state.cell) || bestOf(cells)].filter(Boolean);
  return [...new Set(cells.map((cell) => cell.panel))].map((name) =>
    bestOf(cells.filter((cell) => cell.panel === name)),
  );
}
const bestOf = (cells) => cells.reduce((best, cell) => (!best || cell.score > best.score ? cell : best), null);
const cellName = (cell) => `${cell.name}${cell.diverged ? " (diverged)" : ""}`;

function cellChoice(setting, current) {
  const pick = (id) => {
    state.cell = id;
    drawCells();
  };
  return select(
    "Cell",
    cellsOf(setting).map((cell) => [cell.id, cellName(cell)]),
    current.id,
    pick,
  );
}

function layers(host, setting) {
  for (const cell of cellsShown(setting)) {
    const known = cell.bounds ? Object.keys(NORMS).filter((norm) => cell.bounds[norm]) : [];
    const norm = known.includes(state.norm) ? state.norm : known.includes(cell.norm) ? cell.norm : known[0];
    const controls = el("div", { class: "controls" }, cellChoice(setting, cell));
    if (known.length > 1)
      controls.append(
        radios(
          "layer-norm",
          "Norm",
          known.map((name) => [name, NORMS[name]]),
          norm,
          (value) => {
            state.norm = value;
            drawCells();
          },
        ),
      );
    host.append(
      el("h3", {}, state.printing ? `Layers of ${cellName(cell)} (${NORMS[norm] || ""})` : "Layers of one cell"),
      controls,
    );
    if (!norm) host.append(el("p", { class: "note" }, "The bounds of this cell were not recorded."));
    else host.append(networkFacts(cell, norm), layerTable(cell.bounds[norm].layers, cell));
  }
}
function networkFacts(cell, norm) {
  const { lower, upper, pairwise_min: least, pairwise_max: most } = cell.bounds[norm];
  const facts = [
    ["whole network, proved bound", short(upper, 5)],
    ["estimate from below", lower > 0 ? short(lower, 5) : "not taken in this norm"],
    ["bound / estimate", lower > 0 ? short(upper / lower) : "–"],
    ["pairs of logits", `${short(least)} to ${short(most)}`],
    ["tightness of radii", norm === cell.norm ? short(cell.tightness, 3) : "–"],
    ["median radius / distance", norm === cell.norm ? short(cell.tightness_median, 3) : "–"],
  ];
  return el(
    "dl",
    { class: "facts" },
    ...facts.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value))),
  );
}
function layerTable(rows, cell) {
  if (!rows.length) return el("p", { class: "note" }, "No affine layer.");
  const heads = ["layer", "kind", "norm", "lower", "upper", "upper / lower − 1", "method"];
  const largest = Math.max(...rows.map((row) => row.upper || 0), cell.threshold || 0) || 1;
  const body = rows.map((row) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, row.name),
      el("td", {}, row.kind),
      el("td", {}, normBar(row, cell.threshold, largest)),
      el("td", { class: "num" }, short(row.lower, 6)),
      el("td", { class: "num" }, short(row.upper, 6)),
      el("td", { class: "num" }, row.lower > 0 ? short(row.upper / row.lower - 1, 2) : "–"),
      el("td", {}, row.method),
    ),
  );
  const head = el(
    "tr",
    {},
    ...heads.map((text, at) => el("th", { scope: "col", class: at > 2 && at < 6 ? "num" : null }, text)),
  );
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Layers" },
    el("table", { class: "plain" }, el("thead", {}, head), el("tbody", {}, ...body)),
  );
}
function normBar(row, threshold, largest) {
  const width = (value) => Math.max(1, (130 * (value || 0)) / largest);
  const parts = [
    svg("rect", { x: 0, y: 4, width: width(row.upper), height: 8, class: "upper" }),
    svg("rect", { x: 0, y: 4, width: width(row.lower), height: 8, class: "lower" }),
  ];
  if (isNumber(threshold)) parts.push(svg("path", { d: `M${width(threshold)} 0v16`, class: "limit" }));
  return svg(
    "svg",
    {
      width: 134,
      height: 16,
      class: "norm-bar",
      role: "img",
      "aria-label": `norm ${short(row.upper)}${isNumber(threshold) ? ` of threshold ${threshold}` : ""}`,
    },
    ...parts,
  );
}

function images(host, setting) {
  for (const cell of cellsShown(setting)) {
    host.append(
      state.printing ? el("h3", {}, cellName(cell)) : el("div", { class: "controls" }, cellChoice(setting, cell)),
    );
    if (!cell.closest)
      host.append(el("p", { class: "note" }, "The closest adversarial examples of this cell were not recorded."));
    else if (!cell.closest.length) host.append(el("p", { class: "note" }, "No adversarial example was found."));
    else {
      if (cell.pictures_left_out)
        host.append(
          el(
            "p",
            { class: "note" },
            "The pictures of this cell are left out to keep the page small; choose one of the best cells of its constraint.",
          ),
        );
      else if (!cell.closest[0].pictures)
        host.append(
          el("p", { class: "note" }, `Inputs of shape ${cell.closest[0].shape.join(" × ")} are not shown as pictures.`),
        );
      host.append(
        el(
          "div",
          { class: "gallery" },
          ...cell.closest.slice(0, state.printing ? 6 : 12).map((one) => example(one, cell)),
        ),
      );
    }
  }
}
function example(one, cell) {
  const names = ["original", "adversarial", `change × ${short(1 / (one.largest || 1), 2)}`];
  const alt = [
    `sample ${one.index}, label ${one.label}`,
    `adversarial example, predicted ${one.prediction}`,
    "their difference, scaled",
  ];
  const pictures = (one.pictures || []).map((uri, at) =>
    el("figure", {}, el("img", { src: uri, alt: alt[at], width: 72, height: 72 }), el("figcaption", {}, names[at])),
  );
  return el(
    "article",
    {},
    pictures.length ? el("div", { class: "trio" }, ...pictures) : null,
    el("p", {}, el("b", {}, `${one.label} → ${one.prediction}`), el("small", {}, `sample ${one.index}`)),
    el(
      "p",
      { class: "pair" },
      el("span", {}, "distance"),
      el("span", { class: "num" }, short(one.distance, 3)),
      el("span", {}, `certified ${NORMS[cell.norm]}`),
      el("span", { class: "num" }, short(one.radius, 3)),
    ),
  );
}

/** The config of any cell, put together from the shared settings and its own. */
function configJson(row) {
  const { shared, differing, order } = report.config;
  const own = Object.fromEntries(differing.map((field, at) => [field, row[at + 1]]));
  return JSON.stringify(
    Object.fromEntries(order.map((field) => [field, field in own ? own[field] : shared[field]])),
    null,
    2,
  );
}
function configs() {
  const choice = document.getElementById("config-cell");
  const output = document.getElementById("config-json");
  choice.append(
    ...report.config.rows.map((row, at) =>
      el(
        "option",
        { value: at },
        [row[0], ...report.config.differing.map((field, i) => `${field} ${row[i + 1]}`)].join("  "),
      ),
    ),
  );
  const show = () => {
    output.textContent = configJson(report.config.rows[choice.value || 0]);
  };
  choice.addEventListener("change", show);
  show();
}
