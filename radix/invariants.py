"""What must hold between any two operations of a SpanTree. Walks everything: for tests, not for serving."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

from .children import WORD
from .span import Span
from .tops import Tops
from .tree import SpanTree

SlotsOf = Callable[[Any], Iterable[int]]


def check_tree(tree: SpanTree, slots_of: SlotsOf | None = None) -> None:
    """Raises AssertionError, its message starting with the invariant's name. Changes nothing.

    slots_of: turns what a span's `slots` holds into its slot ids (for a tensor: `lambda t: t.tolist()`);
    without it I3 is skipped.
    """
    i1_slots_counted_once(tree)
    i2_locks_cover_the_chain(tree)
    if slots_of is not None:
        i3_no_slot_twice(tree, slots_of)
    i4_no_dangling(tree)
    i5_path_sums(tree)
    i6_evictable_is_queued(tree)
    i7_found_by_its_path(tree)


def _require(condition: bool, message: str, span: Span | None = None) -> None:
    if not condition:
        raise AssertionError(message if span is None else f"{message}: {span!r}")


def i1_slots_counted_once(tree: SpanTree) -> None:
    """I1: each live span's m is in exactly one counter: protected_slots if locked, evictable_slots if not."""
    free = sum(span.m for span in tree.spans() if not span.lock_ref)
    held = sum(span.m for span in tree.spans() if span.lock_ref)
    _require(tree.evictable_slots == free, f"I1: {tree.evictable_slots} evictable_slots, spans hold {free}")
    used = sum(span.last_access for span in tree.spans())
    _require(tree._access_sum == used, f"I1: {tree._access_sum} as the sum of last_access, spans have {used}")
    _require(tree.protected_slots == held, f"I1: {tree.protected_slots} protected_slots, spans hold {held}")


def i2_locks_cover_the_chain(tree: SpanTree) -> None:
    """I2: a lock holds the whole chain: lock_ref is never negative, nor below the sum over the children."""
    for span in tree.spans():
        below = sum(child.lock_ref for child in span.children or ())
        _require(span.lock_ref >= below >= 0, f"I2: the children are locked {below} times", span)


def i3_no_slot_twice(tree: SpanTree, slots_of: SlotsOf) -> None:
    """I3: a slot belongs to one live span, once, and a span has m slots: who removes it may free them."""
    owner: dict[int, Span] = {}
    for span in tree.spans():
        ids = list(slots_of(span.slots))
        _require(len(ids) == span.m, f"I3: {len(ids)} slots for m={span.m}", span)
        for slot in ids:
            _require(slot not in owner, f"I3: slot {slot} is also in {owner.get(slot)!r}", span)
            owner[slot] = span


def i4_no_dangling(tree: SpanTree) -> None:
    """I4: what is listed below anchors and spans is the live spans, each once, below its own parent."""
    reached: dict[int, Span] = {}
    for anchor, namespaces in tree._tops._indexes.items():
        _require(bool(namespaces), f"I4: anchor {anchor!r} is kept without spans")
        for namespace, tops in namespaces.items():
            _require(len(tops) > 0, f"I4: anchor {anchor!r} keeps namespace {namespace!r} without spans")
            for top in tops:
                _require(top.parent is None and top.anchor == anchor, f"I4: listed below {anchor!r}", top)
                _require(top.namespace == namespace, f"I4: listed below {namespace!r}", top)
            stack = list(tops)
            while stack:
                span = stack.pop()
                _require(not span.dead, "I4: a dead span is listed", span)
                _require(span.serial not in reached, "I4: listed twice", span)
                reached[span.serial] = span
                children = list(span.children or ())
                _require(len(children) == len(span.children or ()), "I4: wrong number of children", span)
                for child in children:
                    _require(child.parent is span, "I4: listed below a stranger", child)
                stack.extend(children)
    _require(reached == tree._live, f"I4: {len(reached)} spans are listed, {len(tree._live)} are live")
    _require(tree._tops._indexes.keys() == tree._tops._lengths.keys(), "I4: lengths are kept of other anchors")
    fresh = Tops(tree._group_of)
    for span in tree.spans():
        if span.parent is None:
            fresh.add(span)
    _require(tree._tops.listed() == fresh.listed(), "I4: other namespaces are listed by what spans begin with")


