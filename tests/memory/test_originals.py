"""Host memory for originals: how much of it, what a start refuses, and whether a GPU reads back what it wrote."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from keepkv_sglang.memory import originals
from keepkv_sglang.memory.originals import MOST_STAGED, BlockLayout, BlockStore, Staging
from keepkv_sglang.runtime import attach
from keepkv_sglang.runtime.counters import Counters
from keepkv_sglang.settings.config import ConfigError, KeepKVConfig

LAYERS, SLOTS, HEADS, DIM = 3, 1001, 2, 32


def start(free=1 << 30, context_len=4096, ranks=1, **settings):
    shape = (SLOTS, HEADS, DIM)
    pool = SimpleNamespace(
        layer_num=LAYERS,
        get_key_buffer=lambda _: torch.zeros(shape, dtype=torch.bfloat16),
        get_value_buffer=lambda _: torch.zeros(shape, dtype=torch.bfloat16),
    )
    rt = SimpleNamespace(
        config=KeepKVConfig(enabled=True, **settings), kv_pool=pool, first_layer=0, counters=Counters()
    )
    return attach.originals(rt, attach.HostMemory(lambda: free, torch.empty), context_len, ranks)


def test_nothing_is_allocated_unless_asked():
    assert start() is None


@pytest.mark.parametrize(("dtype", "bytes_per_token"), [("auto", 4 * DIM), ("int8", 2 * DIM + 4), ("int4", DIM + 8)])
def test_as_many_tokens_as_the_flags_say(dtype, bytes_per_token):
    """docs/originals.md: native 2 D b, int8 2 D + 4, int4 D + 4 D / 64 + 4 ceil(D / 32), times layers and heads."""
    if dtype == "int4":
        bytes_per_token = DIM + 4 * DIM / 64 + 4 * -(-DIM // 32)
    bytes_per_token *= LAYERS * HEADS
    by_ratio = start(host_ratio=2.0, host_dtype=dtype)
    assert by_ratio.store.blocks == -(-2 * (SLOTS - 1) // 64)
    assert by_ratio.store.nbytes == by_ratio.store.blocks * 64 * bytes_per_token
    by_size = start(host_size=0.001, host_dtype=dtype, host_ratio=7.0)
    assert 0 <= 1e6 - by_size.store.nbytes < 64 * bytes_per_token


def test_what_the_machine_has_not_is_refused():
    with pytest.raises(ConfigError, match=r"need 0\.\d\d GB .* use a smaller --keepkv-host-ratio"):
        start(free=1 << 20, host_ratio=20.0)
    with pytest.raises(ConfigError, match="too small for one block"):
        start(host_size=1e-6)
    assert start(free=6 << 20, host_size=0.002).store.blocks
    with pytest.raises(ConfigError, match="use a smaller"):
        start(free=6 << 20, host_size=0.002, ranks=4)


def test_a_history_is_staged_one_layer_at_a_time():
    staging = start(host_ratio=1.0).staging
    assert staging.tokens == 4096 and staging.keys.shape == (4097, HEADS, DIM) and staging.keys.dtype == torch.bfloat16
    assert staging.table[0, :3].tolist() == [1, 2, 3]
    assert start(host_ratio=1.0, unpack_overflow="view").staging is None
    assert start(host_ratio=1.0, unpack=0).staging is None
    layout = BlockLayout("native", 8, 128, 128, torch.bfloat16)
    assert Staging.tokens_for(layout, 1 << 20) == MOST_STAGED // (8 * 256 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", ["native", "int8", "int4"])
def test_memory_that_forgets_is_found_at_start(codec, dtype, monkeypatch):
    store = BlockStore(BlockLayout(codec, HEADS, DIM, DIM, dtype), LAYERS, 2)
    assert store.works_on(torch.device("cpu"))
    monkeypatch.setattr(originals, "encode", lambda *_: None)
    assert not store.works_on(torch.device("cpu"))
