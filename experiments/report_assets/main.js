// Start-up: what is drawn where, the setting, the theme, and the page on paper.
const CHARTS = {
  curves: [curves],
  sandwich: [sandwich],
  scatter: [scatter],
  bounds: [brackets],
  training: [gradients, validation],
};
const CELLS = { bounds: layers, images };

function settingsShown() {
  return state.printing ? report.settings.map((_, at) => at) : [state.setting];
}
function drawCharts() {
  const focused = document.activeElement?.dataset?.label;
  const section = document.activeElement?.closest("section")?.id;
  for (const [id, views] of Object.entries(CHARTS)) {
    const body = document.querySelector(`#${id} > .body`);
    body.replaceChildren();
    for (const setting of settingsShown()) {
      if (state.printing && report.settings.length > 1) body.append(el("h3", {}, report.settings[setting].name));
      if (id === "sandwich") body.append(el("div", { class: "controls" }, epsChoice(setting)), kinds());
      else body.append(legend(setting, id === "curves" ? ["certified", "observed"] : []));
      for (const view of views) view(body, setting);
    }
  }
  if (focused) document.querySelector(`#${section} button[data-label="${CSS.escape(focused)}"]`)?.focus();
}
function kinds() {
  return el(
    "div",
    { class: "legend" },
    ...["clean", "observed", "certified"].map((kind) => el("span", { class: "kind" }, kindSign(kind), kind)),
  );
}
function epsChoice(setting) {
  const { eps } = report.settings[setting];
  const chosen = Math.min(state.eps.get(setting) ?? Math.floor(eps.length / 2), eps.length - 1);
  const pick = (at) => {
    state.eps.set(setting, at);
    drawCharts();
    document.querySelector(`input[name="eps"]:checked`)?.focus();
  };
  return radios(
    "eps",
    "ε",
    eps.map((value, at) => [at, short(value)]),
    chosen,
    pick,
  );
}
function drawCells() {
  const focused = document.activeElement;
  const [section, kind] = [focused?.closest("section")?.id, focused?.tagName.toLowerCase()];
  for (const [id, view] of Object.entries(CELLS)) {
    const body = document.querySelector(`#${id} > .cell-body`);
    body.replaceChildren();
    for (const setting of settingsShown()) view(body, setting);
  }
  if (section in CELLS && kind === "select") document.querySelector(`#${section} .cell-body select`)?.focus();
  if (section in CELLS && kind === "input") document.querySelector(`#${section} .cell-body input:checked`)?.focus();
}
function draw() {
  drawCharts();
  drawCells();
}

function setUpTheme() {
  const [root, button] = [document.documentElement, document.getElementById("theme")];
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => {
    button.textContent = isDark() ? "Light" : "Dark";
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    name();
  });
  system.addEventListener("change", name);
  name();
}
function setUpPrinting() {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open]):not(#config)")];
    for (const one of opened) one.open = true;
    state.printing = true;
    if (report.series.length) draw();
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
    state.printing = false;
    if (report.series.length) draw();
  });
}

document.documentElement.classList.add("script");
document.documentElement.classList.toggle("data", report.series.length > 0);
setUpTable();
setUpTheme();
setUpPrinting();
configs();
if (report.series.length) {
  if (report.settings.length > 1) {
    const choice = document.getElementById("setting");
    choice.append(...report.settings.map(({ name }, at) => el("option", { value: at }, name)));
    choice.addEventListener("change", () => {
      state.setting = Number(choice.value);
      state.cell = null;
      draw();
    });
    document.getElementById("setting-choice").hidden = false;
  }
  draw();
  let [width, waiting] = [document.body.clientWidth, 0];
  addEventListener("resize", () => {
    if (document.body.clientWidth === width || state.printing) return;
    width = document.body.clientWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawCharts);
  });
}
