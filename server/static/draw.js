// What several pictures need: SVG elements, the theme's colours, a canvas of the right size.
const SVG = "http://www.w3.org/2000/svg";

export function shape(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

export function onThemeChange(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

// A context in CSS pixels; the canvas itself has the screen's.
export function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

// Points [x, y] with x from 0 to 1 and y from 0 up: a line through them, or dots on stems.
export function sparkline(svg, points, { top, dots = false }) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  shape("line", { x1: 0, x2: 100, y1: 100, y2: 100 }, svg);
  const scale = top > 0 ? 96 / top : 0;
  const placed = points.map(([x, y]) => [x * 100, 100 - y * scale]);
  if (!dots) {
    shape("polyline", { points: placed.map((p) => p.join(",")).join(" ") }, svg);
    return;
  }
  for (const [x, y] of placed) {
    shape("line", { x1: x, x2: x, y1: 100, y2: y }, svg);
    // Of no length, but with round ends: a circle would be stretched with the picture.
    shape("polyline", { points: `${x},${y} ${x},${y}`, class: "dot" }, svg);
  }
}

export function facts(list, entries) {
  list.replaceChildren(...entries.map(([term, value]) => {
    const pair = document.createElement("div");
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = term;
    dd.textContent = value;
    pair.append(dt, dd);
    return pair;
  }));
}

export function legend(list, entries) {
  list.replaceChildren(...entries.map(([kind, text]) => {
    const item = document.createElement("li");
    const swatch = document.createElement("span");
    swatch.className = `swatch ${kind}`;
    item.append(swatch, text);
    return item;
  }));
}

export const count = new Intl.NumberFormat("en");

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export function bytes(value) {
  const steps = Math.min(4, Math.floor(Math.log2(Math.max(value, 1)) / 10));
  const scaled = value / 1024 ** steps;
  return `${scaled.toFixed(steps && scaled < 100 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][steps]}`;
}
