"""What the cache's slots hold, against what both trees say of them: for tests, a canary that knows compressed rows."""

from __future__ import annotations

from typing import Any

import torch

from keepkv_sglang.radix.marks import plain
from keepkv_sglang.runtime.process import Runtime


def check_contents(rt: Runtime) -> None:
    """AssertionError (I10) unless every slot that the cache has under one token was written for that token last; those
    that a forward wrote stand for one token in every layer and head, and are no part of a packed span; and a packed
    span in a compressed one has all its slots, one behind the other.

    What a compression left raw may have other votes: tokens that were dropped are seen in them.

    Call when nothing runs. Walks everything, as the cache's own check does (radix/adapter/check.py).
    """
    tree = rt.tree
    if tree.disable:
        return
    whole = [tree.tree_core.all_values_flatten().to(torch.int64)]
    for node_id in tree.nodes.ids():
        info = tree.path_of(node_id)[-1]
        own = tree.nodes.get(node_id).own(info.path_start)
        _hold(rt, tree.path_device_indices(node_id)[info.path_start : info.path_end], own, f"node {node_id}")
    for span in tree.spans.spans():
        if span.raw:
            _hold(rt, span.slots, plain(span.tokens), span)
            if rt.slot_tokens is not None:
                whole.append(span.slots[rt.slot_tokens.known(span.slots)])
        elif rt.cells is not None:
            # One for each compression that the span was made by, and 0 for what is not packed.
            numbers, slots_of = torch.unique_consecutive(rt.cells.span_of[span.slots], return_counts=True)
            found = [(int(n), int(slots)) for n, slots in zip(numbers, slots_of, strict=True) if n]
            packed = all(slots == rt.cells.slots_in(n) for n, slots in found) and len(dict(found)) == len(found)
            assert packed, f"I10: packed spans of {span!r} have other slots: {found}"
    slots = torch.cat(whole)
    for layer, votes in enumerate(rt.votes.log_votes):
        assert not bool(votes[slots].any()), f"I10: a slot of one token has other votes in layer {layer}"
    if rt.cells is not None:
        assert not bool(rt.cells.span_of[slots].any()), "I10: a slot of one token is part of a packed span"


def _hold(rt: Runtime, slots: Any, tokens: Any, where: Any) -> None:
    if rt.slot_tokens is not None:
        assert rt.slot_tokens.hold(slots.to(torch.int64), tokens), f"I10: a slot of {where!r} holds another token"
