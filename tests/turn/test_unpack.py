"""How much of a prompt is read over its originals."""

from __future__ import annotations

import pytest

from keepkv_sglang.turn.unpack import Incomplete, Matched, history

WINDOW = 32
# 100 tokens of system prompt, a compressed turn up to 600, its last 64 tokens fitted, 40 raw ones behind: 640 in all.
COMPRESSED = Matched(uncompressed=100, tokens=640, whole_from=600, compressed=True)
RAW = Matched(uncompressed=100, tokens=640, whole_from=100, compressed=False)
NOTHING = Matched(uncompressed=0, tokens=0, whole_from=0, compressed=False)


@pytest.mark.parametrize(
    ("matched", "archived", "prompt", "expected"),
    [
        (COMPRESSED, 600, 900, 640),  # what lies raw on the device needs no archive
        (COMPRESSED, 600, 641, None),  # nothing new but the last token: a parallel sample
        (COMPRESSED, 600, 650, 617),  # the window's queries are computed, so 23 known tokens are computed again
        (Matched(100, 120, 110, compressed=True), 110, 126, 100),  # all behind the anchor is computed again
        (COMPRESSED, 800, 900, 800),  # the archive reaches further: a longer conversation's spans are gone
        (COMPRESSED, 880, 900, 867),
        (RAW, 640, 900, None),  # nothing is compressed, nothing to bring back
        (RAW, 704, 900, 704),
        (RAW, 704, 672, None),  # all but the window is there
        (NOTHING, 0, 900, None),
        (NOTHING, 512, 900, 512),  # an evicted conversation
        (NOTHING, 20, 30, None),  # shorter than the window
    ],
)
def test_tokens_that_are_read_as_originals(matched, archived, prompt, expected):
    assert history(matched, archived, prompt, WINDOW) == expected


def test_a_gap_in_the_archive_is_told():
    with pytest.raises(Incomplete):
        history(COMPRESSED, 599, 900, WINDOW)
