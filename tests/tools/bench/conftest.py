"""A stand-in for a server: speaks the four calls that `keepkv bench` makes, in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Fake:
    """Answers every prompt with tokens that depend on the prompt alone, one per chunk. Keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.flushed = 0
        self.refuse_longer_than = 1 << 30
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self.answer(200, json.dumps({"internal_states": [fake.state()]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                if self.path == "/flush_cache":
                    fake.flushed += 1
                    self.answer(200, b"{}")
                elif len(body["input_ids"]) > fake.refuse_longer_than:
                    self.answer(400, b'{"error": "too long"}')
                else:
                    self.answer(200, fake.stream(body))

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        self.base_url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stream(self, body: dict[str, Any]) -> bytes:
        prompt, new = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        with self.lock:
            self.asked.append(body)
        out = [(sum(prompt) + i) % 1000 for i in range(new)]
        meta = {"cached_tokens": len(prompt) // 2, "num_retractions": 0, "finish_reason": None}
        lines = [{"output_ids": out[: i + 1], "meta_info": meta} for i in range(new)]
        return b"".join(b"data: " + json.dumps(line).encode() + b"\n\n" for line in lines) + b"data: [DONE]\n\n"

    def state(self) -> dict[str, Any]:
        done = len(self.asked)
        return {"step_times": {"prefill": {"1": [done, 0.0, 0]}, "decode": {"1": [done, 0.0, done]}}}

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def post_json(self, path: str, body: Any) -> tuple[int, Any]:
        assert path == "/flush_cache"
        self.flushed += 1
        return 200, {}

    def get_json(self, path: str) -> tuple[int, Any]:
        assert path == "/server_info"
        return 200, {"internal_states": [self.state()]}


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.http.shutdown()
    server.http.server_close()
