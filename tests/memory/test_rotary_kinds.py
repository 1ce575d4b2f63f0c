"""The rotary embeddings that SGLang builds, against transformers: a moved query is the query of its new position."""

from __future__ import annotations

import pytest
import torch

from keepkv_sglang.memory.calibration import rotary_of
from keepkv_sglang.tools.simulate.sglang_parts import sglang_context

DIM, POSITIONS, THETA = 64, 2048, 10_000.0
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
}


SOURCE, TARGET = [0, 3, 200, 900, 1500], [1600, 1601, 1700, 1800, 2000]


def sglangs(kind: str) -> torch.nn.Module:
    from sglang.srt.layers.rotary_embedding import get_rope

    scaling = KINDS[kind]
    part = scaling.get("partial_rotary_factor", 1.0)
    with sglang_context():
        return get_rope(DIM, DIM, POSITIONS, THETA, True, scaling if "factor" in scaling else None, torch.float32, part)


def in_sglang(kind: str, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
    q, _ = sglangs(kind).forward_native(torch.tensor(positions), x.flatten(1).clone(), x.flatten(1).clone())
    return q.view_as(x)


def in_transformers(kind: str, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
    from transformers import LlamaConfig, Phi3Config
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

    # Phi-3 has the one that rotates a part of the head, and no other kind.
    config, embedding = (Phi3Config, Phi3RotaryEmbedding) if kind == "partial" else (LlamaConfig, LlamaRotaryEmbedding)
    made = config(
        hidden_size=4 * DIM, num_attention_heads=4, max_position_embeddings=POSITIONS, pad_token_id=0,
        rope_parameters={**KINDS[kind], "rope_theta": THETA},
    )  # fmt: skip
    cos, sin = embedding(made)(x, torch.tensor([positions]))
    heads = x[None].transpose(1, 2)
    return apply_rotary_pos_emb(heads, heads, cos, sin)[0][0].transpose(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_query_is_the_query_of_its_new_position(kind):
    rotary = rotary_of(torch.nn.ModuleList([sglangs(kind)]))
    assert rotary is not None
    raw = torch.randn(5, 4, DIM, generator=torch.Generator().manual_seed(1))
    turn = rotary.turn(torch.tensor(SOURCE), torch.tensor(TARGET), torch.float32, torch.device("cpu"))
    # SGLang's dynamic NTK has one table for all lengths, that of the longest; transformers' follows the length.
    for at in (in_sglang,) if kind == "dynamic" else (in_sglang, in_transformers):
        torch.testing.assert_close(turn(at(kind, raw, SOURCE)), at(kind, raw, TARGET), rtol=1e-3, atol=2e-3)
