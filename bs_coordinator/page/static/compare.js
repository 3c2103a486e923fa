// Two policies answer one prompt, one after the other, and are shown side by side.

import { chat, failure } from "/live/api.js";
import { $, colour, element, figure, fit, median, setText } from "/live/dom.js";
import { PARTS } from "/live/fleet.js";
import { NAMES } from "/live/latency.js";

const AXIS = 52; // px for the numbers on the left
let running = null;
let others = false; // whether other requests were answered meanwhile

class Side {
  constructor(letter) {
    this.title = $(`title-${letter}`);
    this.canvas = $(`bars-${letter}`);
    this.readout = $(`readout-${letter}`);
    this.text = $(`answer-${letter}`);
    this.cursor = 0; // index of the token that the reader looks at
    this.clear("");
    this.canvas.addEventListener("keydown", (event) => {
      const last = this.timed.length - 1;
      const to = { ArrowLeft: this.cursor - 1, ArrowRight: this.cursor + 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.look(to);
    });
    this.canvas.addEventListener("pointerdown", (event) => {
      const share = (event.offsetX - AXIS) / (this.canvas.clientWidth - AXIS);
      this.look(Math.floor(share * Math.max(...sides.map((side) => side.timed.length))));
    });
  }

  clear(policy) {
    this.policy = policy;
    this.tokens = [];
    this.tokenMs = null; // mean time between tokens, as the server measured it
    this.firstMs = null;
    setText(this.title, policy || "–");
    setText(this.text, "");
    setText(this.readout, "");
  }

  // Tokens after the first, which has the prompt's time too.
  get timed() {
    return this.tokens.slice(1);
  }

  get rate() {
    return this.tokenMs ? 1000 / this.tokenMs : null;
  }

  look(place) {
    const timed = this.timed;
    this.cursor = Math.max(0, Math.min(timed.length - 1, place));
    const token = timed[this.cursor];
    if (!token) return;
    const parts = PARTS.filter((part) => token[part] >= 0.05)
      .map((part) => `${NAMES[part].replace("Wait: ", "")} ${figure(token[part])}`);
    setText(this.readout, `Token ${this.cursor + 2} “${token.text.trim()}”: ${figure(total(token))} ms (${parts.join(", ")})`);
    draw();
  }

  draw(most, count) {
    const { context, width, height } = fit(this.canvas);
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = colour("soft");
    if (!this.timed.length) return;
    context.textAlign = "right";
    context.fillText(`${figure(most, 0)} ms`, AXIS - 6, 12);
    context.fillText("0", AXIS - 6, height - 4);
    const wide = (width - AXIS) / Math.max(16, count);
    const scale = (height - 8) / most;
    this.timed.forEach((token, i) => {
      let bottom = height - 4;
      for (const part of PARTS) {
        const tall = Math.min((token[part] ?? 0) * scale, bottom - 4);
        context.fillStyle = colour(part.replace("_ms", ""));
        context.fillRect(AXIS + i * wide, bottom - tall, Math.max(1, wide - (wide > 4 ? 1 : 0)), tall);
        bottom -= tall;
      }
      if (i === this.cursor && this.readout.textContent) {
        context.strokeStyle = colour("ink");
        context.strokeRect(AXIS + i * wide - 0.5, 1, wide, height - 3);
      }
    });
    const times = this.timed.map(total);
    this.canvas.setAttribute("aria-label", `${this.policy}: time of ${times.length} tokens after the first, `
      + `median ${figure(median(times))} ms, slowest ${figure(Math.max(...times))} ms`);
  }
}

const total = (token) => PARTS.reduce((sum, part) => sum + (token[part] ?? 0), 0);
let sides = [];

// Both timelines have the same scale. One slow token must not flatten all others.
function draw() {
  const times = sides.flatMap((side) => side.timed.map(total)).sort((a, b) => a - b);
  const most = times.length ? Math.min(times.at(-1), 1.5 * times[Math.floor(0.95 * (times.length - 1))]) : 1;
  const count = Math.max(...sides.map((side) => side.timed.length));
  for (const side of sides) side.draw(Math.max(1, most), count);
}

function status(text, isError = false) {
  $("compare-status").classList.toggle("error", isError);
  setText($("compare-status"), text);
}

async function answer(side, prompt, mostTokens) {
  const began = performance.now();
  let text = "";
  const options = {
    messages: [{ role: "user", content: prompt }], max_tokens: mostTokens, wdmoe: { policy: side.policy, timings: true },
  };
  for await (const document of chat(options, running.signal)) {
    const choice = document.choices[0];
    if (!choice) {
      side.tokenMs = document.wdmoe?.tpot_ms ?? null;
      continue;
    }
    side.firstMs ??= performance.now() - began;
    const more = choice.delta?.content ?? "";
    side.tokens.push({ ...document.wdmoe, text: more });
    text += more;
    side.text.textContent = text;
    draw();
  }
}

// How many tokens differ, place by place, in words.
function difference([a, b]) {
  const most = Math.max(a.tokens.length, b.tokens.length);
  const places = [...Array(most).keys()].filter((i) => a.tokens[i]?.token !== b.tokens[i]?.token);
  if (!places.length) return `All ${most} tokens are the same.`;
  const same = places[0] ? `The first ${places[0]} tokens are the same, then the answers part` : "The answers differ from the first token on";
  return `${same}: ${places.length} of ${most} tokens differ.`;
}

function verdict() {
  const [a, b] = sides;
  const [slow, fast] = a.rate > b.rate ? [b, a] : [a, b];
  const rates = a.rate && b.rate
    ? `${fast.policy} made ${figure(fast.rate)} tokens/s, ${slow.policy} ${figure(slow.rate)} (× ${(fast.rate / slow.rate).toFixed(2)}). `
    : "";
  return rates + difference(sides) + (others ? " Other requests were answered meanwhile, which slows both." : "");
}

function fillTable() {
  const rows = [
    ["Tokens", (side) => `${side.tokens.length}`],
    ["Tokens/s after the first", (side) => figure(side.rate)],
    ["First token after, ms", (side) => figure(side.firstMs, 0)],
    ["Time per token, median ms", (side) => figure(median(side.timed.map(total)))],
    ...PARTS.filter((part) => part !== "draft_ms")
      .map((part) => [NAMES[part], (side) => figure(median(side.timed.map((token) => token[part]))), part]),
  ];
  sides.forEach((side, i) => setText($("compare-head").children[i + 1], side.policy));
  $("compare-rows").replaceChildren(...rows.map(([label, value, part]) => {
    const row = element("tr");
    const head = element("th");
    head.scope = "row";
    if (part) head.append(element("span", `swatch ${part}`));
    head.append(label);
    row.append(head, ...sides.map((side) => element("td", "", value(side))));
    return row;
  }));
  $("compare-table").hidden = false;
}

function busy(is) {
  $("compare-start").disabled = is;
  $("compare-stop").disabled = !is;
  $("sides").setAttribute("aria-busy", `${is}`);
}

async function compare(prompt) {
  running = new AbortController();
  others = false;
  busy(true);
  setText($("compare-verdict"), "");
  $("compare-table").hidden = true;
  $("sides").hidden = false;
  sides.forEach((side, i) => side.clear($(i ? "policy-b" : "policy-a").value));
  draw();
  try {
    for (const [i, side] of sides.entries()) {
      status(`Answer ${i + 1} of 2: ${side.policy}…`);
      await answer(side, prompt, Number($("compare-tokens").value));
    }
    status("Both answers are complete");
    setText($("compare-verdict"), verdict());
    fillTable();
  } catch (error) {
    if (error.name === "AbortError") status("Stopped");
    else status(failure(error), true);
  }
  running = null;
  busy(false);
}

// Takes in the model's facts: the policies that requests may name, the base station's own first.
export function offerPolicies(model) {
  const { policies, chat: canChat } = model;
  const second = policies.includes("wdmoe", 1) ? "wdmoe" : policies[1] ?? policies[0];
  for (const [id, chosen] of [["policy-a", policies[0]], ["policy-b", second]]) {
    const kept = policies.includes($(id).value) ? $(id).value : chosen;
    $(id).replaceChildren(...policies.map((policy, i) => {
      const option = element("option", "", i ? policy : `${policy} (this server's)`);
      option.value = policy;
      return option;
    }));
    $(id).value = kept;
  }
  $("compare-start").disabled = !canChat || running !== null;
  if (!canChat) status("This model has no chat template: send requests with wdmoe.policy to /v1/completions.");
}

// Takes in how many requests are being answered.
export function noteRunning(count) {
  if (running && count > 1) others = true;
}

export function startCompare() {
  sides = [new Side("a"), new Side("b")];
  $("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const prompt = $("compare-prompt").value.trim();
    if (prompt && !running) compare(prompt);
  });
  $("compare-stop").addEventListener("click", () => {
    running?.abort();
    $("compare-prompt").focus();
  });
  for (const side of sides) new ResizeObserver(draw).observe(side.canvas);
  return draw;
}
