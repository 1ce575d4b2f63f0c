"""What `keepkv verify` measures between two answers, and its exit code where there is nothing to verify."""

from __future__ import annotations

import math
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools.verify.compare import Difference, difference, divergence
from keepkv_sglang.tools.verify.server import Answer


def answer(ids: list[int], top: list[dict[int, float]], given: tuple[float, ...] = ()) -> Answer:
    return Answer(ids, top, list(given), [], 0, {})


def test_same_tokens():
    one = answer([7, 8], [{7: -0.1, 3: -2.0}, {8: -0.5}], (-1.0, -2.0))
    other = answer([7, 8], [{7: -0.3, 3: -9.0}, {8: -0.5}], (-1.5, -2.0))
    found = difference([(one, other)])
    assert found == Difference(4, pytest.approx((0.2 + 0 + 0.5 + 0) / 4), pytest.approx(0.5), None)
    assert difference([(one, other)], generated=1).tokens == 3
    assert difference([(one, one), (other, other)]) == Difference(8, 0.0, 0.0, None)


def test_nothing_behind_the_first_token_that_differs():
    one = answer([7, 8, 9], [{7: 0.0}, {8: -0.1, 6: -3.0}, {9: 0.0}])
    other = answer([7, 6, 5], [{7: 0.0}, {6: -0.2, 8: -0.7}, {5: 0.0}])
    found = difference([(one, other)])
    assert (found.tokens, found.parted) == (2, 2)
    assert found.worst == pytest.approx(2.8), "the larger of |-0.1 + 0.7| for token 8 and |-3.0 + 0.2| for token 6"


def test_a_token_that_is_not_among_the_most_probable():
    one = answer([7], [{7: -0.1, 3: -2.0}])
    other = answer([4], [{4: -0.2, 5: -2.5}])
    assert difference([(one, other)]).worst == pytest.approx(2.4), "token 7 has at most -2.5 there, 4 at most -2 here"


def test_divergence_lumps_what_not_both_name():
    half, quarter, eighth = (math.log(x) for x in (0.5, 0.25, 0.125))
    one = Answer([], [], [], [{1: half, 2: quarter}, {1: half}], 0, {})
    other = Answer([], [], [], [{1: quarter, 3: eighth}, {1: half}], 0, {})
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # token 1, and all others
    assert divergence(one, other) == pytest.approx((first + 0) / 2)
    assert divergence(one, one) == 0


def test_no_server_is_exit_2(capsys):
    with socket.socket() as listener:  # bound and not listening: refused
        listener.bind(("127.0.0.1", 0))
        assert cli.main(["verify", f"http://127.0.0.1:{listener.getsockname()[1]}"]) == 2
    assert "no server answers at http://127.0.0.1:" in capsys.readouterr().err
    assert cli.main(["verify", "127.0.0.1"]) == 2


def test_another_kind_of_server_is_exit_2(capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # HTTP 501 to everything
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert cli.main(["verify", f"http://127.0.0.1:{server.server_port}"]) == 2
        finally:
            server.shutdown()
            thread.join()
    assert "is this an SGLang server?" in capsys.readouterr().err
