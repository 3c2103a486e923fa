// A chat over /v1/chat/completions. The conversation is kept until the tab is closed.

import { chat, failure } from "/live/api.js";
import { $, element, setText } from "/live/dom.js";

const STORED = "wdmoe-chat";
let conversation = JSON.parse(sessionStorage.getItem(STORED) ?? "[]");
let running = null;

function save() {
  sessionStorage.setItem(STORED, JSON.stringify(conversation));
}

function show(role, text) {
  const box = element("div", `message ${role}`);
  const content = element("span", "", text);
  box.append(element("span", "who", role === "user" ? "You" : "Fleet"), content);
  $("messages").append(box);
  scroll();
  return { box, content };
}

function scroll() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function status(text, isError = false) {
  $("chat-status").classList.toggle("error", isError);
  setText($("chat-status"), text);
}

function busy(is) {
  $("send").disabled = is;
  $("stop").disabled = !is;
  // Screen readers wait for the whole answer instead of reading it in pieces.
  $("messages").setAttribute("aria-busy", `${is}`);
}

async function ask(text) {
  const asked = conversation; // "New chat" replaces it
  asked.push({ role: "user", content: text });
  show("user", text);
  const { box, content } = show("assistant", "");
  running = new AbortController();
  busy(true);
  status("Waiting for the first token…");
  let answer = "";
  let tokens = 0;
  let note = "";
  const began = performance.now();
  let first = 0;
  try {
    let end = "";
    for await (const document of chat({ messages: asked, max_tokens: Number($("max-tokens").value) }, running.signal)) {
      const choice = document.choices[0];
      if (choice) {
        tokens += 1;
        if (!first) {
          first = performance.now();
          status("Answering…");
        }
        answer += choice.delta?.content ?? "";
        content.textContent = answer;
        end = choice.finish_reason ?? end;
        scroll();
      }
      const degraded = document.wdmoe?.degraded_tokens;
      if (degraded) note = `${degraded} tokens were computed without some expert.`;
    }
    if (end === "length") note = `${note} Ended at the most tokens allowed.`.trim();
    const seconds = (performance.now() - first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? `, then ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    status(`${tokens} tokens: first after ${((first - began) / 1000).toFixed(1)} s${rate}`);
  } catch (error) {
    if (error.name === "AbortError") {
      note = "Stopped.";
      status(`Stopped after ${tokens} tokens`);
    } else {
      note = "Not finished.";
      status(failure(error), true);
    }
  }
  if (note) box.append(element("span", "note", note));
  if (answer) {
    asked.push({ role: "assistant", content: answer });
  } else {
    // Chat templates want users and assistants in turn.
    asked.pop();
    box.previousElementSibling?.remove();
    box.remove();
    if (asked === conversation && !$("prompt").value) $("prompt").value = text;
  }
  save();
  running = null;
  busy(false);
}

export function startChat() {
  for (const { role, content } of conversation) show(role, content);
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("prompt").value.trim();
    if (!text || running) return;
    $("prompt").value = "";
    ask(text);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("chat-form").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => {
    running?.abort();
    $("prompt").focus();
  });
  $("clear").addEventListener("click", () => {
    running?.abort();
    conversation = [];
    save();
    $("messages").replaceChildren();
    status("");
    $("prompt").focus();
  });
}
