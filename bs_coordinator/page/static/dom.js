// Small helpers. All text goes through textContent: names come from nodes and may be hostile.

export const $ = (id) => document.getElementById(id);

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// Changes the page only where something is new, so that screen readers and selections are left alone.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const calm = matchMedia("(prefers-reduced-motion: reduce)");
export const dark = matchMedia("(prefers-color-scheme: dark)");

export const figure = (value, digits = 1) =>
  value === null || value === undefined ? "–" : value.toFixed(value >= 100 ? 0 : digits);

export function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Colours that people with colour blindness can tell apart (Okabe and Ito), each with the ink that is readable on it.
const COLOURS = [
  ["#0072b2", "#ffffff"], ["#e69f00", "#15202b"], ["#007a5a", "#ffffff"], ["#cc79a7", "#15202b"],
  ["#56b4e9", "#15202b"], ["#b84f00", "#ffffff"], ["#f0e442", "#15202b"], ["#5f6670", "#ffffff"],
];

// A letter and a colour for each node, which it keeps as long as the page is open.
const marks = new Map();
export function mark(name) {
  if (!marks.has(name)) {
    const number = marks.size;
    const letter = String.fromCharCode(65 + (number % 26)) + (number >= 26 ? Math.floor(number / 26) : "");
    const [fill, ink] = COLOURS[number % COLOURS.length];
    marks.set(name, { letter, fill, ink });
  }
  return marks.get(name);
}

export const shown = (name) => (name === "@bs" ? "base station" : name);

// Fits a canvas to its place at the screen's resolution; returns its context, scaled to CSS pixels.
export function fit(canvas, height) {
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (height !== undefined) canvas.style.height = `${height}px`;
  const tall = height ?? canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(tall * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(tall * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, tall);
  return { context, width, height: tall };
}

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
