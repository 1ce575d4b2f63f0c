"""The fixed text's queries: which ones are kept, and what merging with them computes."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch

from keepkv_sglang.compress.batch import SCRATCH_BYTES
from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.compress.queries.pseudo import PseudoQueries, calibration_rows
from keepkv_sglang.compress.queries.rotary import Rotary
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.memory.arena import QueryArena
from keepkv_sglang.memory.calibration import QUERIES, Calibration, rotary_of
from keepkv_sglang.memory.votes import VoteStore
from keepkv_sglang.runtime.compressor import merge_unused
from keepkv_sglang.settings.config import KeepKVConfig
from tests.support.layers import in_slots
from tests.support.rotary import table

TOKENS = list(range(500, 700))
LAYERS, SLOTS, Q_HEADS, KV_HEADS, DIM = 2, 80, 6, 2, 8
ROTARY = Rotary(table(400, DIM).float())


def arena() -> QueryArena:
    return QueryArena(LAYERS, 2 * QUERIES, Q_HEADS, DIM, torch.float32, "cpu")


def run(calibration: Calibration, store: QueryArena, chunks: list[tuple[int, int]], at: int = 0) -> None:
    """What the server does: a forward per chunk, its queries are (layer, token, head)-numbered."""
    for start, end in chunks:
        out: tuple[list[int], list[int]] = ([], [])
        calibration.capture(store, start, end, out, at)
        for query, row in zip(*out, strict=True):
            store.queries[:, row] = float(query - at + start)
    calibration.finish(store)


@pytest.mark.parametrize("chunks", [[(0, 200)], [(0, 64), (64, 128), (128, 200)], [(0, 5), (5, 199), (199, 200)]])
def test_keeps_the_queries_of_its_tokens_however_the_prompt_is_cut(chunks):
    store, calibration = arena(), Calibration(TOKENS, ROTARY)
    run(calibration, store, chunks, at=7)
    queries = calibration.queries
    assert queries is not None and queries.q.shape == (LAYERS, QUERIES, Q_HEADS, DIM)
    assert queries.position.tolist() == calibration_rows(200, QUERIES)
    assert queries.q[1, :, 3, 5].tolist() == [float(token) for token in calibration_rows(200, QUERIES)]
    assert store.free_rows == store.rows
    assert calibration.nbytes == 4 * LAYERS * QUERIES * Q_HEADS * DIM


def test_a_cached_beginning_is_no_calibration_and_the_next_try_is():
    store, calibration = arena(), Calibration(TOKENS, ROTARY)
    run(calibration, store, [(100, 200)])
    assert calibration.queries is None and store.free_rows == store.rows
    run(calibration, store, [(0, 200)])
    assert calibration.queries is not None


def test_only_its_own_prompt_is_wanted_and_only_once():
    store, calibration = arena(), Calibration(TOKENS, ROTARY)
    request = SimpleNamespace(origin_input_ids=array("q", TOKENS))
    other = SimpleNamespace(origin_input_ids=array("q", [*TOKENS[:-1], 1]))
    longer = SimpleNamespace(origin_input_ids=array("q", [*TOKENS, 1]))
    assert calibration.wants(request) and not calibration.wants(other) and not calibration.wants(longer)
    run(calibration, store, [(0, 200)])
    assert not calibration.wants(request)


def test_no_tokenizer_or_several_rotary_tables_mean_no_calibration():
    class Embedding(torch.nn.Module):
        cos_sin_cache = ROTARY.cos_sin
        is_neox_style = True

        def _compute_cos_sin_cache(self) -> torch.Tensor:
            return self.cos_sin_cache

    one, shared = torch.nn.Sequential(Embedding()), Embedding()
    tokenizer = SimpleNamespace(encode=lambda text: TOKENS)
    assert Calibration.of(None, rotary_of(one)) is None
    assert rotary_of(torch.nn.Sequential(Embedding(), Embedding())) is None
    assert Calibration.of(tokenizer, None) is None
    assert Calibration.of(tokenizer, rotary_of(torch.nn.ModuleList([shared, shared]))) is not None


class World:
    """As much of a Runtime as a merge reads, with random content."""

    def __init__(self, calibrated: bool) -> None:
        torch.manual_seed(0)
        self.keys = torch.randn(LAYERS, SLOTS, KV_HEADS, DIM)
        self.values = torch.randn(LAYERS, SLOTS, KV_HEADS, DIM)
        self.kv_pool = SimpleNamespace(
            layer_num=LAYERS, get_key_buffer=lambda i: self.keys[i], get_value_buffer=lambda i: self.values[i]
        )
        self.first_layer, self.scales = 0, {0: 0.35, 1: 0.4}
        self.votes, self.arena = VoteStore(LAYERS, SLOTS, KV_HEADS, "cpu"), arena()
        self.scheduler = SimpleNamespace(enable_overlap=False)
        self.cells = None  # every head keeps the same number
        self.calibration = Calibration(TOKENS, ROTARY)
        if calibrated:
            q = torch.randn(LAYERS, QUERIES, Q_HEADS, DIM)
            self.calibration.queries = PseudoQueries(q, torch.arange(QUERIES) + 4, ROTARY)


@pytest.mark.parametrize("start", [0, 12])
@pytest.mark.parametrize("calibrated", [True, False])
def test_merge_is_the_compressors_with_queries_behind_the_prefix(calibrated, start):
    world, config = World(calibrated), KeepKVConfig(enabled=True, budget=0.2, recent=3, sinks=2, threshold=0.1)
    shuffled = torch.randperm(SLOTS)
    path, target = shuffled[:52], shuffled[60:68]
    untouched = torch.ones(SLOTS, dtype=torch.bool)
    untouched[target] = False
    keys, values = world.keys.clone(), world.values.clone()
    merge_unused(world, config, path, start, 60, target)
    source, calibration = path[start:], world.calibration.queries
    for layer in range(LAYERS):
        policy = SpanPolicy(
            m=8, recent=3, sinks=2 if start == 0 else 0, threshold=0.1,
            merge="attention_matching" if calibrated else "evict",
            scorer="window_references" if calibrated else "keydiff",
        )  # fmt: skip
        q = calibration.behind(layer, 60) if calibrated else torch.empty(0, Q_HEADS, DIM)
        seen, pools = torch.full((len(q),), len(source) - 1), (keys[layer], values[layer], torch.zeros(SLOTS, KV_HEADS))
        x = in_slots(q, seen, pools, source, source[:0], world.scales[layer])
        expected = compress_layer(x, policy, SCRATCH_BYTES)
        assert torch.equal(world.keys[layer, target], expected.k)
        assert torch.equal(world.values[layer, target], expected.v)
        assert torch.equal(world.votes.log_votes[layer][target], expected.lv)
        assert (expected.lv > 0).any() == calibrated, "merged: some slot stands for several tokens"
        assert torch.equal(world.keys[layer, untouched], keys[layer, untouched])
        assert torch.equal(world.values[layer, untouched], values[layer, untouched])
        assert not world.votes.log_votes[layer][untouched].any()
