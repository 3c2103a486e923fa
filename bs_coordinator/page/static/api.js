// The server's key, and streams of server-sent events read with fetch, which can send headers.

const STORED = "wdmoe-key";

export function setKey(key) {
  sessionStorage.setItem(STORED, key);
}

export function headers(more = {}) {
  const key = sessionStorage.getItem(STORED);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

// The text of an error response, whoever made it: this server or a proxy before it.
export async function errorText(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `HTTP status ${response.status}`;
  }
}

// The documents of a streamed answer of the chat. An error of the server is thrown with its message.
export async function* chat(options, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify({ stream: true, stream_options: { include_usage: true }, ...options }),
    signal,
  });
  if (!response.ok) throw new Error(await errorText(response));
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const document = JSON.parse(data);
    if (document.error) throw new Error(document.error.message);
    yield document;
  }
}

// What the reader is told of an error of `chat`.
export const failure = (error) =>
  error instanceof TypeError ? "No connection to the base station" : `Failed: ${error.message}`;

// The data of each event. `alive` is called with every piece that arrives, comments included.
export async function* events(response, alive = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    alive();
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice(6);
    }
  }
}
