"use strict";
// What both kinds of plots draw with, and the legend.
// The largest font, from 11 px down to 7, in which a number fits into a box; 0: none does.
function fontSize(text, width, height) {
  for (let size = 11; size >= 7; size--)
    if (width >= 1 + 0.58 * size * text.length && height >= size) return size;
  return 0;
}

function peakOf(curve) {
  return curve.constant.reduce((sum, c) => sum + c[1], 0) +
    curve.steps.reduce((most, s) => Math.max(most, s[1] + s[2]), 0);
}

// The canvas's context, as many pixels as the screen has.
function sharp(canvas, width, height) {
  const scale = window.devicePixelRatio || 1, g = canvas.getContext("2d");
  canvas.width = width * scale; canvas.height = height * scale;
  g.scale(scale, scale);
  g.font = "11px system-ui, sans-serif"; g.textBaseline = "middle";
  return g;
}

function timeAxis(g, x, width, height) {
  const span = view.to - view.from, rough = span / Math.max(2, (width - TAIL - GUTTER) / 90);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= rough);
  g.textAlign = "center";
  for (let t = Math.ceil(view.from / step) * step; t <= view.to + 1e-9 * step; t += step) {
    const at = Math.round(x(t)) + 0.5;
    g.strokeStyle = "#edf0f3"; g.beginPath(); g.moveTo(at, AXIS - 4);
    g.lineTo(at, height - 6); g.stroke();
    g.fillStyle = "#7a8591"; g.fillText(timeText(t), at, 9);
  }
}

function legend() {
  const kinds = new Set(data.panels.flatMap(p => p.boxes.map(b => b[2] + (b[4] || b[5] ? 1 : 0))));
  const names = { F: "forward", B: "backward", W: "weight gradients" };
  const order = k => "FBW".indexOf(k[0]) + 3 * +k.slice(1);
  const sorted = [...kinds].sort((a, b) => order(a) - order(b));
  const parts = sorted.map(k => [COLOR[k[0]][+k.slice(1)], names[k[0]] +
    (k.length > 1 && k[1] === "1" ? ", second chunk or direction" : ""), ""]);
  if (data.panels.some(p => p.moves.length))
    parts.push([COLOR.E, "evict", "arrow"], [COLOR.L, "load", "arrow"]);
  parts.push([COLOR.resident, "activations", ""]);
  if (data.panels.some(p => p.moves.length)) parts.push([COLOR.flying, "in flight", ""]);
  const constants = new Set(data.panels.flatMap(
    p => p.curves.flatMap(c => c.constant.map(x => x[0]))));
  for (const name of constants) parts.push([COLOR[name], name === "pool" ? "pool lent" : name, ""]);
  if (data.panels.some(p => p.curves.some(c => c.budget !== null))) parts.push(["#c0392b", "budget", "arrow"]);
  if (data.panels.some(p => p.ghost))
    parts.push(["#1d2733", "pale and dashed: predicted", "arrow"]);
  if (data.both) parts.push([COLOR.first, `memory of ${escapeText(data.panels[0].title)}`, "arrow"]);
  document.getElementById("legend").innerHTML = parts.map(([color, name, kind]) =>
    `<span><i class="${kind}" style="${kind ? "border-color" : "background"}:${color}"></i>` +
    `${name}</span>`).join("") +
    "<span>wheel: zoom, drag: move, double click: all</span>";
}
