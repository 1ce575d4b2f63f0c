"""Which requests are never compressed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.turn.eligibility import REASONS, why_not

PLAIN = {"session": None, "input_embeds": None, "positional_embed_overrides": None, "multimodal_inputs": None}
ON = KeepKVConfig(enabled=True)


@pytest.mark.parametrize(
    ("has", "config", "reason"),
    [
        ({}, ON, None),
        ({}, ON.with_request({"enabled": False}), "request"),
        ({}, ON.with_request({"budget": 1}), "budget 1"),
        ({"session": object()}, ON, "session"),
        ({"input_embeds": [[0.1]]}, ON, "input embeddings"),
        ({"positional_embed_overrides": object()}, ON, "input embeddings"),
        ({"multimodal_inputs": object()}, ON, "multimodal input"),
        ({"beam_group": object()}, ON, "beam search"),
    ],
    ids=str,
)
def test_what_is_never_compressed_says_why(has, config, reason):
    assert why_not(SimpleNamespace(**PLAIN | has), config) == reason
    assert reason is None or REASONS[reason]
