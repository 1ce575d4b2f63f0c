"""A NaN or an infinity among a span's keys: slots are still what the policy promises, other heads are untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.settings.config import SCORERS
from tests.support.layers import policy, random_layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # C++, torch
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("token", [30, 58])  # seen by all queries, and by some
def test_sinks_and_recent_tokens_are_kept(scorer, bad, token, dtype):
    x, wanted = random_layer(n=60, w=12, dtype=dtype), policy(12, "attention_matching", scorer=scorer)
    broken = replace(x, k=x.k.clone())
    broken.k[token, 0, 2] = bad
    got, sound = compress_layer(broken, wanted), compress_layer(x, wanted)
    for head in range(2):
        assert {0, 1, 56, 57, 58, 59} <= set(got.kept[head].tolist())
    assert got.kept[1].equal(sound.kept[1])
    for a, b in ((got.k, sound.k), (got.v, sound.v), (got.lv, sound.lv)):
        # Not in bits: a sum that overflowed sends all heads the slower, exact way (compress/window.trusted). The fit
        # makes rounding of 1e-7 (1e-16) some thousand times as large (docs/log.md).
        bound = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(a[:, 1], b[:, 1], rtol=bound, atol=bound)
