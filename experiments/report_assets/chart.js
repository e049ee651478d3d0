// One panel of a chart: scales, axes, marks, and a pointer that the mouse, a finger or the arrow keys move.
const MARKERS = [
  (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (x, y, r) => `M${x} ${y - 1.35 * r}L${x + 1.35 * r} ${y}L${x} ${y + 1.35 * r}L${x - 1.35 * r} ${y}z`,
  (x, y, r) => `M${x - 1.2 * r} ${y - r}h${2.4 * r}L${x} ${y + 1.2 * r}z`,
  (x, y, r) => `M${x - 1.2 * r} ${y + r}h${2.4 * r}L${x} ${y - 1.2 * r}z`,
  (x, y, r) => `M${x - r} ${y - 0.5 * r}h${2 * r}v${r}h${-2 * r}z`,
  (x, y, r) => `M${x - 0.5 * r} ${y - r}h${r}v${2 * r}h${-r}z`,
];
const CROSS = (x, y, r) => `M${x - r} ${y - r}l${2 * r} ${2 * r}M${x - r} ${y + r}l${2 * r} ${-2 * r}`;
const PLUS = (x, y, r) => `M${x - 1.2 * r} ${y}h${2.4 * r}M${x} ${y - 1.2 * r}v${2.4 * r}`;
const STAR = (x, y, r) => PLUS(x, y, r) + CROSS(x, y, 0.8 * r);
const BAR = (x, y, r) => `M${x - 1.3 * r} ${y}h${2.6 * r}`;

/** Colour and marker of a series: both tell the threshold, so that colour alone never has to. */
function look(one) {
  if (one.baseline !== null) {
    return { colour: `var(--baseline-${one.baseline})`, marker: [CROSS, PLUS, STAR][one.baseline], open: true };
  }
  if (one.rank === null) return { colour: "var(--ink)", marker: BAR, open: true };
  const share = one.ranks > 1 ? one.rank / (one.ranks - 1) : 0;
  const [from, to, part] = share < 0.5 ? [0, 1, 2 * share] : [1, 2, 2 * share - 1];
  const colour = `color-mix(in oklab, var(--ramp-${to}) ${(100 * part).toFixed(1)}%, var(--ramp-${from}))`;
  return { colour, marker: MARKERS[one.rank % MARKERS.length], open: false };
}

function niceTicks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
  const ticks = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high * (1 + 1e-9); at++)
    ticks.push(Number((at * step).toPrecision(10)));
  return ticks;
}
function logTicks(low, high, count) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const steps = last - first <= 1 ? [1, 2, 3, 5] : last - first <= 2 ? [1, 2, 5] : last - first <= 3 ? [1, 3] : [1];
  const every = Math.ceil((last - first) / count);
  const ticks = [];
  for (let power = first; power <= last; power += every)
    for (const step of steps) ticks.push(Number((step * 10 ** power).toPrecision(6)));
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

