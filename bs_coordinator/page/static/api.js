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
