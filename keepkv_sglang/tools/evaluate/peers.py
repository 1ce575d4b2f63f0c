"""kvpress 0.5.5 beside ours: the same model in memory, the same documents, the same process.

`make kvpress` puts it into a folder of its own, because its metadata excludes the transformers that SGLang pins. The
folder goes to the END of sys.path, so that everything we have comes from our own environment.

Importing kvpress replaces every attention function of transformers by a wrapper; that is undone here (only KVzip's
mask needs it, and what it would mask becomes a log vote of -inf). A press is a hook on the model's own forward pass,
here with transformers' `sdpa` in the place of the probe's attention; one pass is recorded and given to all presses.

Slots are equal to ours: a ratio is chosen that makes kvpress keep exactly ceil(budget * n). kvpress wants a
`cache_position`, which transformers 5.19 no longer hands to attention layers, so it is given by hand.

kvpress and transformers are imported where they are used: optional.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from keepkv_sglang.tools.evaluate.methods import slots_of
from keepkv_sglang.tools.evaluate.probe import Probe, Row, Slots
from keepkv_sglang.tools.places import cache_folder

VERSION = "0.5.5"


def folder() -> Path:
    """Where `make kvpress` installs."""
    return cache_folder() / "kvpress"


@lru_cache(maxsize=1)
def load() -> Any:
    """The module kvpress; ValueError when it is not installed or another version."""
    place = folder()
    if not (place / f"kvpress-{VERSION}.dist-info").is_dir():
        raise ValueError(f"no kvpress {VERSION} in {place}: run `make kvpress` (half a minute), or leave --peers out")
    if str(place) not in sys.path:
        sys.path.append(str(place))
    with _attention_functions_kept():
        kvpress = importlib.import_module("kvpress")
    logging.getLogger("kvpress.presses.kvzip_press").setLevel(logging.ERROR)  # it says for every text that it is slow
    if not Path(str(kvpress.__file__)).is_relative_to(place):
        raise ValueError(f"kvpress comes from {kvpress.__file__}, not from {place}: uninstall that one")
    return kvpress


@contextmanager
def _attention_functions_kept() -> Iterator[None]:
    """transformers' table of attention functions is afterwards what it was."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(before)


@dataclass(frozen=True)
class Peer:
    """A press that removes or merges the same number of tokens in every head. press: (kvpress, ratio) -> the press."""

    name: str
    press: Callable[[Any, float], Any]

    def prefill(self, probe: Probe, ids: Sequence[int], budget: float, full: Row | None = None) -> Row:
        """As methods.Method; `full` is used only where nothing is to be removed."""
        m = slots_of(budget, len(ids))
        if m >= len(ids):
            return full.clone() if full is not None else probe.row(ids)
        row = row_of(probe, self.cache(probe, ids, m), len(ids))
        assert row.slots == m, f"{self.name} kept {row.slots} slots, not {m}"
        return row

    def cache(self, probe: Probe, ids: Sequence[int], m: int) -> Any:
        """A DynamicCache of m slots per layer and head: kvpress keeps int(n (1 - ratio))."""
        press = self.press(load(), 1 - (m + 0.5) / len(ids))
        prompt, cache = prefilled(probe, tuple(ids)), _dynamic_cache()
        with torch.no_grad(), press(probe.model):
            for module, kwargs, k, v in prompt:
                cache.update(k, v, module.layer_idx)
                press.forward_hook(module, [], {**kwargs, "past_key_values": cache}, [None, None])
        return cache

    def slow_cache(self, probe: Probe, ids: Sequence[int], m: int) -> Any:
        """The same as kvpress is used by others, with a forward pass of its own. For the tests."""
        press, cache = self.press(load(), 1 - (m + 0.5) / len(ids)), _dynamic_cache()
        with plain_attention(probe), press(probe.model):
            _prefill(probe, ids, cache)
        return cache


@lru_cache(maxsize=1)
def prefilled(probe: Probe, ids: tuple[int, ...]) -> list[tuple[Any, dict[str, Any], torch.Tensor, torch.Tensor]]:
    """What kvpress's hooks would see in one forward pass: (attention layer, its arguments, keys, values) per layer.

    A press writes to the cache only after the layer has attended, so nothing that a later layer sees depends on it,
    and one pass serves all presses and budgets of a prompt. The last prompt is kept.
    """
    seen: list[tuple[Any, dict[str, Any]]] = []
    cache, layers = _dynamic_cache(), probe.model.model.layers
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, _, kwargs, __: seen.append((m, kwargs)), with_kwargs=True)
        for layer in layers
    ]
    try:
        with plain_attention(probe):
            _prefill(probe, ids, cache)
    finally:
        for hook in hooks:
            hook.remove()
    return [(m, kwargs, x.keys, x.values) for (m, kwargs), x in zip(seen, cache.layers, strict=True)]