def i5_path_sums(tree: SpanTree) -> None:
    """I5: path_tokens and path_slots are P plus the chain's sums of n and m; 1 <= m <= n, m == n if raw."""
    for span in tree.spans():
        chain = list(span.chain())
        _require(span.n == len(span.tokens) and 1 <= span.m <= span.n, "I5: n or m is wrong", span)
        _require(not span.raw or span.m == span.n, "I5: a raw span keeps every token", span)
        _require(span.path_tokens == span.anchor_len + sum(link.n for link in chain), "I5: path_tokens", span)
        _require(span.path_slots == span.anchor_len + sum(link.m for link in chain), "I5: path_slots", span)
        _require(all(link.reach >= span.path_tokens for link in chain), "I5: reaches further", span)
        inside = span.borders == sorted(set(span.borders)) and all(0 < at < span.n for at in span.borders)
        _require(inside and (span.raw or not span.borders), f"I5: borders {span.borders}", span)
        for link in chain:
            _require(_place(link) == _place(span), f"I5: another anchor or namespace at {link!r}", span)


def _place(span: Span) -> tuple[object, int, object]:
    return span.anchor, span.anchor_len, span.namespace


def i6_evictable_is_queued(tree: SpanTree) -> None:
    """I6: an unlocked childless span has a heap entry that counts, with a key not above its own.

    So oldest() can always give back every unlocked slot, and in most orders a touch needs no heap operation.
    """
    counting: set[int] = set()
    heap = tree._heap.entries
    for index, (key, serial, span) in enumerate(heap):
        _require(serial == span.serial, "I6: queued under another number", span)
        _require(not index or heap[(index - 1) // 2][:2] <= (key, serial), "I6: no heap any more", span)
        if key == span.queued:
            counting.add(serial)
    _require(len(counting) == tree._heap._counting, f"I6: {tree._heap._counting} entries count")
    for span in tree.spans():
        _require((span.queued is not None) == (span.serial in counting), "I6: has no entry with its key", span)
        _require(0 <= span.created <= span.last_access <= tree._clock, "I6: used before its time", span)
        if span.evictable:
            _require(span.queued is not None, "I6: evictable but not queued", span)
            _require(span.queued <= tree.key(span), "I6: queued too late", span)


def i7_found_by_its_path(tree: SpanTree) -> None:
    """I7: matching what a live span's path has seen finds it or what follows it; its parent's index finds itself."""
    for span in tree.spans():
        siblings = tree._siblings(span)
        indexed = siblings is not None and siblings.exact(span.data) is span
        _require(indexed, "I7: not in the index", span)
        for at in span.borders:
            part = span.data[: at * WORD]
            indexed = siblings is not None and siblings.joined(part) is span and siblings.exact(part) is None
            _require(indexed, f"I7: border {at} not in the index", span)
        tokens = array("q", bytes(8 * span.anchor_len))  # the anchor's own tokens are not compared
        for link in span.path():
            start = link.path_tokens - link.n
            seen = link.seen
            known = tokens[start : start + len(seen)]
            _require(known == seen[: len(known)], f"I7: {link!r} does not follow what was seen above it", span)
            tokens.extend(seen[len(known) :])
        found, border = tree.find([(span.anchor, span.anchor_len)], span.namespace, tokens)
        assert found is not None, f"I7: not found by its path: {span!r}"
        reach = found.path_tokens - found.n + border if border else found.path_tokens
        _require(reach >= span.path_tokens, f"I7: found {found!r} instead", span)
        for link in found.chain():
            start, seen = link.path_tokens - link.n, link.seen
            seen = link.tokens[:border] if border and link is found else seen
            _require(tokens[start : start + len(seen)] == seen, f"I7: {found!r} has other tokens", span)


def check_slots(total: int, owners: dict[str, Iterable[int]]) -> None:
    """I9: every slot 1..total has exactly one owner. owners: name -> the slot ids it holds, the free list included."""
    owner: dict[int, str] = {}
    for name, slots in owners.items():
        for slot in slots:
            _require(1 <= slot <= total, f"I9: {name} holds slot {slot} of 1..{total}")
            _require(slot not in owner, f"I9: slot {slot} belongs to {name} and to {owner.get(slot)}")
            owner[slot] = name
    _require(len(owner) == total, f"I9: {total - len(owner)} of {total} slots have no owner")
