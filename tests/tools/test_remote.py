"""What an operator's command is told when a server refuses, fails or wants a key."""

from __future__ import annotations

import argparse
import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from keepkv_sglang.tools.remote import KEY, RefusedError, Remote, UnreachableError, WrongError, add_api_key

ANSWERS = {
    "/refused": (400, {"error": {"message": "too\n many"}}),
    "/plainly": (404, {"error": "not here"}),
    "/failed": (503, {"detail": "busy"}),
    "/good": (200, {"tokens": [1, 2]}),
}


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """A server that wants the key `right`. The proxy in the environment does not exist."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, said = ANSWERS[self.path]
            if self.headers.get("Authorization") != "Bearer right":
                status = 401
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: object) -> None: ...

    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Remote(f"127.0.0.1:{server.server_port}/", "right") as found:
            yield found
        server.shutdown()


def test_what_a_server_says(remote: Remote) -> None:
    assert remote.post("/good", {}) == {"tokens": [1, 2]}
    with pytest.raises(RefusedError, match=r"^HTTP 400 on /refused: too many$"):
        remote.post("/refused", {})
    with pytest.raises(RefusedError, match=r"^HTTP 404 on /plainly: not here$"):
        remote.post("/plainly", {})
    with pytest.raises(WrongError, match=r"^HTTP 503 on /failed: .*busy"):
        remote.post("/failed", {})


def test_another_key_and_nobody(remote: Remote) -> None:
    with Remote(remote.url) as nameless, pytest.raises(UnreachableError, match="wants its key: give --api-key"):
        nameless.post("/good", {})
    with Remote("127.0.0.1:9") as nobody, pytest.raises(UnreachableError, match=r"at http://127.0.0.1:9: connection"):
        nobody.post("/good", {})


def test_the_key_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "from there")
    parser = argparse.ArgumentParser()
    add_api_key(parser)
    assert parser.parse_args([]).api_key == "from there"
    assert parser.parse_args(["--api-key", "mine"]).api_key == "mine"
