// Experts by layer: each cell has the colour and letter of its node, and lights up while tokens pass through it.

import { $, calm, colour, dark, fit, mark, setText, shown } from "/live/dom.js";

const LEFT = 34;
const TOP = 18;
const HALF_LIFE_MS = 500;
const FAINT = 0.16;
let placement = null;
let heat = []; // [layer][expert], 0 to 1
let counts = []; // [layer][expert], tokens since the page was opened
let cursor = null; // [layer, expert]
let drawnAt = 0;
let scheduled = false;

export function place(next) {
  placement = next;
  const same = heat.length === next.asked.length && heat[0]?.length === next.asked[0]?.length;
  if (!same) {
    heat = next.asked.map((row) => row.map(() => 0));
    counts = next.asked.map((row) => row.map(() => 0));
  }
  const lost = next.asked.flat().filter((node) => node < 0).length;
  const all = next.asked.flat().length;
  const shares = next.names.map((name, i) => `${shown(name)} ${next.asked.flat().filter((node) => node === i).length}`);
  $("heatmap").setAttribute(
    "aria-label",
    `${all} experts in ${next.asked.length} layers, by node: ${shares.join(", ")}${lost ? `; ${lost} lost` : ""}`,
  );
  draw();
}

export function light(active) {
  const most = Math.max(1, ...active.map(([, , tokens]) => tokens));
  if (calm.matches) heat.forEach((row) => row.fill(0));
  for (const [layer, expert, tokens] of active) {
    if (heat[layer]?.[expert] === undefined) continue;
    heat[layer][expert] = Math.max(heat[layer][expert], 0.5 + (0.5 * tokens) / most);
    counts[layer][expert] += tokens;
  }
  if (active.length || calm.matches) draw();
  if (cursor) tell();
}

function size() {
  const layers = placement.asked.length;
  const experts = placement.asked[0].length;
  const wide = (($("heatmap").clientWidth || 300) - LEFT) / layers;
  const tall = Math.max(5, Math.min(26, Math.max(wide, 320 / experts)));
  return { layers, experts, wide, tall };
}

function draw() {
  if (!placement) return;
  const { layers, experts, wide, tall } = size();
  const { context, width, height } = fit($("heatmap"), TOP + experts * tall + 2);
  const now = performance.now();
  const fade = calm.matches ? 1 : 0.5 ** ((now - drawnAt) / HALF_LIFE_MS);
  drawnAt = now;
  const ink = colour("ink");
  const soft = colour("soft");
  const bad = colour("bad");
  const letters = wide >= 9 && tall >= 12;
  const gap = Math.min(wide, tall) > 7 ? 1 : 0.5;
  let warm = false;
  context.textBaseline = "middle";
  context.textAlign = "center";
  for (let layer = 0; layer < layers; layer++) {
    const x = LEFT + layer * wide;
    context.font = `${wide < 13 ? 9 : 11}px system-ui, sans-serif`;
    for (let expert = 0; expert < experts; expert++) {
      const y = TOP + expert * tall;
      const node = placement.asked[layer][expert];
      if (node < 0) {
        context.strokeStyle = bad;
        context.strokeRect(x + 1, y + 1, wide - gap - 2, tall - gap - 2);
        context.beginPath();
        context.moveTo(x + 1, y + 1);
        context.lineTo(x + wide - gap - 1, y + tall - gap - 1);
        context.moveTo(x + wide - gap - 1, y + 1);
        context.lineTo(x + 1, y + tall - gap - 1);
        context.stroke();
        continue;
      }
      heat[layer][expert] *= fade;
      const glow = heat[layer][expert];
      warm ||= glow > 0.01;
      const { letter, fill, ink: on } = mark(placement.names[node]);
      context.globalAlpha = FAINT + (1 - FAINT) * glow;
      context.fillStyle = fill;
      context.fillRect(x, y, wide - gap, tall - gap);
      context.globalAlpha = 1;
      if (letters) {
        context.fillStyle = glow > 0.5 ? on : ink;
        context.fillText(letter, x + (wide - gap) / 2, y + (tall - gap) / 2 + 0.5);
      }
    }
  }
  context.fillStyle = soft;
  context.font = "11px system-ui, sans-serif";
  const everyLayer = [1, 2, 5, 10, 20].find((n) => n * wide >= 24) ?? 50;
  for (let layer = 0; layer < layers; layer += everyLayer) context.fillText(`L${layer}`, LEFT + (layer + 0.5) * wide, 8);
  context.textAlign = "right";
  const everyExpert = [1, 2, 4, 8, 16, 32].find((n) => n * tall >= 12) ?? 64;
  for (let expert = 0; expert < experts; expert += everyExpert) context.fillText(`E${expert}`, LEFT - 6, TOP + (expert + 0.5) * tall);
  if (cursor) {
    context.strokeStyle = ink;
    context.lineWidth = 2;
    context.strokeRect(LEFT + cursor[0] * wide, TOP + cursor[1] * tall, wide - gap, tall - gap);
    context.lineWidth = 1;
  }
  if (warm && !calm.matches && !scheduled) {
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      draw();
    });
  }
}

function tell() {
  const [layer, expert] = cursor;
  const node = placement.asked[layer][expert];
  const who = node < 0 ? "no node can be asked" : `asked of ${shown(placement.names[node])}`;
  setText($("heatmap-readout"), `Layer ${layer}, expert ${expert}: ${who}; ${counts[layer][expert]} tokens since this page was opened`);
}

function look(layer, expert) {
  const { layers, experts } = size();
  cursor = [Math.max(0, Math.min(layers - 1, layer)), Math.max(0, Math.min(experts - 1, expert))];
  tell();
  draw();
}

export function startHeatmap() {
  const canvas = $("heatmap");
  canvas.addEventListener("keydown", (event) => {
    if (!placement) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [layer, expert] = cursor ?? [0, 0];
    look(layer + (cursor ? step[0] : 0), expert + (cursor ? step[1] : 0));
  });
  canvas.addEventListener("pointerdown", (event) => {
    if (!placement) return;
    const { wide, tall } = size();
    look(Math.floor((event.offsetX - LEFT) / wide), Math.floor((event.offsetY - TOP) / tall));
  });
  new ResizeObserver(draw).observe(canvas.parentElement);
  dark.addEventListener("change", draw);
}
