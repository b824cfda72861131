"use strict";
// The page's script: draws the panels on canvases, with plain browser functions only.
// Wheel zooms in time, drag pans, double click shows all; #op=PANEL/STAGE/OP in the address opens
// the details of one op.
const data = JSON.parse(document.getElementById("data").textContent);
const COLOR = {
  F: ["#3f7fbf", "#7fb0dd"], B: ["#e39a3b", "#f2c283"], W: ["#6aa56a", "#a3cda3"],
  E: "#c2307f", L: "#0f8f7a", first: "#a0522d",
  resident: "#8fb8de", flying: "#dd84b4", pool: "#f3d48b",
  weights: "#93a0ad", gradients: "#bac4cd", optimizer: "#dde2e7",
};
const GUTTER = 66, TAIL = 78, AXIS = 22, GAP = 30;
const view = { from: 0, to: data.end };
const tip = document.getElementById("tip");
const plots = [];

function timeText(t) {
  if (data.unit !== "s") return String(+t.toPrecision(5));
  return t >= 1 ? t.toPrecision(4) + " s" : (1000 * t).toPrecision(4) + " ms";
}
function memoryText(v) {
  if (data.memory !== "bytes") return +v.toFixed(2) + " mb";
  for (const [size, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (v >= size) return (v / size).toPrecision(3) + " " + name;
  return Math.round(v) + " B";
}
function escapeText(s) { return s.replace(/[&<>]/g, c => `&#${c.charCodeAt(0)};`); }

class Plot {
  constructor(panel, number) {
    this.panel = panel; this.number = number; this.mark = null;
    const section = document.createElement("section");
    section.innerHTML = `<h2>${escapeText(panel.title)}</h2><div class="facts">` + panel.facts.map(
      f => `<div><span>${escapeText(f[0])}</span> <b>${escapeText(f[1])}</b></div>`).join("") +
      "</div>";
    this.canvas = document.createElement("canvas");
    section.append(this.canvas);
    document.getElementById("main").append(section);
    const p = panel.stages;
    this.lane = p <= 8 ? 34 : p <= 16 ? 24 : p <= 32 ? 16 : 11;
    this.row = p <= 8 ? 34 : p <= 16 ? 24 : p <= 32 ? 16 : 11;
    this.height = AXIS + p * this.lane + GAP + p * this.row + 8;
    this.canvas.style.height = this.height + "px";
    this.sorted = this.byStage(panel);
    this.ghost = panel.ghost ? this.byStage(panel.ghost) : null;
    this.listen();
  }
  byStage(panel) {
    const lists = Array.from({ length: panel.stages }, () => []);
    for (const box of panel.boxes) lists[box[0]].push(box);
    for (const list of lists) list.sort((a, b) => a[6] - b[6]);
    return lists;
  }
  x(t) { return GUTTER + (t - view.from) / (view.to - view.from) * (this.width - GUTTER - TAIL); }
  time(x) {
    return view.from + (x - GUTTER) / (this.width - GUTTER - TAIL) * (view.to - view.from);
  }
  y(stage) { return AXIS + stage * this.lane; }
  memoryY(stage) { return AXIS + this.panel.stages * this.lane + GAP + stage * this.row; }

  draw() {
    this.width = this.canvas.clientWidth;
    const g = this.g = sharp(this.canvas, this.width, this.height);
    this.labelled = [0, 0];
    this.axis();
    g.save();
    g.beginPath(); g.rect(GUTTER, 0, this.width - GUTTER - TAIL, this.height); g.clip();
    for (let stage = 0; stage < this.panel.stages; stage++) {
      this.boxes(this.sorted[stage], stage, false);
      if (this.ghost) this.boxes(this.ghost[stage], stage, true);
      this.memory(stage);
    }
    const shown = this.panel.moves.filter(m => m[5] >= view.from && m[4] <= view.to);
    const strength = Math.min(0.62, Math.max(0.1, 0.62 * 12 / Math.max(1, shown.length)));
    for (const move of shown) this.move(move, strength);
    g.restore();
    this.labels();
  }
  axis() {
    const g = this.g, right = this.width - TAIL;
    timeAxis(g, t => this.x(t), this.width, this.height);
    g.strokeStyle = "#e4e8ec";
    for (let stage = 0; stage <= this.panel.stages; stage++) {
      for (const y of [this.y(stage), this.memoryY(stage)]) {
        g.beginPath(); g.moveTo(GUTTER, y + 0.5); g.lineTo(right, y + 0.5); g.stroke();
      }
    }
  }
  boxes(list, stage, ghost) {
    const g = this.g, top = this.y(stage), half = this.ghost !== null;
    const y = ghost ? top + 0.66 * this.lane : top + 3;
    const height = ghost ? 0.26 * this.lane : half ? 0.56 * this.lane : this.lane - 6;
    g.textAlign = "center";
    for (const [, op, kind, microbatch, chunk, up, start, end] of list) {
      if (end < view.from || start > view.to) continue;
      const x = this.x(start), width = Math.max(0.6, this.x(end) - x - 0.8);
      g.globalAlpha = ghost ? 0.55 : 1;
      g.fillStyle = COLOR[kind][chunk || up ? 1 : 0];
      if (width > 5) { g.beginPath(); g.roundRect(x, y, width, height, 2.5); g.fill(); }
      else g.fillRect(x, y, width, height);
      g.globalAlpha = 1;
      if (this.mark && !ghost && this.mark.op === op && this.mark.stage === stage) {
        g.strokeStyle = "#111"; g.lineWidth = 2; g.strokeRect(x, y, width, height); g.lineWidth = 1;
      }
      if (ghost) continue;
      const text = String(microbatch), size = fontSize(text, width, height);
      this.labelled[size > 0 ? 0 : 1] += 1;
      if (size > 0) {
        g.font = `${size}px system-ui, sans-serif`;
        g.fillStyle = chunk || up || kind === "B" ? "#2b2418" : "#fff";
        g.fillText(text, x + width / 2, y + height / 2 + 0.5);
      }
    }
    g.font = "11px system-ui, sans-serif";
  }
  move([op, kind, source, target, start, end], strength) {
    const g = this.g, x0 = this.x(start), x1 = Math.max(this.x(end), x0 + 3);
    const here = kind === "E" ? source : target, other = kind === "E" ? target : source;
    g.strokeStyle = g.fillStyle = COLOR[kind]; g.lineWidth = this.lane > 20 ? 1.8 : 1.1;
    const mark = this.mark && this.mark.op === op && this.mark.stage === here;
    if (mark) g.lineWidth = 4;
    const bottom = this.y(here) + this.lane - 2;
    g.fillRect(x0, bottom - 2, x1 - x0, 3.2);
    if (other === null) return;
    g.globalAlpha = mark ? 1 : strength;
    const far = this.y(other) + (other > here ? 2 : this.lane - 2);
    const [ya, yb] = kind === "E" ? [bottom, far] : [far, bottom];
    const middle = (ya + yb) / 2;
    g.beginPath(); g.moveTo(x0, ya); g.bezierCurveTo(x0, middle, x1, middle, x1, yb); g.stroke();
    const way = yb > ya ? 1 : -1;
    if (strength > 0.2 || mark) {
      g.beginPath(); g.moveTo(x1, yb + way * 2); g.lineTo(x1 - 4, yb - way * 5);
      g.lineTo(x1 + 4, yb - way * 5); g.fill();
    }
    g.globalAlpha = 1; g.lineWidth = 1;
  }
  memory(stage) {
    const curve = this.panel.curves[stage];
    if (!curve) return;
    const g = this.g, base = this.memoryY(stage) + this.row - 1, scale = (this.row - 4) / data.most;
    let ground = 0;
    for (const [name, value] of curve.constant) {
      g.fillStyle = COLOR[name];
      g.fillRect(this.x(0), base - (ground + value) * scale, this.x(this.panel.end) - this.x(0),
        value * scale);
      ground += value;
    }
    const area = (level, below, color) => {
      g.fillStyle = color; g.beginPath();
      const steps = curve.steps;
      for (let n = 0; n < steps.length; n++) {
        const next = n + 1 < steps.length ? steps[n + 1][0] : this.panel.end;
        if (next < view.from || steps[n][0] > view.to) continue;
        const x = this.x(steps[n][0]), height = level(steps[n]) * scale;
        if (height > 0) g.rect(x, base - (ground + below(steps[n])) * scale - height,
          this.x(next) - x + 0.4, height);
      }
      g.fill();
    };
    area(s => s[1], () => 0, COLOR.resident);
    area(s => s[2], s => s[1], COLOR.flying);
    if (this.panel.ghost) this.outline(this.panel.ghost.curves[stage], base, scale);
    if (curve.budget !== null) {
      g.strokeStyle = "#c0392b"; g.setLineDash([4, 3]); g.beginPath();
      const y = base - curve.budget * scale;
      g.moveTo(GUTTER, y); g.lineTo(this.width - TAIL, y); g.stroke(); g.setLineDash([]);
    }
  }
  outline(curve, base, scale) {
    const g = this.g, ground = curve.constant.reduce((sum, c) => sum + c[1], 0);
    g.strokeStyle = "#1d2733"; g.setLineDash([3, 2]); g.beginPath();
    let last = base;
    for (const [t, a, b] of curve.steps) {
      const y = base - (ground + a + b) * scale;
      g.lineTo(this.x(t), last); g.lineTo(this.x(t), y); last = y;
    }
    g.stroke(); g.setLineDash([]);
  }
  labels() {
    const g = this.g;
    g.fillStyle = "#3a4552"; g.textAlign = "right";
    const every = this.lane < 12 ? 4 : 1;
    for (let stage = 0; stage < this.panel.stages; stage++) {
      if (stage % every === 0) {
        g.fillText(`stage ${stage}`, GUTTER - 8, this.y(stage) + this.lane / 2);
        g.fillText(`stage ${stage}`, GUTTER - 8, this.memoryY(stage) + this.row / 2);
      }
      const peak = this.peak(this.panel.curves[stage]);
      g.textAlign = "left";
      if (stage % every === 0)
        g.fillText(memoryText(peak), this.width - TAIL + 6, this.memoryY(stage) + this.row / 2);
      g.textAlign = "right";
    }
    g.fillStyle = "#7a8591"; g.textAlign = "left";
    const y = this.memoryY(0) - 11;
    g.fillText("memory of each stage over the same time, its peak on the right", GUTTER, y);
  }
  peak(curve) { return curve ? peakOf(curve) : 0; }
  find(x, y) {
    const t = this.time(x), p = this.panel.stages;
    if (x < GUTTER || x > this.width - TAIL) return null;
    const stage = Math.floor((y - AXIS) / this.lane);
    if (stage >= 0 && stage < p) {
      const low = y - this.y(stage) > 0.62 * this.lane;
      if (y - this.y(stage) > this.lane - 7 || !this.ghost && low) {
        const move = this.panel.moves.find(m => (m[1] === "E" ? m[2] : m[3]) === stage &&
          m[4] <= t && t <= Math.max(m[5], m[4] + (view.to - view.from) / 200));
        if (move) return this.aboutMove(move);
      }
      const list = this.ghost && low ? this.ghost[stage] : this.sorted[stage];
      const box = list.find(b => b[6] <= t && t < b[7]);
      return box ? this.aboutBox(box, this.ghost && low) : `stage ${stage} idle\n${timeText(t)}`;
    }
    const row = Math.floor((y - this.memoryY(0)) / this.row);
    return row >= 0 && row < p && this.panel.curves[row] ? this.aboutMemory(row, t) : null;
  }
  aboutBox([stage, op, kind, microbatch, chunk, up, start, end], ghost) {
    const names = { F: "forward", B: "backward", W: "weight gradients" };
    return `<b>${op}</b>  ${names[kind]} of micro-batch ${microbatch}` +
      (chunk ? `, chunk ${chunk}` : "") + (up ? ", upwards" : "") +
      (ghost ? "  (predicted)" : "") + `\nstage ${stage}\n` +
      `${timeText(start)} to ${timeText(end)}: ${timeText(end - start)}`;
  }
  aboutMove([op, kind, source, target, start, end, size]) {
    const place = s => s === null ? "the host's memory" : `stage ${s}`;
    return `<b>${op}</b>  ${kind === "E" ? "evict" : "load"}: ${place(source)} to ` +
      `${place(target)}\n${timeText(start)} to ${timeText(end)}: ${timeText(end - start)}` +
      (size ? `\n${memoryText(size)}` : "");
  }
  aboutMemory(stage, t) {
    const curve = this.panel.curves[stage];
    let now = curve.steps[0];
    for (const step of curve.steps) if (step[0] <= t) now = step;
    const lines = curve.constant.map(([name, value]) => `${name} ${memoryText(value)}`);
    lines.push(`activations ${memoryText(now[1])}`);
    if (now[2]) lines.push(`in flight ${memoryText(now[2])}`);
    return `<b>memory of stage ${stage}</b>  at ${timeText(t)}\n${lines.join("\n")}\n` +
      `peak ${memoryText(this.peak(curve))}`;
  }
  listen() {
    let from = null;
    this.canvas.addEventListener("pointermove", event => {
      const box = this.canvas.getBoundingClientRect();
      const x = event.clientX - box.left, y = event.clientY - box.top;
      if (from !== null) {
        const shift = this.time(from) - this.time(x);
        move(view.from + shift, view.to + shift); from = x; return;
      }
      showTip(this.find(x, y), event.clientX, event.clientY);
    });
    this.canvas.addEventListener("pointerleave", () => { from = null; showTip(null); });
    this.canvas.addEventListener("pointerdown", event => {
      from = event.clientX - this.canvas.getBoundingClientRect().left; showTip(null);
    });
    this.canvas.addEventListener("pointerup", () => { from = null; });
    this.canvas.addEventListener("dblclick", () => move(0, data.end));
    this.canvas.addEventListener("wheel", event => {
      event.preventDefault();
      const t = this.time(event.clientX - this.canvas.getBoundingClientRect().left);
      const factor = Math.exp(event.deltaY * 0.0015);
      move(t - (t - view.from) * factor, t + (view.to - t) * factor);
    }, { passive: false });
  }
}

function showTip(text, x, y) {
  tip.style.display = text ? "block" : "none";
  if (!text) return;
  tip.innerHTML = text;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
}
function move(from, to) {
  const span = Math.min(data.end, Math.max(to - from, data.end / 1e5));
  view.from = Math.max(0, Math.min(from, data.end - span));
  view.to = view.from + span;
  drawAll();
}
function drawAll() { for (const plot of plots) plot.draw(); }
function openFromAddress() {
  const match = decodeURIComponent(location.hash).match(/^#op=(\d+)\/(\d+)\/(.+)$/);
  if (!match || !data.panels[+match[1]]) return;
  const plot = plots[+match[1]], stage = +match[2], op = match[3];
  const box = plot.panel.boxes.find(b => b[0] === stage && b[1] === op);
  const moved = plot.panel.moves.find(m => m[0] === op && (m[1] === "E" ? m[2] : m[3]) === stage);
  if (!box && !moved) return;
  plot.mark = { op, stage };
  plot.draw();
  const place = plot.canvas.getBoundingClientRect();
  const t = box ? box[6] : moved[4];
  showTip(box ? plot.aboutBox(box) : plot.aboutMove(moved), place.left + plot.x(t),
    place.top + plot.y(stage));
}
const main = document.getElementById("main"), layout = document.getElementById("layout");
function arrange(side) {
  main.className = side ? "side" : "";
  main.style.setProperty("--columns", data.panels.length);
  layout.textContent = side ? "one below the other" : "side by side";
  drawAll();
}
// Side by side unless numbers that fit one below the other would not fit then.
function numbers() {
  return plots.reduce((sum, plot) => [sum[0] + plot.labelled[0], sum[1] + plot.labelled[1]], [0, 0]);
}
function firstLayout() {
  arrange(false);
  const fits = numbers()[0];
  if (data.panels.length < 2 || innerWidth <= 900) return;
  arrange(true);
  if (numbers()[0] < fits) arrange(false);
}
data.panels.forEach((panel, number) => plots.push(new Plot(panel, number)));
if (data.both) plots.push(new Both(data.panels));
Both.prototype.labelled = [0, 0];
legend();
layout.onclick = () => arrange(main.className === "");
if (data.panels.length < 2) layout.style.display = "none";
document.getElementById("all").onclick = () => move(0, data.end);
addEventListener("resize", drawAll);
addEventListener("hashchange", openFromAddress);
firstLayout();
openFromAddress();
document.documentElement.dataset.drawn = data.panels.map(p => p.boxes.length).join(" ");
const [labels, missing] = numbers();
document.documentElement.dataset.numbers = `${labels} of ${labels + missing}`;
