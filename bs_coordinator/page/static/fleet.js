// Cards of the nodes, the alarms and the tiles of the summary.

import { $, element, figure, mark, median, setText, shown } from "/live/dom.js";

const LEVELS = ["very slow", "slow", "fair", "good", "very good"];
const cards = new Map();

export function linkQuality(link) {
  if (!link || !link.samples) return "not measured";
  if (link.stale) return "no news for a while";
  const byTime = [100, 40, 15, 5].filter((ms) => link.rtt_ms < ms).length;
  const byRate = [1, 5, 20, 50].filter((mbps) => Math.min(link.down_mbps, link.up_mbps) > mbps).length;
  const level = Math.min(byTime, byRate);
  return `${"▮".repeat(level)}${"▯".repeat(4 - level)} ${LEVELS[level]}`;
}

function rows(node) {
  const link = node.link;
  const board = [
    node.celsius == null ? "" : `${figure(node.celsius, 0)} °C`,
    node.throttling ? `slowed down: ${node.throttling}` : "",
    node.watts == null ? "" : `${figure(node.watts)} W`,
    node.rssi_dbm == null ? "" : `${node.rssi_dbm} dBm`,
  ].filter(Boolean).join(", ");
  const predicted = node.predicted_ms == null ? "" : ` (predicted ${figure(node.predicted_ms)})`;
  return [
    ["Link", node.name === "@bs" ? "" : linkQuality(link)],
    ["Round trip", link ? `${figure(link.rtt_ms)} ms` : ""],
    ["Rate", link ? `${figure(link.down_mbps, 0)} down, ${figure(link.up_mbps, 0)} up Mbit/s` : ""],
    ["Request", node.measured_ms == null ? "" : `${figure(node.measured_ms)} ms${predicted}`],
    ["Board", board],
    ["Experts", node.held ? `${node.held}: ${node.experts}` : node.experts],
    ["Device", [node.host, node.device].filter(Boolean).join(", ")],
  ];
}

function newCard() {
  const card = element("li", "node");
  const title = element("h3");
  const letter = element("span", "letter");
  const name = element("span", "name");
  const state = element("span", "state");
  title.append(letter, name, state);
  const reason = element("p", "reason");
  const list = element("dl");
  card.append(title, reason, list);
  return { card, letter, name, state, reason, list, facts: new Map() };
}

function fill(parts, node) {
  const { letter, fill: back, ink } = mark(node.name);
  setText(parts.letter, letter);
  parts.letter.style.background = back;
  parts.letter.style.color = ink;
  setText(parts.name, shown(node.name));
  setText(parts.state, node.state);
  parts.card.classList.toggle("away", node.state !== "online");
  setText(parts.reason, node.reason ?? "");
  parts.reason.hidden = !node.reason;
  for (const [label, text] of rows(node)) {
    if (!parts.facts.has(label)) {
      const pair = [element("dt", "", label), element("dd")];
      parts.list.append(...pair);
      parts.facts.set(label, pair);
    }
    const [term, value] = parts.facts.get(label);
    term.hidden = value.hidden = !text;
    setText(value, text);
  }
}

export function showFleet(nodes) {
  const names = new Set(nodes.map((node) => node.name));
  for (const [name, parts] of cards) {
    if (!names.has(name)) {
      parts.card.remove();
      cards.delete(name);
    }
  }
  nodes.forEach((node, place) => {
    if (!cards.has(node.name)) cards.set(node.name, newCard());
    const parts = cards.get(node.name);
    fill(parts, node);
    const list = $("nodes");
    if (list.children[place] !== parts.card) list.insertBefore(parts.card, list.children[place] ?? null);
  });
  const online = nodes.filter((node) => node.state === "online").length;
  setText($("fleet-count"), `${online} of ${nodes.length} online`);
}

let shownAlarms = "";
export function showAlarms(alarms) {
  const wanted = alarms.length ? alarms : [{ kind: "none", severe: false, text: "None" }];
  const list = $("alarm-list");
  const key = JSON.stringify(wanted);
  if (shownAlarms === key) return; // a live region: an unchanged alarm must not be read out again
  shownAlarms = key;
  const style = (alarm) => (alarm.kind === "none" ? "none" : alarm.severe ? "severe" : "");
  list.replaceChildren(...wanted.map((alarm) => element("li", style(alarm), alarm.text)));
}

const tiles = new Map();
export function showSummary({ totals, cpu_load: load }, steps) {
  const decoding = steps.filter((step) => !step.prefill && step.tokens);
  const perToken = decoding.map((step) => tokenMs(step));
  const recent = decoding.slice(-20);
  const seconds = recent.reduce((sum, step) => sum + stepMs(step), 0) / 1000;
  const rate = seconds ? recent.reduce((sum, step) => sum + step.tokens, 0) / seconds : null;
  const share = totals.drafted ? `${Math.round((100 * totals.accepted) / totals.drafted)} % of ${totals.drafted}` : "none drafted";
  const ended = [`${totals.ended} ended`, totals.failed && `${totals.failed} failed`, totals.refused && `${totals.refused} refused`]
    .filter(Boolean).join(", ");
  const facts = [
    ["Answering", `${totals.running}`, ended],
    ["Tokens/s", figure(rate), "while decoding"],
    ["Time per token", perToken.length ? `${figure(median(perToken))} ms` : "–", `median of ${perToken.length}`],
    ["Tokens", `${totals.tokens}`, "since the start"],
    ["Drafts accepted", `${totals.accepted}`, share],
    ["Degraded", `${totals.degraded}`, totals.degraded ? "without some expert" : "no expert missing"],
    ["Load", figure(load, 2), "processes per core"],
  ];
  for (const [label, value, note] of facts) {
    if (!tiles.has(label)) {
      const box = element("div");
      const number = element("span");
      const small = element("small");
      const dd = element("dd");
      dd.append(number, small);
      box.append(element("dt", "", label), dd);
      $("tiles").append(box);
      tiles.set(label, [number, small]);
    }
    const [number, small] = tiles.get(label);
    setText(number, value);
    setText(small, note);
  }
}

export const PARTS = ["trunk_ms", "network_ms", "queue_ms", "compute_ms", "packing_ms", "head_ms", "draft_ms"];
export const stepMs = (step) => PARTS.reduce((sum, part) => sum + (step[part] ?? 0), 0);
// Each answer of a step gets tokens / answers of its tokens.
export const tokenMs = (step) => (stepMs(step) * step.answers) / step.tokens;
