// Puts the page together: snapshots from the feed go to the parts that show them.

import { setKey } from "/live/api.js";
import { startChat } from "/live/chat.js";
import { noteRunning, offerPolicies, startCompare } from "/live/compare.js";
import { $, dark, setText } from "/live/dom.js";
import { Feed } from "/live/feed.js";
import { showAlarms, showFleet, showSummary } from "/live/fleet.js";
import { light, place, startHeatmap } from "/live/heatmap.js";
import { showLatency, startLatency } from "/live/latency.js";

const KEPT_STEPS = 128;
let steps = [];
let shownMs = 0; // when the snapshot that is shown was made
let following = false;

function showModel(model) {
  const drafts = model.drafts === "none" ? "no drafts" : `drafts: ${model.drafts}`;
  setText($("model"), `${model.name}, ${model.layers} layers × ${model.experts} experts, ${model.quantisation}, policy ${model.policies[0]}, ${drafts}`);
  document.title = `WDMoE · ${model.name}`;
  offerPolicies(model);
  if (!model.chat) {
    $("send").disabled = true;
    setText($("chat-status"), "This model has no chat template: use /v1/completions.");
  }
}

function onSnapshot(snapshot) {
  if (snapshot.model) {
    showModel(snapshot.model);
    steps = []; // the first snapshot of a connection has all steps; the base station may have been restarted
  }
  steps = [...steps, ...(snapshot.steps ?? []).map((step) => ({ answers: 1, tokens: 1, ...step }))].slice(-KEPT_STEPS);
  shownMs = snapshot.unix_ms;
  showAlarms(snapshot.alarms);
  showSummary(snapshot, steps);
  noteRunning(snapshot.totals.running);
  showFleet(snapshot.nodes);
  if (snapshot.placement) place(snapshot.placement);
  light(snapshot.active ?? []);
  if (snapshot.steps || snapshot.model) showLatency(steps);
}

function onState(state, text) {
  $("connection").dataset.state = state === "key" ? "lost" : state;
  setText($("connection"), text);
  if (state === "lost" && shownMs) {
    const moment = new Date(shownMs).toLocaleTimeString();
    showAlarms([{ kind: "connection", severe: true, text: `No connection to the base station: everything below is from ${moment}` }]);
  }
  if (state === "key") {
    $("key-form").hidden = false;
    $("key").focus();
  } else if (state === "live") {
    $("key-form").hidden = true;
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  setText($("key-error"), "");
  follow("This key is not the base station's.");
});

// Follows the feed until the server refuses the key.
async function follow(refusal) {
  if (following) return;
  following = true;
  await new Feed(onSnapshot, onState).run();
  following = false;
  setText($("key-error"), refusal);
}

startHeatmap();
const drawLatency = startLatency();
const drawCompared = startCompare();
dark.addEventListener("change", () => {
  drawLatency();
  drawCompared();
});
startChat();
follow("");
