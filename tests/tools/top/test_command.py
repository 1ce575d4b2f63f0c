"""`keepkv top` where there is nothing to show: what it says, and its exit codes."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools.server_process import _free_port


@pytest.fixture
def no_sglang() -> Iterator[str]:
    """A web server that knows nothing of SGLang."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/server_info" and self.headers.get("Authorization") != "Bearer wrong"
            self.send_response(200 if found else 401 if self.path == "/server_info" else 404)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_server_there(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{_free_port()}"
    assert cli.main(["top", address, "--once"]) == 1
    assert capsys.readouterr().err == f"keepkv top: no server answers at http://{address}: connection refused\n"


def test_another_kind_of_server(no_sglang: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", no_sglang, "--once"]) == 1
    assert "gave no JSON; is this the address of an SGLang server?" in capsys.readouterr().err


def test_a_wrong_key(no_sglang: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", no_sglang, "--once", "--api-key", "wrong"]) == 1
    assert "give --api-key" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://", "127.0.0.1:99999999", "ftp://127.0.0.1"])
def test_an_address_that_is_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", url, "--once"]) == 1
    assert capsys.readouterr().err.startswith("keepkv top: no server answers at ")


def test_a_bad_interval(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--every", "0"]) == 1
    assert "--every must be above 0" in capsys.readouterr().err
