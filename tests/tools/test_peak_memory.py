"""The most that a piece of work held."""

from __future__ import annotations

import json
import subprocess
import sys

WORK = """
import json, numpy
from keepkv_sglang.tools.peak_memory import peak_memory
with peak_memory() as first:
    held = numpy.ones(50_000_000 // 8)
    del held
    held = numpy.ones(8_000_000 // 8)
with peak_memory() as second:
    held += 1
print(json.dumps([first.bytes, second.bytes]))
"""


def test_it_is_the_most_that_was_held_not_what_is_left():
    # A process of its own: one that has run a thousand tests gives their memory back whenever it likes.
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True, timeout=300)
    first, second = json.loads(done.stdout)
    assert 45e6 < first < 70e6
    assert second < 5e6
