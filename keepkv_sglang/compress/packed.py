"""A span whose heads keep different numbers of tokens becomes a packed span (kernels/attention/packed.py).

Of the m slots, those of whole tokens come first and those of the recent tokens that stay raw last: one token each, in
every head. The cells of the others are shared out: first all layers are scored, or one group of layers after the other
where a sharing decides each layer alone, then every head is merged into its own number of cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch

from keepkv_sglang.compress.batch import Rows, Storage, layer_groups, layer_input
from keepkv_sglang.compress.by_head import Scored, merge_scored, score_heads
from keepkv_sglang.compress.heads import comparable, get_sharing, slots_of_heads
from keepkv_sglang.compress.layer import LayerResult
from keepkv_sglang.compress.select import UNIFORM, SpanPolicy


def shares_cells(policy: SpanPolicy, left: int) -> bool:
    """Whether heads may keep different numbers of a span's tokens: a sharing that does it, a scorer whose scores can be
    compared, and slots to share out. left: slots at the end that stay raw."""
    return policy.heads != UNIFORM and policy.free > left and comparable(policy.scorer)


def compress_packed(
    storage: Storage,
    rows: Rows,
    queries: Callable[[int], torch.Tensor],
    q_heads: int,
    q_index: torch.Tensor,
    policy: SpanPolicy,
    left: int,
    scratch_bytes: int,
    packed: Callable[[torch.Tensor, torch.Tensor], None],
) -> Iterator[LayerResult]:
    """As compress_rows, for a policy that shares_cells; yields a result for each head of each layer. Behind the last
    one packed(slots, counts) is told which of the target's slots are a packed span, and counts int64 [layers, Hkv], the
    cells of each head.

    The target may be slots of the span: a layer is written when it has been read. Memory beside that of compress_rows:
    what the queries found in each layer, Q (D + 2) + 4 n float32 numbers per head, unless the sharing goes by layer;
    and as many K and V as fit scratch_bytes.
    """
    shared = (storage, rows, queries, q_heads, q_index, policy, left, scratch_bytes, packed)
    return chain.from_iterable(packed_pieces(*shared))


def packed_pieces(
    storage: Storage,
    rows: Rows,
    queries: Callable[[int], torch.Tensor],
    q_heads: int,
    q_index: torch.Tensor,
    policy: SpanPolicy,
    left: int,
    scratch_bytes: int,
    packed: Callable[[torch.Tensor, torch.Tensor], None],
    most_layers: int | None = None,
) -> Iterator[Iterable[LayerResult]]:
    """compress_packed in pieces, as batch.row_pieces; one that only scores has no results."""
    groups = layer_groups(storage, rows, len(q_index), q_heads, scratch_bytes, most_layers)
    heads, writer, kept = storage.keys[0].shape[1], _Writer(storage, rows, policy, left), []
    by_layer = getattr(get_sharing(policy.heads), "by_layer", False)
    for together in [[group] for group in groups] if by_layer else [groups]:
        scored: list[list[Scored]] = []
        inputs, room = [], scratch_bytes  # inputs that need not be gathered again
        for layers in together:
            x = layer_input(storage, rows, layers, queries, q_index)
            scored.append(score_heads(x, policy, scratch_bytes))
            if all(part.sums is not None for part in scored[-1]):
                x = replace(x, k_ctx=x.k[:0], lv_ctx=x.lv[:0])
            room -= x.k.nbytes + x.v.nbytes + x.k_ctx.nbytes
            inputs.append(x if room >= 0 or len(together) == 1 else None)
            yield ()
        scores = torch.cat([part.scores for group in scored for part in group])
        counts = slots_of_heads(scores.view(-1, heads, rows.n), policy, policy.heads)
        kept += counts
        for layers, group, held in zip(together, scored, inputs, strict=True):
            own, counts = [count for layer in counts[: len(layers)] for count in layer], counts[len(layers) :]
            again = any(part.sums is None for part in group)
            x = held or layer_input(storage, rows, layers, queries, q_index, context=again)
            results = merge_scored(x, policy, group, own, scratch_bytes)
            for at in range(len(layers)):
                writer.add(results[at * heads : (at + 1) * heads])
            writer.flush()
            yield results
    packed(writer.slots, torch.tensor(kept) - policy.whole_tokens - left)


class _Writer:
    """Writes results into the target's slots, layer by layer; cells run on into later layers, which are written only
    when they have been read."""

    def __init__(self, storage: Storage, rows: Rows, policy: SpanPolicy, left: int) -> None:
        whole, m = policy.whole_tokens, policy.m
        self._pools = (storage.keys, storage.values, storage.log_votes)
        self._raw = torch.cat([rows.target[:whole], rows.target[m - left :]])
        self.slots, self._whole, self._left = rows.target[whole : m - left], whole, left
        self._pending: list[tuple[torch.Tensor, ...]] = []  # cells of k, v, lv that lie in layers not written yet
        self._raws: list[tuple[torch.Tensor, ...]] = []
        self._written = self._read = 0

    def add(self, results: Sequence[LayerResult]) -> None:
        """The next layer has been read; results of its heads."""
        parts = [(r.k[:, 0], r.v[:, 0], r.lv[:, 0]) for r in results]
        whole, left = self._whole, self._left
        self._raws.append(
            tuple(
                torch.stack([torch.cat([x[:whole], x[len(x) - left :]]) for x in of_heads], dim=1)
                for of_heads in zip(*parts, strict=True)
            )
        )
        self._pending += [tuple(x[whole : len(x) - left] for x in of_head) for of_head in parts]
        self._read += 1

    def flush(self) -> None:
        """Writes every layer that has been read and whose cells are complete."""
        raws, self._raws = self._raws, []
        for layer, raw in enumerate(raws, self._read - len(raws)):
            for pool, content in zip(self._pools, raw, strict=True):
                pool[layer][self._raw] = content
        cells = [torch.cat(parts) for parts in zip(*self._pending, strict=True)]
        each = len(self.slots) * self._pools[0][0].shape[1]
        ready = min(self._read - self._written, len(cells[0]) // each)
        for at in range(ready):
            for pool, content in zip(self._pools, cells, strict=True):
                part = content[at * each : (at + 1) * each]
                pool[self._written][self.slots] = part.view(len(self.slots), -1, *part.shape[1:])
            self._written += 1
        self._pending = [tuple(x[ready * each :] for x in cells)]