@dataclass(frozen=True)
class KVzip:
    """KVzip: scores by reconstructing the context in a second pass over it.

    equal: every kv head keeps its m best tokens, as the other methods do. Otherwise kvpress's default: m per head and
    layer on average, shared over all heads of all layers by score; such a row holds all n slots, and what a head has
    dropped there has a log vote of -inf. `slots` in a report then says n; the budget is what is visible.

    Differs from kvpress: it takes the first tokens for the chat template's system prompt and drops them whenever it
    drops anything, whatever they are. Our contexts begin with text, so all their tokens are scored.
    """

    name: str
    equal: bool

    def prefill(self, probe: Probe, ids: Sequence[int], budget: float, full: Row | None = None) -> Row:
        """As methods.Method; `full` is used only where nothing is to be removed."""
        n, m = len(ids), slots_of(budget, len(ids))
        if m >= n:
            return full.clone() if full is not None else probe.row(ids)
        cache, scores, dropped = self.cache(probe, ids, m)
        row = row_of(probe, cache, n)
        if self.equal:
            kept = scores.topk(m, dim=-1).indices.sort(dim=-1).values  # [L, Hkv, m]
            index = [k.T[..., None].expand(-1, -1, probe.head_dim) for k in kept]
            row.layers = [
                Slots(layer.k.gather(0, i), layer.v.gather(0, i), layer.lv[:m])
                for layer, i in zip(row.layers, index, strict=True)
            ]
        else:
            row.layers = [
                Slots(layer.k, layer.v, layer.lv.masked_fill(gone.T, -math.inf))
                for layer, gone in zip(row.layers, dropped, strict=True)
            ]
        return row

    def cache(self, probe: Probe, ids: Sequence[int], m: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The whole cache, scores [L, Hkv, n] and what is dropped [L, Hkv, n] bool. kvpress drops
        int(L Hkv n ratio) of all tokens and leaves them in `masked_key_indices` of the attention layers."""
        config, n = probe.model.config, len(ids)
        heads = config.num_hidden_layers * config.num_key_value_heads
        press = load().KVzipPress(compression_ratio=1 - m / n + 0.5 / (heads * n))
        cache, attention = _dynamic_cache(), [layer.self_attn for layer in probe.model.model.layers]
        found: list[torch.Tensor] = []
        choose = press.compress_post

        def compress_post(model: Any) -> None:
            choose(model)  # gives the sinks the highest score
            found.append(press.score_val[:, 0].clone())

        press.compress_post = compress_post
        with plain_attention(probe):
            with press(probe.model):
                press.prefix_length = 0
                _prefill(probe, ids, cache)
            dropped = torch.zeros_like(found[0], dtype=torch.bool)
            for gone, layer in zip(dropped, attention, strict=True):
                gone[layer.masked_key_indices[1:]] = True
                layer.masked_key_indices = None
        assert int(dropped.sum()) == heads * (n - m)
        return cache, found[0], dropped


@contextmanager
def plain_attention(probe: Probe) -> Iterator[None]:
    """The probe's model with transformers' own attention, without gradients."""
    own = probe.model.config._attn_implementation
    probe.model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():  # not inference_mode: KVzip adds to its mask in place
            yield
    finally:
        probe.model.set_attn_implementation(own)


def _dynamic_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _prefill(probe: Probe, ids: Sequence[int], cache: Any) -> None:
    probe.model.model(input_ids=torch.tensor([list(ids)]), past_key_values=cache, cache_position=torch.arange(len(ids)))


def row_of(probe: Probe, cache: Any, tokens: int) -> Row:
    """A Row that stands for `tokens` tokens, of a DynamicCache with k, v [1, Hkv, m, D] per layer; no votes."""
    row = Row(probe)
    row.layers = [
        Slots(k := x.keys[0].transpose(0, 1), x.values[0].transpose(0, 1), k.new_zeros(k.shape[:2]))
        for x in cache.layers
    ]
    row.tokens = tokens
    return row


PEERS: dict[str, Peer | KVzip] = {
    method.name: method
    for method in (
        Peer("kvpress SnapKV", lambda kv, ratio: kv.SnapKVPress(ratio)),
        Peer("kvpress SnapKV (window 32, kernel 7)", lambda kv, ratio: kv.SnapKVPress(ratio, 32, 7)),
        Peer("kvpress ExpectedAttention", lambda kv, ratio: kv.ExpectedAttentionPress(ratio)),
        Peer("kvpress TOVA", lambda kv, ratio: kv.TOVAPress(ratio)),
        Peer("kvpress Knorm", lambda kv, ratio: kv.KnormPress(ratio)),
        Peer("kvpress KeyDiff", lambda kv, ratio: kv.KeyDiffPress(ratio)),
        Peer("kvpress StreamingLLM", lambda kv, ratio: kv.StreamingLLMPress(ratio)),
        Peer("kvpress Merging over SnapKV", lambda kv, ratio: kv.MergingPress(kv.SnapKVPress(ratio))),
        KVzip("kvpress KVzip (masked, heads differ)", equal=False),
        KVzip("kvpress KVzip (equal slots)", equal=True),
    )
}


def peers() -> list[Peer | KVzip]:
    """All of them; ValueError when kvpress is not installed."""
    load()
    return list(PEERS.values())
