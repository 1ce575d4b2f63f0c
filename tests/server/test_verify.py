"""`keepkv verify` on one live server: well as it is, and not well while its votes are switched off."""

from __future__ import annotations

import os
import re

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools.places import REPO
from tests.support.client import numbers

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def votes_off(tmp_path_factory):
    """While this file exists (tests/support/votes_off), attention sees one vote for every slot."""
    return tmp_path_factory.mktemp("votes") / "off"


@pytest.fixture(scope="module")
def server(launch, votes_off):
    hook = str(REPO / "tests" / "support" / "votes_off")
    path = os.pathsep.join([hook, os.environ["PYTHONPATH"]])
    return launch(
        *("--enable-keepkv", "--max-total-tokens", "3000", "--keepkv-host-ratio", "1"),
        env={"PYTHONPATH": path, "KEEPKV_VOTES_OFF": str(votes_off)},
    )


def verify(server, capsys, *options: str) -> tuple[int, dict[str, tuple[str, str]], str]:
    """Exit code, {way: (verdict, rest of its line)}, all that was printed."""
    code = cli.main(["verify", server.base_url, *options])
    text = capsys.readouterr().out
    rows = re.findall(r"^(ok|FAILED|skipped|) +([a-z][^|]*?) {2,}(.*)$", text.partition(" worst\n")[2], re.M)
    return code, {way: (verdict, rest) for verdict, way, rest in rows}, text


def test_a_good_server_is_well(server, capsys):
    code, rows, text = verify(server, capsys, "--flush")
    assert code == 0, text
    assert [verdict for verdict, _ in rows.values()].count("ok") == 8, text
    assert {way for way, (verdict, _) in rows.items() if not verdict} == {"on, again", "on, next turn"}
    assert "the cache is flushed twice" in text
    numbers(server)


def test_a_server_without_votes_is_not(server, capsys, votes_off):
    votes_off.touch()
    try:
        code, rows, text = verify(server, capsys)
    finally:
        votes_off.unlink()
    assert code == 1, text
    assert [way for way, (verdict, _) in rows.items() if verdict == "FAILED"] == ["votes: merged"], text
    assert "nothing is flushed" in text
