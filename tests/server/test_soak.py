"""A live server under random load with faults (tests/soak), and the bugs that such a soak must find."""

from __future__ import annotations

import pytest

from tests.soak.inject.mutants import MUTANTS
from tests.soak.run import soak
from tests.soak.shapes import SHAPES

pytestmark = pytest.mark.server
LONG_S = 900
MUTANT_S = 120  # of load at most: it ends when something is wrong


@pytest.mark.soak  # two minutes with its quiet answers
def test_twenty_seconds_of_random_load(model_path, tmp_path):
    report = soak("ample", 1, 20, model_path, tmp_path)
    print(report.text)
    assert not report.failures, report.text
    assert report.actions > 4  # one per client, on a busy machine


@pytest.mark.soak
@pytest.mark.timeout(3600)  # quiet moments come on top
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_fifteen_minutes_of_random_load(model_path, tmp_path, shape, seed):
    report = soak(shape, seed, LONG_S, model_path, tmp_path)
    print(report.text)
    assert not report.failures, report.text


SHAPE_OF = dict.fromkeys(MUTANTS, "ample") | {"slot_freed_twice": "tiny", "lock_on_the_wrong_node": "tiny"}
"""Where a mutant has something to strike at: evictions need a tiny pool."""


@pytest.mark.soak
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_bug_is_found(model_path, tmp_path, mutant):
    report = soak(SHAPE_OF[mutant], 1, MUTANT_S, model_path, tmp_path, mutant=mutant)
    print(report.text)
    assert report.failures, f"{mutant} was not found"
