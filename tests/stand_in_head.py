"""A program that answers as llama-server does, chunk by chunk, and ends or falls silent as told. No model is in it.

python stand_in_head.py PORT finish|abort|hang|refuse|error|no-break TOKENS
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

PORT, BEHAVIOUR, TOKENS = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])


class Head(BaseHTTPRequestHandler):
    """One answer per connection, in chunks of HTTP 1.1."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Say that the head is ready."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Stream an answer that repeats the request's last message, word by word."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if BEHAVIOUR == "refuse":
            self.send_error(500, "no room")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        words = request["messages"][-1]["content"].split()
        self._event({"role": "assistant", "content": None}, None)
        for token in range(TOKENS):
            self._event({"content": f" {words[token % len(words)]}"}, None)
        if BEHAVIOUR == "abort":
            print("GGML_ASSERT(status) failed", flush=True)
            os.abort()
        if BEHAVIOUR == "hang":
            time.sleep(600)
        if BEHAVIOUR == "error":
            self._chunk(b'data: {"error": {"code": 500, "message": "Compute error."}}\n\n')
        else:
            self._event({}, "stop")
            usage = {"completion_tokens": TOKENS, "prompt_tokens": len(words)}
            self._chunk(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
            self._chunk(b"data: [DONE]" if BEHAVIOUR == "no-break" else b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, delta: dict[str, str | None], finish_reason: str | None) -> None:
        choice = {"finish_reason": finish_reason, "index": 0, "delta": delta}
        self._chunk(b"data: " + json.dumps({"choices": [choice], "object": "chat.completion.chunk"}).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


HTTPServer(("127.0.0.1", PORT), Head).serve_forever()
