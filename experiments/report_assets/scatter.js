// Certified radii against smallest distances, and the brackets of whole networks.
function scatter(host, setting) {
  const all = report.points.map(([at, ...rest], place) => [report.series[at], ...rest, place < report.points_broken]);
  const mine = all.filter(([one]) => one.setting === setting);
  if (!mine.length) return void host.append(el("p", { class: "note" }, "No sample was attacked and classified right."));
  const radii = mine.map((point) => point[4]).filter(isNumber);
  const distances = mine.map((point) => point[5]).filter(isNumber);
  const right = 1.05 * Math.max(0, ...radii) || 1;
  const top = 1.08 * Math.max(0, ...distances) || right;
  const panels = panelsOf(setting, shown(setting));
  const place = panelGrid(host, panels.length);
  for (const [name, list] of panels) {
    const points = mine.filter(([one]) => list.includes(one));
    const unit = NORMS[report.settings[setting].norm];
    const panel = new Panel(place, {
      title: name,
      height: 290,
      label: `Smallest adversarial distance over certified radius, ${name}. Arrow keys go from point to point.`,
      x: { kind: "linear", domain: [0, right], label: `certified radius (${unit}, input units)` },
      y: { kind: "linear", domain: [0, top], label: "smallest distance found", space: 45 },
    });
    const edge = Math.min(right, top);
    const [zeroX, zeroY] = [panel.x.place(0), panel.y.place(0)];
    panel.path(`M${zeroX} ${zeroY}L${panel.x.place(edge)} ${panel.y.place(edge)}H${panel.box.right}V${zeroY}z`, {
      fill: "var(--forbidden)",
    });
    panel.path(`M${zeroX} ${zeroY}L${panel.x.place(edge)} ${panel.y.place(edge)}`, { stroke: "var(--ink)" });
    const height = (distance) => (isNumber(distance) ? Math.min(distance, top) : 0.985 * top);
    const put = (part) =>
      part.map(([, , , , radius, distance]) => [Math.min(radius ?? right, right), height(distance)]);
    for (const one of list) {
      const own = points.filter((point) => point[0] === one && !point[6]);
      const style = look(one);
      const dots = panel.mark(put(own.filter((point) => isNumber(point[5]))), style, 2.1);
      if (dots) dots.style.setProperty("opacity", "0.6");
      panel.mark(
        put(own.filter((point) => !isNumber(point[5]))),
        { ...style, marker: MARKERS[4], open: false },
        3,
        true,
      );
    }
    const broken = panel.mark(
      put(points.filter((point) => point[6])),
      { colour: "var(--broken)", marker: CROSS, open: true },
      5.5,
    );
    if (broken) broken.setAttribute("class", "broken-point");
    const stops = points.map((point) => ({
      x: panel.x.place(put([point])[0][0]),
      y: panel.y.place(put([point])[0][1]),
      tip: () => pointBox(point),
    }));
    panel.follow(
      stops.sort((a, b) => a.x - b.x),
      { plane: true },
    );
  }
}
function pointBox([one, cell, index, label, radius, distance, broken]) {
  const rows = [
    ["label", String(label)],
    ["certified radius", short(radius)],
    ["smallest distance", isNumber(distance) ? short(distance) : "none found"],
    ["cell", report.point_cells[cell]],
  ];
  const title = `sample ${index}${broken ? ": certificate broken" : ""}`;
  return [...box(title, [], [[sign(one), one.name], ...rows.map(([key, value]) => ["", key, value])])];
}

function brackets(host, setting) {
  const ends = seriesOf(setting)
    .flatMap((one) => one.bracket)
    .filter((v) => isNumber(v) && v > 0);
  if (!ends.length) return;
  const domain = [Math.min(...ends) / 1.25, Math.max(...ends) * 1.25];
  const panels = panelsOf(setting, shown(setting)).filter(([, list]) => list.length);
  const place = panelGrid(host, panels.length);
  for (const [name, list] of panels) {
    const names = list.map((one) =>
      one.baseline !== null ? one.label : one.threshold === null ? "∞" : short(one.threshold),
    );
    const panel = new Panel(place, {
      title: name,
      height: 60 + 24 * list.length,
      left: 20 + Math.max(20, 6.6 * Math.max(...names.map((text) => text.length))),
      label: `Lower estimate and upper bound of the Lipschitz constant, ${name}. Arrow keys go from row to row.`,
      x: { kind: "log", domain, label: `Lipschitz constant (${NORMS[report.settings[setting].norm]})` },
      y: { kind: "band", names: [...names].reverse() },
    });
    const stops = list.map((one, i) => {
      const [lower, upper] = one.bracket;
      const row = panel.y.place(list.length - 1 - i);
      const style = look(one);
      const x = (value) => panel.x.place(value);
      if (upper > 0) {
        panel.path(lower > 0 ? `M${x(lower)} ${row}H${x(upper)}M${x(lower)} ${row - 5}v10` : "", {
          stroke: style.colour,
          "stroke-width": "2",
        });
        panel.path(`M${x(upper)} ${row - 7}v14`, { stroke: style.colour, "stroke-width": "3" });
      }
      const tip = () =>
        box(
          one.name,
          [],
          [
            [sign(one), "lower estimate", short(lower)],
            ["", "proved bound", short(upper)],
            ["", "bound / estimate", lower > 0 ? short(upper / lower) : "–"],
            ["", "tightness of radii", short(one.tightness, 3)],
            ["", "median radius / distance", short(one.tightness_median, 3)],
          ],
        );
      return { x: upper > 0 ? x(upper) : panel.box.left, y: row, tip };
    });
    panel.follow(stops, { plane: true });
  }
}
