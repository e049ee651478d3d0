"use strict";
// Elements and numbers. All text goes in as text nodes: nothing of a study is ever read as markup.
const report = JSON.parse(document.getElementById("report-data").textContent);
const SVG = document.getElementById("namespace").namespaceURI;
const NORMS = { l2: "ℓ₂", linf: "ℓ∞", l1: "ℓ₁" };
const state = { setting: 0, hidden: new Set(), eps: new Map(), cell: null, norm: null, printing: false };

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, text] of Object.entries(value)) node.style.setProperty(name, text);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

const isNumber = (value) => typeof value === "number";
const percent = (share) => (isNumber(share) ? (100 * share).toFixed(1) : "–");
function short(value, digits = 4) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(Math.min(2, digits - 1)).replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

/** A group of radio buttons that looks like one switch. */
function radios(name, legend, options, chosen, pick) {
  const buttons = options.map(([value, label]) => {
    const input = el("input", { type: "radio", name, value, checked: value === chosen, onchange: () => pick(value) });
    return el("label", {}, input, el("span", {}, label));
  });
  return el("fieldset", { class: "switch" }, el("legend", {}, legend), ...buttons);
}

function select(label, options, chosen, pick) {
  const box = el("select", { onchange: (event) => pick(event.target.value) });
  for (const [value, text] of options) box.append(el("option", { value, selected: value === chosen }, text));
  return el("label", {}, `${label} `, box);
}
