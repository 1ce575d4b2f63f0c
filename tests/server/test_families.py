"""Tiny random models of other families (support/families.py), served and replayed in float64 as the demo model is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.client import tokens
from tests.support.families import FAMILIES, VOCABULARY, build
from tests.support.replay import Replay
from tests.support.replayed import BOUND, BOUND_FITTED, FLAGS, STRICT_RULE, next_turn

pytestmark = [pytest.mark.server, pytest.mark.soak]  # a server start each


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    return folder


def test_two_turns_by_the_default_and_by_a_strict_rule(family, launch, record):
    server = launch(*("--model-path", str(family), "--skip-tokenizer-init", *FLAGS), "--keepkv-record", str(record))
    text = [token % VOCABULARY for token in tokens(700, 5)]
    prompt, row = text[:300], Replay.load(str(family))
    prefilled = row, row.feed(prompt)[-1]
    next_turn(server, record, prompt, prefilled, text, STRICT_RULE, BOUND)
    next_turn(server, record, prompt, prefilled, text, {"merge": "attention_matching", "references": 256}, BOUND_FITTED)
