// What happened over the epochs.
function overEpochs(host, setting, { key, title, y, dashed }) {
  const panels = panelsOf(setting, shown(setting));
  host.append(el("h3", {}, title));
  const grid = panelGrid(host, panels.length);
  for (const [name, list] of panels) {
    const last = Math.max(1, ...seriesOf(setting).flatMap((one) => one.history.epoch));
    const ticks = [...new Set(niceTicks(1, last, 5).filter(Number.isInteger).concat(1))].sort((a, b) => a - b);
    const panel = new Panel(grid, {
      title: name,
      height: 220,
      label: `${title} over the epochs, ${name}. Arrow keys move along the epochs.`,
      x: { kind: "linear", domain: last > 1 ? [1, last] : [0.5, 1.5], ticks, label: "epoch" },
      y,
    });
    const usable = (values) => values.map((value) => (y.kind === "log" && value <= 0 ? null : value));
    for (const [place, one] of list.entries()) {
      const { epoch } = one.history;
      const style = look(one);
      if (dashed)
        panel.line(epoch, one.history[dashed], {
          stroke: style.colour,
          "stroke-width": "1.7",
          "stroke-dasharray": "5 4",
        });
      const values = usable(one.history[key]);
      panel.line(epoch, values, { stroke: style.colour, "stroke-width": "2" });
      const every = Math.max(1, Math.floor(epoch.length / 4));
      panel.mark(
        epoch
          .map((x, i) => [x, values[i], i])
          .filter(([, v, i]) => isNumber(v) && (i + place) % every === 0)
          .map(([x, v]) => [x, v]),
        style,
      );
    }
    const epochs = [...new Set(list.flatMap((one) => one.history.epoch))].sort((a, b) => a - b);
    const value = (one, field, epoch) => one.history[field][one.history.epoch.indexOf(epoch)];
    const format = y.kind === "log" ? short : percent;
    const tip = (epoch) => () =>
      box(
        `epoch ${epoch}`,
        dashed ? ["certified", "accuracy"] : [],
        list.map((one) => [
          sign(one),
          one.label,
          ...[key, dashed].filter(Boolean).map((field) => format(value(one, field, epoch))),
        ]),
      );
    panel.follow(epochs.map((epoch) => ({ x: panel.x.place(epoch), tip: tip(epoch) })));
  }
}
function gradients(host, setting) {
  const values = seriesOf(setting)
    .flatMap((one) => one.history.gradient_norm)
    .filter((v) => isNumber(v) && v > 0);
  if (!values.length) return void host.append(el("p", { class: "note" }, "No gradient norm was recorded."));
  const domain = [Math.min(...values) / 1.3, Math.max(...values) * 1.3];
  overEpochs(host, setting, {
    key: "gradient_norm",
    title: "Gradient norm, mean over the steps of an epoch",
    y: { kind: "log", domain, label: "gradient norm", space: 35 },
  });
}
function validation(host, setting) {
  const y = {
    kind: "linear",
    domain: [0, 1],
    label: "validation accuracy (%)",
    format: (v) => String(Math.round(100 * v)),
    space: 35,
  };
  overEpochs(host, setting, {
    key: "validation_certified_accuracy",
    dashed: "validation_accuracy",
    title: "Validation accuracy: certified at the middle ε (solid), plain (dashed)",
    y,
  });
}