/** {kind: "linear" | "log" | "band", domain, label, ticks, format}: places of values, and the ticks shown. */
function scale(axis, start, end) {
  const room = Math.abs(end - start);
  if (axis.kind === "band") {
    const place = (at) => start + ((at + 0.5) / axis.names.length) * (end - start);
    return { place, ticks: axis.names.map((name, at) => [at, name]) };
  }
  const [low, high] = axis.domain;
  const log = axis.kind === "log";
  const share = (value) => (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
  const found =
    axis.ticks || (log ? logTicks : niceTicks)(low, high, Math.max(2, Math.floor(room / (axis.space || 60))));
  const format = axis.format || ((value) => short(value, 6));
  return { place: (value) => start + share(value) * (end - start), ticks: found.map((tick) => [tick, format(tick)]) };
}

class Panel {
  /** Draw frame and axes into `host`; `label` tells people who can't see it what it shows. */
  constructor(host, { title, label, x, y, height = 250, left = 46, bottom = 40 }) {
    this.host = el("figure", { class: "panel" });
    if (title) this.host.append(el("figcaption", {}, title));
    host.append(this.host);
    this.width = state.printing ? 340 : Math.max(240, Math.floor(this.host.clientWidth)); // half a page, or what there is
    this.slant =
      x.kind === "band" &&
      Math.max(...x.names.map((text) => 6.8 * text.length + 8)) > (this.width - left - 12) / x.names.length;
    const extra = this.slant ? 3.6 * Math.max(...x.names.map((text) => text.length)) : 0;
    [height, bottom] = [height + extra, bottom + extra];
    this.box = { left, right: this.width - 12, top: 8, bottom: height - bottom };
    this.svg = svg("svg", { viewBox: `0 0 ${this.width} ${height}`, role: "img", "aria-label": label, tabindex: "0" });
    this.host.append(this.svg);
    this.x = scale(x, this.box.left, this.box.right);
    this.y = scale(y, this.box.bottom, this.box.top);
    this.drawAxes(x, y, height);
    this.marks = this.svg.appendChild(svg("g", {}));
  }
  drawAxes(x, y, height) {
    const { left, right, top, bottom } = this.box;
    const grid = svg("g", { class: "grid" });
    const names = svg("g", { class: "axis" });
    for (const [value, text] of this.y.ticks) {
      const at = this.y.place(value);
      if (y.kind !== "band") grid.append(svg("line", { x1: left, x2: right, y1: at, y2: at }));
      names.append(svg("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, text));
    }
    let free = -Infinity;
    for (const [value, text] of this.x.ticks) {
      const at = this.x.place(value);
      const half = 3.4 * text.length + 3;
      if (x.kind !== "band") grid.append(svg("line", { x1: at, x2: at, y1: top, y2: bottom }));
      if (this.slant) {
        names.append(
          svg("text", { transform: `translate(${at + 4} ${bottom + 13}) rotate(-35)`, "text-anchor": "end" }, text),
        );
        continue;
      }
      if (at - half < free) continue;
      free = at + half;
      names.append(svg("text", { x: Math.min(at, this.width - half), y: bottom + 16, "text-anchor": "middle" }, text));
    }
    if (x.label)
      names.append(
        svg("text", { class: "title", x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, x.label),
      );
    if (y.label) {
      const middle = (top + bottom) / 2;
      names.append(
        svg(
          "text",
          { class: "title", transform: `translate(11 ${middle}) rotate(-90)`, "text-anchor": "middle" },
          y.label,
        ),
      );
    }
    this.svg.append(grid, svg("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }), names);
  }
  path(d, style, attributes = {}) {
    return this.marks.appendChild(svg("path", { d, fill: "none", ...attributes, style }));
  }
  /** A line through the points that have numbers, broken where one has none. */
  line(xs, ys, style, attributes = {}) {
    let d = "";
    let open = false;
    xs.forEach((x, at) => {
      if (!isNumber(ys[at])) return void (open = false);
      d += `${open ? "L" : "M"}${this.x.place(x).toFixed(1)} ${this.y.place(ys[at]).toFixed(1)}`;
      open = true;
    });
    return d ? this.path(d, style, attributes) : null;
  }
  mark(points, { colour, marker, open }, size = 3.2, hollow = false) {
    const d = points
      .map(([x, y]) => marker(Number(this.x.place(x).toFixed(1)), Number(this.y.place(y).toFixed(1)), size))
      .join("");
    if (!d) return null;
    const inside = open ? "none" : hollow ? "var(--paper)" : colour;
    return this.path(d, { stroke: colour, fill: inside, "stroke-width": open ? "1.6" : "1.2" });
  }
  /** Stops {x, y, tip} in pixels: the nearest one along x, or in the plane, is told in a box. */
  follow(stops, { plane = false } = {}) {
    if (!stops.length) return;
    const { top, bottom } = this.box;
    const cross = this.svg.appendChild(
      plane
        ? svg("circle", { class: "cross", r: 7, visibility: "hidden" })
        : svg("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" }),
    );
    const tip = el("div", { class: "tip", hidden: true });
    this.host.append(tip);
    let at = null;
    const hide = () => {
      at = null;
      tip.hidden = true;
      cross.setAttribute("visibility", "hidden");
    };
    const show = (next, spoken) => {
      at = next;
      const stop = stops[at];
      if (plane) {
        cross.setAttribute("cx", stop.x);
        cross.setAttribute("cy", stop.y);
      } else {
        cross.setAttribute("x1", stop.x);
        cross.setAttribute("x2", stop.x);
      }
      cross.setAttribute("visibility", "visible");
      tip.setAttribute("aria-live", spoken ? "polite" : "off");
      tip.replaceChildren(...stop.tip());
      tip.hidden = false;
      this.place(tip, stop);
    };
    this.svg.addEventListener("pointermove", (event) => {
      const area = this.svg.getBoundingClientRect();
      const [x, y] = [
        ((event.clientX - area.left) * this.width) / area.width,
        ((event.clientY - area.top) * this.width) / area.width,
      ];
      const gap = (stop) => (plane ? Math.hypot(stop.x - x, stop.y - y) : Math.abs(stop.x - x));
      let best = 0;
      stops.forEach((stop, i) => {
        if (gap(stop) < gap(stops[best])) best = i;
      });
      if (plane && gap(stops[best]) > 30) hide();
      else show(best, false);
    });
    this.svg.addEventListener("pointerleave", hide);
    this.svg.addEventListener("blur", hide);
    this.svg.addEventListener("keydown", (event) => {
      const last = stops.length - 1;
      const step = (event.shiftKey ? 10 : 1) * ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] || 0);
      if (event.key === "Escape") return hide();
      const next = event.key === "Home" ? 0 : event.key === "End" ? last : step ? (at === null ? 0 : at + step) : null;
      if (next === null) return undefined;
      event.preventDefault();
      return show(Math.max(0, Math.min(last, next)), true);
    });
  }
  /** Put the box beside the stop, or below the chart where neither side of the screen has room. */
  place(tip, stop) {
    const area = this.svg.getBoundingClientRect();
    const host = this.host.getBoundingClientRect();
    const x = area.left + (stop.x * area.width) / this.width;
    const [width, end] = [tip.offsetWidth + 14, document.documentElement.clientWidth - 4];
    const fits = x + width <= end || x - width >= 4;
    const left = x + width <= end ? x + 14 : fits ? x - width : Math.max(4, Math.min(end - width, x - width / 2));
    tip.style.setProperty("left", `${left - host.left}px`);
    tip.style.setProperty("top", `${area.top - host.top + (fits ? 8 : area.height)}px`);
  }
}

/** A grid of panels that is laid out for `count` of them before the first is drawn. */
function panelGrid(host, count) {
  const grid = el("div", { class: "panels", "data-count": Math.min(count, 3) });
  host.append(grid);
  return grid;
}

/** The sign of a series in legends and boxes. */
function sign(one, dashed = false) {
  const { colour, marker, open } = look(one);
  const line = svg("path", {
    d: "M1 6H27",
    fill: "none",
    "stroke-dasharray": dashed ? "4 3" : null,
    style: { stroke: colour, "stroke-width": "2" },
  });
  const dot = svg("path", {
    d: marker(14, 6, 3.4),
    style: { stroke: colour, fill: open ? "none" : colour, "stroke-width": "1.6" },
  });
  return svg("svg", { width: 28, height: 12, class: "sign", "aria-hidden": "true" }, line, dot);
}

/** A small table in a box: a title, then rows of a sign, a name and values. */
function box(title, heads, rows) {
  const head = heads.length
    ? [el("tr", {}, el("td"), el("td"), ...heads.map((text) => el("th", { scope: "col" }, text)))]
    : [];
  const body = rows.map(([mark, name, ...values]) =>
    el("tr", {}, el("td", {}, mark), el("td", {}, name), ...values.map((value) => el("td", { class: "num" }, value))),
  );
  return [el("strong", {}, title), el("table", {}, ...head, ...body)];
}
