// Clean, observed and certified accuracy over the thresholds, the gap between the last two filled.
function sandwich(host, setting) {
  const { eps } = report.settings[setting];
  const which = state.printing
    ? eps.map((_, i) => i)
    : [Math.min(state.eps.get(setting) ?? Math.floor(eps.length / 2), eps.length - 1)];
  for (const at of which) sandwichAt(host, setting, at);
}
function sandwichAt(host, setting, at) {
  const { eps, norm } = report.settings[setting];
  const panels = panelsOf(setting, seriesOf(setting));
  const baselines = panels.filter(([name]) => name === "baselines").flatMap(([, list]) => list);
  const others = panels.filter(([name]) => name !== "baselines");
  const drawn = others.length ? others : [["baselines", []]];
  const place = panelGrid(host, drawn.length);
  for (const [name, list] of drawn) {
    const all = [...list, ...baselines];
    const panel = new Panel(place, {
      title: state.printing ? `${name}, ε = ${short(eps[at])}` : name,
      label: `Clean, observed and certified accuracy over the thresholds at ε = ${eps[at]}, ${name}. Arrow keys move along the thresholds.`,
      x: {
        kind: "band",
        names: all.map((one) =>
          one.baseline !== null ? one.label : one.threshold === null ? "∞" : short(one.threshold),
        ),
        label: list.length ? "threshold of the layers' norm" : "",
      },
      y: {
        kind: "linear",
        domain: [0, 1],
        label: `accuracy (%) at ${NORMS[norm]} ε = ${short(eps[at])}`,
        format: (v) => String(Math.round(100 * v)),
        space: 40,
      },
    });
    if (list.length && baselines.length) {
      const x = (panel.x.place(list.length - 1) + panel.x.place(list.length)) / 2;
      panel.path(`M${x} ${panel.box.top}V${panel.box.bottom}`, { stroke: "var(--line)", "stroke-width": "1.5" });
    }
    sandwichParts(
      panel,
      list.map((_, i) => i),
      all,
      at,
    );
    baselines.forEach((_, i) => sandwichParts(panel, [list.length + i], all, at));
    const value = (one, kind) => {
      const [mean, half] = one.sandwich[kind][at];
      return percent(mean) + (isNumber(half) ? ` ± ${percent(half)}` : "");
    };
    const tip = (one) => () =>
      box(
        one.name + (one.note ? ` (${one.note})` : ""),
        [],
        ["clean", "observed", "certified"].map((kind) => [kindSign(kind), kind, value(one, kind)]),
      );
    panel.follow(all.map((one, i) => ({ x: panel.x.place(i), tip: tip(one) })));
  }
}
const KIND_MARKS = { clean: [MARKERS[1], "2 3"], observed: [MARKERS[0], "5 4"], certified: [MARKERS[4], null] };
function kindSign(kind) {
  const [marker, dash] = KIND_MARKS[kind];
  const line = svg("path", {
    d: "M1 6H27",
    fill: "none",
    "stroke-dasharray": dash,
    style: { stroke: FILLED[kind], "stroke-width": "2" },
  });
  return svg(
    "svg",
    { width: 28, height: 12, class: "sign", "aria-hidden": "true" },
    line,
    svg("path", { d: marker(14, 6, 3.4), style: { fill: FILLED[kind] } }),
  );
}
function sandwichParts(panel, places, all, at) {
  const point = (place, kind) => all[place].sandwich[kind][at];
  const known = places.filter((place) => isNumber(point(place, "certified")[0]));
  const gap = known.filter((place) => isNumber(point(place, "observed")[0]));
  const xy = (place, kind, shift = 0) => `${panel.x.place(place) + shift} ${panel.y.place(point(place, kind)[0])}`;
  if (gap.length > 1)
    panel.path(
      `M${gap.map((p) => xy(p, "observed")).join("L")}L${[...gap]
        .reverse()
        .map((p) => xy(p, "certified"))
        .join("L")}z`,
      { fill: "var(--gap)" },
    );
  if (gap.length === 1)
    panel.path(
      `M${xy(gap[0], "observed", -9)}L${xy(gap[0], "observed", 9)}L${xy(gap[0], "certified", 9)}L${xy(gap[0], "certified", -9)}z`,
      { fill: "var(--gap)" },
    );
  for (const kind of ["clean", "observed", "certified"]) {
    const [marker, dash] = KIND_MARKS[kind];
    const points = known.filter((place) => isNumber(point(place, kind)[0]));
    panel.line(
      points,
      points.map((place) => point(place, kind)[0]),
      { stroke: FILLED[kind], "stroke-width": "2", ...(dash ? { "stroke-dasharray": dash } : {}) },
    );
    for (const place of points) {
      const [mean, half] = point(place, kind);
      if (!isNumber(half)) continue;
      const [x, up, down] = [
        panel.x.place(place),
        panel.y.place(Math.min(1, mean + half)),
        panel.y.place(Math.max(0, mean - half)),
      ];
      panel.path(`M${x - 4} ${up}h8M${x} ${up}V${down}M${x - 4} ${down}h8`, {
        stroke: FILLED[kind],
        "stroke-width": "1.2",
        opacity: "0.5",
      });
    }
    panel.mark(
      points.map((place) => [place, point(place, kind)[0]]),
      { colour: FILLED[kind], marker, open: false },
      3.6,
    );
  }
}
