"""kvpress's presses as rows: their own cache gives the same next tokens, and our parity pairs keep the same tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from keepkv_sglang.compress.scorers.expected_attention_full import FUTURE, SINKS
from keepkv_sglang.tools.evaluate import peers
from keepkv_sglang.tools.evaluate.future import mean_future, same_moments
from keepkv_sglang.tools.evaluate.methods import slots_of
from keepkv_sglang.tools.evaluate.parity import PAIRS
from keepkv_sglang.tools.evaluate.peers import PEERS, KVzip, Peer
from keepkv_sglang.tools.evaluate.probe import Probe, Row

installed = (peers.folder() / f"kvpress-{peers.VERSION}.dist-info").is_dir()
pytestmark = pytest.mark.skipif(not installed, reason="no kvpress: make kvpress")

TOKENS, FOLLOWING, BUDGET = 256, 12, 0.3
M = slots_of(BUDGET, TOKENS)
TEXT = """The city council met on Monday. Item 14 was the bridge over the Lune: the engineer, Ms Okafor, said that the
east pier had moved 3.2 mm since March and that the limit was 5 mm. Mr Hale asked what a closure would cost; the answer
was 41,000 pounds a week. def area(r): return 3.14159 * r ** 2. The password for the archive is "heron-77-quartz". A
motion to close the bridge to lorries was carried by nine votes to four, and the next meeting is on 6 June at noon. """


@pytest.fixture(scope="module")
def probe(model_path) -> Iterator[Probe]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # contexts this short gain nothing from more, and lose much on a busy machine
    yield Probe(str(model_path))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(probe) -> tuple[list[int], list[int]]:
    ids = probe.ids(TEXT + TEXT.upper() + TEXT.replace("the", "a"))
    assert len(ids) >= TOKENS + FOLLOWING
    return ids[:TOKENS], ids[TOKENS : TOKENS + FOLLOWING]


@pytest.fixture(scope="module")
def full(probe, text) -> Row:
    return probe.row(text[0])


def hugging_face(probe: Probe, cache, following: list[int]) -> torch.Tensor:
    """Log-probabilities behind a compressed cache by transformers alone, at logical positions."""
    position = torch.arange(TOKENS, TOKENS + len(following))[None]
    with peers.plain_attention(probe):
        out = probe.model(torch.tensor([following]), past_key_values=cache, position_ids=position)
    return out.logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if isinstance(peer, Peer)])
def test_a_row_is_the_press_s_own_cache(name, probe, text, full):
    ids, following = text
    peer = PEERS[name]
    row = peer.prefill(probe, ids, BUDGET, full)  # from a recorded forward pass
    cache = peer.slow_cache(probe, ids, M)
    assert all(layer.k.shape[0] == M for layer in row.layers) and row.tokens == TOKENS
    expected = hugging_face(probe, cache, following)
    # float32 logits of order 20; two orders of summation
    torch.testing.assert_close(row.feed(following), expected, rtol=0, atol=1e-4)
    assert (expected - full.clone().feed(following)).abs().max() > 0.05  # it did drop something


def test_kvzip_as_log_votes_is_kvzip_s_mask(probe, text, full):
    """kvpress masks by a key whose attention underflows; a log vote of -inf gives the same next tokens."""
    kvpress = peers.load()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ids, following = text
    peer = PEERS["kvpress KVzip (masked, heads differ)"]
    assert isinstance(peer, KVzip)
    row = peer.prefill(probe, ids, BUDGET, full)
    visible = sum(int((layer.lv == 0).sum()) for layer in row.layers)
    assert visible == M * full.layers[0].lv.shape[1] * len(row.layers)

    cache, scores, dropped = peer.cache(probe, ids, M)
    patched = kvpress.attention_patch.attention_patch(ALL_ATTENTION_FUNCTIONS["sdpa"])
    attention = [layer.self_attn for layer in probe.model.model.layers]
    own = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = patched
        for layer, gone in zip(attention, dropped, strict=True):
            heads, tokens = gone.nonzero(as_tuple=True)
            layer.masked_key_indices = (torch.zeros_like(heads), heads, tokens)
        expected = hugging_face(probe, cache, following)
    finally:
        for layer in attention:
            layer.masked_key_indices = None
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(own)
    torch.testing.assert_close(row.feed(following), expected, rtol=0, atol=1e-4)

    equal = PEERS["kvpress KVzip (equal slots)"].prefill(probe, ids, BUDGET, full)
    for layer, gone, score in zip(kept(equal, full), dropped, scores, strict=True):
        assert layer.shape[1] == M
        for chosen, masked, s in zip(layer, gone, score, strict=True):  # both are the best of a head
            both = min(M, int((~masked).sum()))
            best = set(s.topk(both).indices.tolist())
            assert best <= set(chosen.tolist()) and best <= set((~masked).nonzero()[:, 0].tolist())


def kept(row: Row, full: Row) -> list[torch.Tensor]:
    """[Hkv, m] per layer, ascending: which token each slot is, by its key."""
    found = []
    for layer, whole in zip(row.layers, full.layers, strict=True):
        slots, tokens = layer.k.transpose(0, 1), whole.k.transpose(0, 1)
        distance = torch.cdist(slots, tokens, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.min(dim=2)
        assert nearest.values.max() < 1e-2
        found.append(nearest.indices.sort(dim=1).values)
    return found


@pytest.mark.parametrize(
    ("label", "share"),
    # pools differ at the window's edge; the rest: a rounding may swap the last two
    [("SnapKV", 0.98), ("Knorm", 0.9995), ("TOVA", 0.9995), ("ExpectedAttention", 0.999)],
)
def test_parity_pairs_keep_the_same_tokens(label, share, probe, text, full):
    mine, theirs = PAIRS[label]
    a = kept(mine.prefill(probe, text[0], BUDGET, full), full)
    b = kept(PEERS[theirs].prefill(probe, text[0], BUDGET, full), full)
    same = sum(
        len(set(x.tolist()) & set(y.tolist())) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )
    assert same / sum(p.numel() for p in a) >= share
    if label == "TOVA":
        assert all((p == p[0]).all() for p in a)  # one choice per layer


def test_moments_of_future_queries_are_kvpress_s(probe, text, full):
    """Mean and covariance of the turned queries against get_query_statistics, which rotates the moments."""
    press = peers.load().ExpectedAttentionPress(0.5, n_future_positions=FUTURE)
    module, seen = probe.model.model.layers[7].self_attn, {}
    hook = module.register_forward_hook(lambda m, a, kwargs, out: seen.update(kwargs), with_kwargs=True)
    module.rotary_emb = probe.model.model.rotary_emb
    probe.row(text[0])
    hook.remove()
    with torch.no_grad():
        mu, cov = press.get_query_statistics(module, seen["hidden_states"])
    every = mean_future(probe, full.queries[7], TOKENS, FUTURE)[SINKS:]
    for queries in (every, same_moments(every)):
        q = queries.transpose(0, 1)
        torch.testing.assert_close(q.mean(1), mu[0], rtol=1e-4, atol=1e-4)
        centred = q - q.mean(1, keepdim=True)
        torch.testing.assert_close(centred.mT @ centred / q.shape[1], cov[0], rtol=1e-3, atol=1e-3)


def test_loading_changes_nothing_else(probe):
    """Ours come first on the path, and transformers' attention functions are what they were."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    peers.load()
    assert sys.path[0] != str(peers.folder()) and sys.path.index(str(peers.folder())) >= len(sys.path) - 3
    for name in ("transformers", "torch", "datasets", "peft"):
        module = sys.modules.get(name)
        assert module is None or "kvpress" not in str(module.__file__)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__name__ == "sdpa_attention_forward"
    assert probe.model.config._attn_implementation.startswith("keepkv_probe")


def test_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="make kvpress"):
        peers.load.__wrapped__()


def test_a_budget_of_everything_is_the_full_cache(probe, text, full):
    for peer in (PEERS["kvpress TOVA"], PEERS["kvpress KVzip (equal slots)"]):
        assert peer.prefill(probe, text[0], 1.0, full).slots == TOKENS
    assert replace(PEERS["kvpress TOVA"]).prefill(probe, text[0], 1.0).slots == TOKENS
