"""The most that a piece of work held."""

from __future__ import annotations

import numpy

from keepkv_sglang.tools.peak_memory import peak_memory


def test_it_is_the_most_that_was_held_not_what_is_left():
    with peak_memory() as peak:
        held = numpy.ones(50_000_000 // 8)
        del held
        held = numpy.ones(8_000_000 // 8)
    assert 45e6 < peak.bytes < 70e6
    with peak_memory() as peak:
        held += 1
    assert peak.bytes < 5e6
