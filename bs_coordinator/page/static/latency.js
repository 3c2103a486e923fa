// Stacked bars: how long each of the last tokens took, and where the time went.

import { $, colour, element, figure, fit, median, setText } from "/live/dom.js";
import { PARTS, tokenMs } from "/live/fleet.js";

const BARS = 100;
export const NAMES = {
  trunk_ms: "Trunk", network_ms: "Wait: network", queue_ms: "Wait: queue", compute_ms: "Wait: node computes",
  packing_ms: "Packing", head_ms: "Head", draft_ms: "Drafting",
};
const AXIS = 60; // px for the numbers on the left
let steps = [];
let cursor = null; // serial of the step that the reader looks at
const cells = new Map();

const perToken = (step, part) => ((step[part] ?? 0) * step.answers) / step.tokens;

export function showLatency(all) {
  steps = all.filter((step) => !step.prefill && step.tokens).slice(-BARS);
  draw();
  const totals = steps.map(tokenMs);
  const total = median(totals);
  for (const part of PARTS) {
    if (!cells.has(part)) {
      const row = element("tr");
      const head = element("th");
      head.scope = "row";
      head.append(element("span", `swatch ${part}`), NAMES[part]);
      const ms = element("td");
      const share = element("td");
      row.append(head, ms, share);
      $("parts").append(row);
      cells.set(part, [row, ms, share]);
    }
    const [row, ms, share] = cells.get(part);
    const value = median(steps.map((step) => perToken(step, part)));
    row.hidden = part === "draft_ms" && !(value >= 0.05);
    setText(ms, figure(value));
    setText(share, total ? `${Math.round((100 * value) / total)} %` : "–");
  }
  const label = steps.length
    ? `Latency of the last ${steps.length} tokens: median ${figure(total)} ms, slowest ${figure(Math.max(...totals))} ms`
    : "Latency of the last tokens: none yet";
  if ($("bars").getAttribute("aria-label") !== label) $("bars").setAttribute("aria-label", label);
}

function draw() {
  const { context, width, height } = fit($("bars"));
  const ink = colour("soft");
  context.font = "12px system-ui, sans-serif";
  context.fillStyle = ink;
  if (!steps.length) {
    context.fillText("No tokens yet: ask something.", AXIS, height / 2);
    return;
  }
  // One slow token must not flatten all others: the axis ends at 1.5 times the 95th percentile.
  const sorted = steps.map(tokenMs).sort((a, b) => a - b);
  const most = Math.max(1, Math.min(sorted.at(-1), 1.5 * sorted[Math.floor(0.95 * (sorted.length - 1))]));
  const top = 16;
  const y = (ms) => height - 4 - (Math.min(ms, most) / most) * (height - top - 4);
  context.textAlign = "right";
  context.strokeStyle = colour("line");
  for (const share of [0, 0.5, 1]) {
    const line = Math.round(y(share * most)) + 0.5;
    context.beginPath();
    context.moveTo(AXIS, line);
    context.lineTo(width, line);
    context.stroke();
    context.fillText(`${figure(share * most, most < 10 ? 1 : 0)}${share === 1 ? " ms" : ""}`, AXIS - 6, line + (share ? 4 : 0));
  }
  context.textAlign = "left";
  const wide = (width - AXIS) / BARS;
  const fills = Object.fromEntries(PARTS.map((part) => [part, colour(part.replace("_ms", ""))]));
  const bad = colour("bad");
  steps.forEach((step, i) => {
    const x = AXIS + i * wide;
    const bar = Math.max(1, wide - (wide > 4 ? 1 : 0));
    let below = 0;
    for (const part of PARTS) {
      const ms = perToken(step, part);
      context.fillStyle = fills[part];
      context.fillRect(x, y(below + ms), bar, y(below) - y(below + ms));
      below += ms;
    }
    context.fillStyle = step.serial === cursor || step.degraded ? bad : ink;
    context.textAlign = "center";
    if (step.degraded) context.fillText("!", x + bar / 2, top - 4);
    else if (below > most) context.fillText("↑", x + bar / 2, top - 4);
    context.textAlign = "left";
    if (step.serial === cursor) {
      context.strokeStyle = colour("ink");
      context.lineWidth = 2;
      context.strokeRect(x - 1, 1, bar + 2, height - 2);
      context.lineWidth = 1;
    }
  });
}

function look(place) {
  const step = steps[Math.max(0, Math.min(steps.length - 1, place))];
  if (!step) return;
  cursor = step.serial;
  const parts = PARTS.filter((part) => perToken(step, part) >= 0.05)
    .map((part) => `${NAMES[part].replace("Wait: ", "")} ${figure(perToken(step, part))}`);
  const notes = [
    step.answers > 1 ? `${step.answers} answers` : "",
    step.tokens > step.answers ? `${step.tokens} tokens` : "",
    step.drafted ? `${step.accepted ?? 0} of ${step.drafted} drafts accepted` : "",
    step.degraded ? "degraded" : "",
  ].filter(Boolean);
  setText($("bars-readout"), `Step ${step.serial}: ${figure(tokenMs(step))} ms (${parts.join(", ")})${notes.length ? "; " + notes.join(", ") : ""}`);
  draw();
}

export function startLatency() {
  const canvas = $("bars");
  const place = () => {
    const at = steps.findIndex((step) => step.serial === cursor);
    return at < 0 ? steps.length : at;
  };
  canvas.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: place() - 1, ArrowRight: place() + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    look(to);
  });
  canvas.addEventListener("pointerdown", (event) => {
    look(Math.floor(((event.offsetX - AXIS) / (canvas.clientWidth - AXIS)) * BARS));
  });
  new ResizeObserver(draw).observe(canvas);
  draw();
  return draw;
}
