// The feed of snapshots: connects, and connects again when the stream ends or falls silent.

import { errorText, events, headers } from "/live/api.js";

const SILENT_MS = 12000; // the server sends something at least every 5 s
const FIRST_PAUSE_MS = 500;
const MOST_PAUSE_MS = 5000;

// Calls `onSnapshot(snapshot)`, and `onState(state, text)` with the states waiting, live, lost and key.
export class Feed {
  constructor(onSnapshot, onState) {
    this.onSnapshot = onSnapshot;
    this.onState = onState;
    this.pause = FIRST_PAUSE_MS;
  }

  async run() {
    while (await this.#follow()) {
      await new Promise((resolve) => setTimeout(resolve, this.pause));
      this.pause = Math.min(2 * this.pause, MOST_PAUSE_MS);
    }
  }

  // Reads one stream to its end; whether to try again.
  async #follow() {
    const abort = new AbortController();
    let watchdog;
    const alive = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(), SILENT_MS);
    };
    alive();
    try {
      const response = await fetch("/live/events", { headers: headers(), signal: abort.signal, cache: "no-store" });
      if (response.status === 401) {
        this.onState("key", "An API key is needed");
        return false;
      }
      if (!response.ok) {
        this.onState("lost", await errorText(response));
        return true;
      }
      for await (const data of events(response, alive)) {
        this.pause = FIRST_PAUSE_MS;
        this.onState("live", "Live");
        this.onSnapshot(JSON.parse(data));
      }
      this.onState("lost", "Connection closed: connecting again…");
    } catch (error) {
      if (!(error instanceof TypeError) && error.name !== "AbortError") console.error(error);
      this.onState("lost", "No connection to the base station: trying again…");
    } finally {
      clearTimeout(watchdog);
    }
    return true;
  }
}
