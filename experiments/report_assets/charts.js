// The charts of a setting: a panel a constraint, a colour and marker a threshold.
const seriesOf = (setting) => report.series.filter((one) => one.setting === setting);
const shown = (setting) => seriesOf(setting).filter((one) => !state.hidden.has(one.label));
const FILLED = { certified: "var(--certified)", observed: "var(--observed)", clean: "var(--muted)" };

function panelsOf(setting, list) {
  const names = [...new Set(seriesOf(setting).map((one) => one.panel))];
  return names.map((name) => [name, list.filter((one) => one.panel === name)]);
}

/** A button a threshold and baseline, which hides and shows it in every chart. */
function legend(setting, kindNames) {
  const first = new Map();
  for (const one of seriesOf(setting)) if (!first.has(one.label)) first.set(one.label, { ...one, notes: [] });
  for (const one of seriesOf(setting))
    if (one.note) first.get(one.label).notes.push(`${one.panel === "baselines" ? "" : `${one.panel}: `}${one.note}`);
  const order = [...first.values()].sort(
    (a, b) => (a.baseline ?? -1) - (b.baseline ?? -1) || (a.threshold ?? Infinity) - (b.threshold ?? Infinity),
  );
  const buttons = order.map((one) => {
    const toggle = () => {
      state.hidden.has(one.label) ? state.hidden.delete(one.label) : state.hidden.add(one.label);
      drawCharts();
    };
    const note = one.notes.length ? el("small", {}, ` (${one.notes.join("; ")})`) : null;
    return el(
      "button",
      {
        type: "button",
        "aria-pressed": String(!state.hidden.has(one.label)),
        "data-label": one.label,
        onclick: toggle,
      },
      sign(one),
      one.label,
      note,
    );
  });
  const kinds = kindNames
    .map((name, at) => [name, at ? "4 3" : null])
    .map(([name, dash]) => {
      const line = svg("path", {
        d: "M1 6H27",
        fill: "none",
        "stroke-dasharray": dash,
        style: { stroke: "var(--ink)", "stroke-width": "2" },
      });
      return el(
        "span",
        { class: "kind" },
        svg("svg", { width: 28, height: 12, class: "sign", "aria-hidden": "true" }, line),
        name,
      );
    });
  return el("div", { class: "legend", role: "group", "aria-label": "Series shown" }, ...kinds, ...buttons);
}

function curves(host, setting) {
  const { grid, eps, norm } = report.settings[setting];
  const end = grid[grid.length - 1];
  const panels = panelsOf(setting, shown(setting));
  const place = panelGrid(host, panels.length);
  for (const [name, list] of panels) {
    const panel = new Panel(place, {
      title: name,
      label: `Certified and observed accuracy over ε, ${name}. Arrow keys move along ε.`,
      x: { kind: "linear", domain: [0, end], label: `perturbation size ε (${NORMS[norm]}, input units)` },
      y: {
        kind: "linear",
        domain: [0, 1],
        label: "accuracy (%)",
        format: (v) => String(Math.round(100 * v)),
        space: 40,
      },
    });
    for (const at of eps)
      panel.path(`M${panel.x.place(at)} ${panel.box.top}V${panel.box.bottom}`, {
        stroke: "var(--muted)",
        "stroke-dasharray": "1 4",
      });
    const drawn = list.filter((one) => one.certified);
    drawn.forEach((one, turn) => {
      const style = look(one);
      panel.line(grid, one.certified, { stroke: style.colour, "stroke-width": "2" }, { "data-series": one.label });
      if (one.observed)
        panel.line(grid, one.observed, { stroke: style.colour, "stroke-width": "1.7", "stroke-dasharray": "5 4" });
      const every = Math.max(1, Math.floor(grid.length / 6));
      const at = grid.map((_, i) => i).filter((i) => i % every === Math.floor(((turn + 0.5) * every) / drawn.length));
      panel.mark(
        at.filter((i) => one.certified[i] > 0).map((i) => [grid[i], one.certified[i]]),
        style,
      );
      if (one.observed)
        panel.mark(
          at.map((i) => [grid[i], one.observed[i]]),
          style,
          3,
          true,
        );
    });
    const tip = (i) => () =>
      box(
        `ε = ${short(grid[i])}`,
        ["certified", "observed"],
        drawn.map((one) => [
          sign(one),
          one.label,
          percent(one.certified[i]),
          one.observed ? percent(one.observed[i]) : "–",
        ]),
      );
    if (drawn.length) panel.follow(grid.map((x, i) => ({ x: panel.x.place(x), tip: tip(i) })));
  }
}
