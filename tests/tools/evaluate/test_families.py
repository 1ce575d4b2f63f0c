"""`keepkv eval` on models of other families: the probe's row is the model's own forward pass, and queries are moved as
the model would have placed them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keepkv_sglang.compress.queries.references import QuerySample
from keepkv_sglang.tools.evaluate.methods import DEFAULT, OURS
from keepkv_sglang.tools.evaluate.probe import Probe
from tests.support.client import tokens
from tests.support.families import FAMILIES, VOCABULARY, build
from tests.support.tokenizer import byte_tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    folder: Path = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    byte_tokenizer([], "{{ messages[0].content }}").save_pretrained(folder)
    return Probe(str(folder))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [token % VOCABULARY for token in tokens(300, 3)]


def test_a_row_of_full_cache_is_the_model(probe: Probe, ids: list[int]):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(probe.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    row = probe.row(ids[:200])
    got = row.feed(ids[200:])
    torch.testing.assert_close(got, wanted[200:], rtol=0, atol=1e-4)
    compressed = OURS[DEFAULT].prefill(probe, ids[:200], 0.3)
    assert compressed.slots == 60 and row.slots == 300


def test_reference_queries_are_moved_as_the_model_would_place_them(probe: Probe, ids: list[int]):
    """The first layer's query of a token depends on its position only through the rotary embedding."""
    row = probe.row()
    row.feed(ids[:20])
    moved = QuerySample([0, 3, 7, 19], 4, 40, 20, probe.rotary, torch.float32, torch.device("cpu"))
    there = probe.row()
    there.feed([ids[0]] * 40 + [ids[at] for at in (0, 3, 7, 19)])
    torch.testing.assert_close(moved.place(row.queries[0][[0, 3, 7, 19]]), there.queries[0][40:], rtol=1e-3, atol=1e-4)
