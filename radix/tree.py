"""SpanTree: the compressed half of the prefix cache, in plain Python.

SGLang's own tree keeps the uncompressed prefixes; this one keeps what hangs below them: chains of atomic
spans. It knows tokens, counts, locks and ages. Slots are opaque to it: it never allocates, reads or frees
one, it only says which span goes; whoever removes a span frees its slots. No sglang, no torch, no threads.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from .span import ChildIndex, KeyHash, Span, as_tokens, children_first

Anchor = Hashable


class SpanTree:
    """Spans by (anchor, namespace), then by chain. Counts are in KV slots owned by spans, never the anchors'.

    evictable_slots   sum of m over spans with lock_ref == 0
    protected_slots   sum of m over spans with lock_ref > 0
    """

    def __init__(self) -> None:
        self._clock = 0
        self._serial = 0
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.evictable_slots = 0
        self.protected_slots = 0
        self._live: dict[int, Span] = {}  # by serial, so in order of creation: parents before children
        self._tops: dict[Anchor | None, dict[Hashable, ChildIndex]] = {}  # anchor -> namespace -> top spans
        self._anchor_lens: dict[Anchor | None, int] = {}
        self._heap: list[tuple[int, int, Span]] = []  # (time, serial, span); the time may lag behind

    def __len__(self) -> int:
        return len(self._live)

    def spans(self) -> Iterator[Span]:
        """Every live span, parents before children."""
        return iter(self._live.values())

    def has_anchor(self, anchor: Anchor | None) -> bool:
        """Whether any live span hangs below this anchor."""
        return anchor in self._tops

    # -- time -------------------------------------------------------------------------------------

    def tick(self) -> int:
        """Advances the logical clock and returns it. The adapter stamps SGLang's nodes with it too."""
        self._clock += 1
        return self._clock

    def touch(self, span: Span) -> None:
        """Marks the whole chain as used now. The heap is not told: oldest() corrects outdated entries."""
        now = self.tick()
        for link in span.chain():
            link.last_access = now

    # -- reading and growing ----------------------------------------------------------------------

    def match(
        self,
        anchors: Iterable[tuple[Anchor | None, int]],
        namespace: Hashable,
        tokens: Sequence[int],
        limit: int | None = None,
        touch: bool = True,
    ) -> Span | None:
        """The span with the longest logical prefix of tokens[:limit] over all chains below these anchors.

        anchors: (anchor, its length P) of the nodes on the prompt's uncompressed path; the caller vouches
        that tokens[:P] is the anchor's content, it is not compared again. (None, 0) stands for no anchor.
        Ties go to the larger P, then to more slots, then to the elder. `touch` marks the winner's chain as
        used.

        Cost: O(length looked at + distinct lengths of the children that begin like the key). Spans are
        atomic, so a shorter child may lead to the longer chain: every matching span is followed, each is
        visited once.
        """
        tokens = as_tokens(tokens)
        end = len(tokens) if limit is None else min(limit, len(tokens))
        stack: list[tuple[int, ChildIndex]] = []
        for anchor, anchor_len in anchors:
            tops = self._tops.get(anchor, {}).get(namespace)
            if tops is not None:
                assert self._anchor_lens[anchor] == anchor_len, f"anchor {anchor!r} changed its length"
                stack.append((anchor_len, tops))
        best: Span | None = None
        key = KeyHash(tokens)
        while stack:
            start, index = stack.pop()
            for span in index.matching(tokens, key, start, end):
                if best is None or span.path_tokens > best.path_tokens or _rank(span) > _rank(best):
                    best = span
                if span.children:
                    stack.append((span.path_tokens, span.children))
        if best is not None and touch:
            self.touch(best)
        return best

    def insert(
        self,
        *,
        parent: Span | None,
        anchor: Anchor | None,
        anchor_len: int,
        namespace: Hashable,
        tokens: Sequence[int],
        slots: Any,
        m: int,
        raw: bool = False,
        meta: Any = None,
    ) -> tuple[Span, bool]:
        """Adds n = len(tokens) tokens held in m slots below `parent`, or below the anchor if parent is None.

        tokens are copied. Returns (span, True), or (the live child with the same tokens, False): then nothing
        was added and the slots stay the caller's. Either way the chain is marked as used; a new span is
        unlocked. Same tokens means same key: m and raw are not compared, the first one stays. ValueError on
        a span that cannot be: no tokens, m outside 1..n, raw with m != n, a dead parent, a place other than
        the parent's.
        """
        own = array("q", tokens)
        if not own or not 1 <= m <= len(own) or (raw and m != len(own)):
            raise ValueError(f"a span needs 1 <= m <= n tokens, and m == n if raw: n={len(own)}, m={m}, raw={raw}")
        if (anchor is None) != (anchor_len == 0) or anchor_len < 0:
            raise ValueError(f"anchor None means length 0 and nothing else does: {anchor!r}, {anchor_len}")
        if self._anchor_lens.get(anchor, anchor_len) != anchor_len:
            raise ValueError(f"anchor {anchor!r} is {self._anchor_lens[anchor]} tokens long, not {anchor_len}")
        if parent is not None:
            if parent.dead:
                raise ValueError(f"the parent is dead: {parent!r}")
            if (parent.anchor, parent.anchor_len, parent.namespace) != (anchor, anchor_len, namespace):
                raise ValueError(f"anchor and namespace must be the parent's: {parent!r}, {anchor!r}")

        key = KeyHash(own)
        siblings = parent.children if parent is not None else self._tops.get(anchor, {}).get(namespace)
        if siblings is None:
            siblings = ChildIndex()
            if parent is not None:
                parent.children = siblings
            else:
                self._tops.setdefault(anchor, {})[namespace] = siblings
                self._anchor_lens[anchor] = anchor_len
        elif (existing := siblings.exact(own, key)) is not None:
            self.touch(existing)
            return existing, False

        self._serial += 1
        span = Span(
            parent=parent,
            anchor=anchor,
            anchor_len=anchor_len,
            namespace=namespace,
            tokens=own,
            slots=slots,
            m=m,
            raw=raw,
            meta=meta,
            serial=self._serial,
        )
        siblings.add(span, key)
        self._live[span.serial] = span
        self.evictable_slots += m
        self.touch(span)
        self._queue(span)
        return span, True

    # -- locks ------------------------------------------------------------------------------------

    def lock(self, span: Span) -> None:
        """A request starts to use the chain: +1 on every span of it. O(chain)."""
        assert not span.dead, f"lock of a dead span: {span!r}"
        for link in span.chain():
            if link.lock_ref == 0:
                self.evictable_slots -= link.m
                self.protected_slots += link.m
            link.lock_ref += 1

    def unlock(self, span: Span) -> None:
        """Undoes one lock() of the same span. Spans that become free may be evicted again. O(chain)."""
        assert not span.dead, f"unlock of a dead span: {span!r}"
        # Counts never grow downwards, so the span itself having one means that all above it have one.
        assert span.lock_ref > 0, f"unlock without lock: {span!r}"
        for link in span.chain():
            link.lock_ref -= 1
            if link.lock_ref == 0:
                self.protected_slots -= link.m
                self.evictable_slots += link.m
                self._queue(link)

    # -- shrinking --------------------------------------------------------------------------------

    def oldest(self) -> Span | None:
        """The unlocked childless span with the smallest last_access; a peek, O(log n) amortised.

        A span has at most one heap entry. Its time is a lower bound, since last_access only grows: an entry
        that lags is pushed down; one whose span is dead, locked or a parent is dropped and comes back by
        _queue.
        """
        heap = self._heap
        while heap:
            time, serial, span = heap[0]
            if not span.evictable:
                heapq.heappop(heap)
                span.queued = False
            elif time != span.last_access:
                heapq.heapreplace(heap, (span.last_access, serial, span))
            else:
                return span
        return None

    def remove(self, span: Span) -> None:
        """Takes an unlocked childless span out of the tree; its slots are the caller's to free."""
        assert not span.dead, f"removed twice: {span!r}"
        assert span.lock_ref == 0, f"removed while locked: {span!r}"
        assert not span.children, f"removed before its children: {span!r}"
        parent = span.parent
        if parent is not None:
            assert parent.children is not None
            parent.children.discard(span)
            self._queue(parent)
        else:
            namespaces = self._tops[span.anchor]
            namespaces[span.namespace].discard(span)
            if not namespaces[span.namespace]:
                del namespaces[span.namespace]
            if not namespaces:
                del self._tops[span.anchor], self._anchor_lens[span.anchor]
        del self._live[span.serial]
        self.evictable_slots -= span.m
        span.dead = True
        if len(self._heap) > 2 * len(self._live) + 64:  # mostly dead spans: let them go
            self._heap = [(s.last_access, s.serial, s) for _, _, s in self._heap if not s.dead]
            heapq.heapify(self._heap)

    def drop_subtree(self, span: Span) -> list[Span]:
        """Removes a span and all below it, all unlocked; returns them, children first."""
        assert not span.dead, f"dropped twice: {span!r}"
        return self._remove_all(children_first([span]))

    def drop_anchor(self, anchor: Anchor | None) -> list[Span]:
        """Removes every span below an anchor, all unlocked; returns them, children first."""
        namespaces = self._tops.get(anchor, {})
        return self._remove_all(children_first(top for tops in namespaces.values() for top in tops))

    def reset(self) -> None:
        """Forgets everything, locked or not; all spans are dead. Clock and serial go on: no stamp repeats."""
        for span in self._live.values():
            span.dead, span.lock_ref, span.queued = True, 0, False
        self._forget_everything()

    def _remove_all(self, spans: list[Span]) -> list[Span]:
        for span in spans:  # all or nothing
            assert span.lock_ref == 0, f"dropped while locked: {span!r}"
        for span in spans:
            self.remove(span)
        return spans

    def _queue(self, span: Span) -> None:
        """Enters a span into the eviction heap if it may be evicted and is not there."""
        if span.evictable and not span.queued:
            span.queued = True
            heapq.heappush(self._heap, (span.last_access, span.serial, span))


def _rank(span: Span) -> tuple[int, int, int, int]:
    """What match() prefers, most important first."""
    return span.path_tokens, span.anchor_len, span.path_slots, -span.serial
