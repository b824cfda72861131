"use strict";
// Memory of two runs over one axis: the first as a line, the second filled.
class Both {
  constructor(panels) {
    this.panels = panels;
    const section = document.createElement("section");
    section.innerHTML = "<h2>memory of both over the same time</h2>" +
      `<div class="facts"><div><span>line</span> <b>${escapeText(panels[0].title)}</b></div>` +
      `<div><span>filled</span> <b>${escapeText(panels[1].title)}</b></div></div>`;
    this.canvas = document.createElement("canvas");
    section.append(this.canvas);
    document.getElementById("both").append(section);
    const p = panels[0].stages;
    this.row = p <= 8 ? 54 : p <= 16 ? 32 : 18;
    this.height = AXIS + p * this.row + 8;
    this.canvas.style.height = this.height + "px";
  }
  x(t) { return GUTTER + (t - view.from) / (view.to - view.from) * (this.width - GUTTER - TAIL); }
  draw() {
    this.width = this.canvas.clientWidth;
    const g = this.g = sharp(this.canvas, this.width, this.height);
    timeAxis(g, t => this.x(t), this.width, this.height);
    for (let stage = 0; stage < this.panels[0].stages; stage++) this.stage(stage);
  }
  stage(stage) {
    const g = this.g, base = AXIS + (stage + 1) * this.row - 2, scale = (this.row - 8) / data.most;
    const [before, after] = this.panels.map(panel => panel.curves[stage]);
    g.save();
    g.beginPath(); g.rect(GUTTER, 0, this.width - GUTTER - TAIL, this.height); g.clip();
    g.fillStyle = COLOR.resident; this.path(after, this.panels[1].end, base, scale); g.fill();
    const pool = after.constant.filter(c => c[0] === "pool").reduce((sum, c) => sum + c[1], 0);
    g.fillStyle = COLOR.pool;
    g.fillRect(this.x(0), base - pool * scale, this.x(this.panels[1].end) - this.x(0), pool * scale);
    g.strokeStyle = COLOR.first; g.lineWidth = 1.5;
    this.path(before, this.panels[0].end, base, scale); g.stroke(); g.lineWidth = 1;
    const budget = after.budget ?? before.budget;
    if (budget !== null) {
      const y = base - budget * scale;
      g.strokeStyle = "#c0392b"; g.setLineDash([4, 3]); g.beginPath();
      g.moveTo(GUTTER, y); g.lineTo(this.width - TAIL, y); g.stroke(); g.setLineDash([]);
    }
    g.restore();
    g.strokeStyle = "#e4e8ec"; g.beginPath();
    g.moveTo(GUTTER, base + 0.5); g.lineTo(this.width - TAIL, base + 0.5); g.stroke();
    g.fillStyle = "#3a4552"; g.textAlign = "right";
    g.fillText(`stage ${stage}`, GUTTER - 8, base - this.row / 2 + 4);
    g.textAlign = "left";
    const x = this.width - TAIL + 6;
    if (this.row > 30) {
      g.fillStyle = COLOR.first; g.fillText(memoryText(peakOf(before)), x, base - this.row / 2 - 4);
      g.fillStyle = "#3a6ea5"; g.fillText(memoryText(peakOf(after)), x, base - this.row / 2 + 10);
    } else g.fillText(memoryText(peakOf(after)), x, base - this.row / 2 + 4);
  }
  path(curve, end, base, scale) {
    const g = this.g, ground = curve.constant.reduce((sum, c) => sum + c[1], 0);
    g.beginPath(); g.moveTo(this.x(0), base);
    let last = base;
    for (const [t, a, b] of curve.steps) {
      const y = base - (ground + a + b) * scale;
      g.lineTo(this.x(t), last); g.lineTo(this.x(t), y); last = y;
    }
    g.lineTo(this.x(end), last); g.lineTo(this.x(end), base);
  }
}
