"""`keepkv top` where there is nothing to show: what it says, and its exit codes."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools.server_process import _free_port
from keepkv_sglang.tools.top.command import OFF, UNREACHABLE

WITHOUT_KEEPKV = {"/server_info": '{"internal_states": [{}]}', "/v1/loads?include=core": '{"loads": []}'}


@contextmanager
def web_server(pages: dict[str, str]) -> Iterator[str]:
    """The address of one that answers 401 to a wrong key, and has these pages."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            wrong = self.headers.get("Authorization") == "Bearer wrong"
            self.send_response(401 if wrong else 404 if page is None else 200)
            self.end_headers()
            self.wfile.write((page or "").encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_server_there(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{_free_port()}"
    assert cli.main(["top", address, "--once"]) == UNREACHABLE
    assert capsys.readouterr().err == f"keepkv top: no server answers at http://{address}: connection refused\n"


@pytest.mark.parametrize(
    ("pages", "key", "code", "message"),
    [
        ({}, "", UNREACHABLE, "/server_info answered HTTP 404; is this an SGLang server?"),
        ({"/server_info": "hello"}, "", UNREACHABLE, "gave no JSON; is this the address of an SGLang server?"),
        ({"/server_info": "[]"}, "", UNREACHABLE, "gave list; is this an SGLang server?"),
        ({}, "wrong", UNREACHABLE, "wants its key: give --api-key"),
        (WITHOUT_KEEPKV, "", OFF, "runs without KeepKV; start it with --enable-keepkv"),
    ],
)
def test_nothing_to_show(
    pages: dict[str, str], key: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with web_server(pages) as address:
        assert cli.main(["top", address, "--once", "--api-key", key]) == code
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("keepkv top: ") and message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("url", ["http://", "127.0.0.1:99999999", "ftp://127.0.0.1"])
def test_an_address_that_is_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", url, "--once"]) == 1
    assert capsys.readouterr().err.startswith("keepkv top: no server answers at ")


def test_a_bad_interval(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--every", "0"]) == 1
    assert "--every must be above 0" in capsys.readouterr().err
