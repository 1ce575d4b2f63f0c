"""The pool is sized with a slot's votes, and beside the query arena, whose size is decided there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt import runtime_context

from keepkv_sglang.hooks import pool_size
from keepkv_sglang.memory.arena import QueryArena
from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.runtime import attach, process
from keepkv_sglang.settings.config import KeepKVConfig

LAYERS, HEADS, Q_HEADS, DIM = 32, 8, 32, 128


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(attn_tp_size=2))
    monkeypatch.setattr(process, "_runtime", None)


def configurator(device: str = "cuda") -> SimpleNamespace:
    """As much as the hooks read of SGLang's KVCacheConfigurator, two ranks."""
    model = SimpleNamespace(
        get_num_kv_heads=lambda ranks: HEADS // ranks, get_num_attention_heads=lambda ranks: Q_HEADS // ranks,
        head_dim=DIM, dtype=torch.bfloat16, context_len=8192,
    )  # fmt: skip
    return SimpleNamespace(model_config=model, layer_info=SimpleNamespace(num_effective_layers=LAYERS), device=device)


def test_nothing_changes_where_keepkv_is_off():
    for config in (None, KeepKVConfig(enabled=False)):
        if config is not None:
            process.start(config)
        assert pool_size.after_compute_cell_size(100, None, configurator(), LAYERS) is None
        assert pool_size.after_profile_available_bytes(1 << 40, configurator(), 0) is None


def test_a_slot_costs_its_votes():
    """Of this rank: as many bytes as VoteStore takes for one more slot."""
    process.start(KeepKVConfig(enabled=True))
    store = [VoteStore(LAYERS, slots, HEADS // 2, "cpu").nbytes for slots in (10, 11)]
    size = pool_size.after_compute_cell_size(1000, None, configurator(), LAYERS)
    assert size == 1000 + store[1] - store[0] == 1000 + 4 * LAYERS * HEADS // 2


@pytest.mark.parametrize(("device", "available"), [("cpu", 40 << 30), ("cuda", 40 << 30), ("cuda", 300 << 20)])
def test_the_arena_comes_off_what_the_pool_could_have(device: str, available: int):
    config = KeepKVConfig(enabled=True, references=256)
    rt = process.start(config)
    left = pool_size.after_profile_available_bytes(available, configurator(device), 0)
    row = LAYERS * Q_HEADS // 2 * DIM * 2
    rows = attach.arena_rows(config, True, 8192, rt.arena_most // row - 1)  # as attach.model_runner
    assert available - left == QueryArena(LAYERS, rows, Q_HEADS // 2, DIM, torch.bfloat16, "meta").nbytes
    share = int(0.04 * available) if device == "cuda" else 0
    assert rt.arena_most == min(max(512 << 20, share), available // 2)
    assert (rows + 1) * row <= rt.arena_most
    if device == "cuda" and available == 40 << 30:
        assert rows // (config.window + 256) >= 40, "of its 64 windows"
