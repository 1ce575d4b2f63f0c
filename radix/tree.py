"""SpanTree: the compressed half of the prefix cache, in plain Python.

SGLang's own tree keeps the uncompressed prefixes; this one keeps what hangs below them: chains of atomic
spans. It knows tokens, counts, locks and ages. Slots are opaque to it, but that those of a joined span can be sliced:
it never allocates, reads or frees one, it only says which span goes; whoever removes a span frees its slots. No sglang,
no torch, no threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from itertools import islice
from typing import Any

from .changes import OnSplit, SpanChanges
from .children import ChildIndex
from .keyhash import as_tokens
from .search import longest
from .span import Span
from .tops import Anchor, GroupOf


class SpanTree(SpanChanges):
    """Spans by (anchor, namespace), then by chain. Counts are in KV slots owned by spans, never the anchors'.

    policy            SGLang's --radix-eviction-policy: lru, lfu, fifo, slru, mru or filo. priority and tlru have no
                      meaning for spans and become lru; ValueError on any other name
    group_of          what of a namespace a caller of namespaces() knows
    on_split          called with (upper, lower) after a match or an insert has cut a joined span at a border; upper
                      has no `meta` yet
    """

    def __init__(
        self,
        policy: str = "lru",
        group_of: GroupOf = lambda namespace: namespace,
        on_split: OnSplit = lambda upper, lower: None,
    ) -> None:
        super().__init__(policy, group_of, on_split)

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
        used and counts a hit; a caller that asks again for the same request passes False and calls `touch`, or
        a waiting request would count as many.

        A key that ends or goes on otherwise behind a border of a joined span cuts it there: the part before it is
        returned. That moves no slot and takes no lock; see `on_split`.

        Cost: O(length looked at + distinct lengths of the children that begin like the key). Spans are
        atomic, so a shorter child may lead to the longer chain: every matching span that reaches as far as the best
        one so far is followed, each is visited once, and compared token by token.
        """
        best, border = self.find(anchors, namespace, tokens, limit)
        if best is None:
            return None
        if border:
            best = self._part(best, border)
        if touch:
            self.touch(best, hit=True)
        return best

    def find(
        self,
        anchors: Iterable[tuple[Anchor | None, int]],
        namespace: Hashable,
        tokens: Sequence[int],
        limit: int | None = None,
    ) -> tuple[Span | None, int]:
        """What match() would return, and nothing changes: (span, 0), or (joined span, the border where it would be cut,
        in tokens from the span's beginning)."""
        tokens = as_tokens(tokens)
        end = len(tokens) if limit is None else min(limit, len(tokens))
        starts: list[tuple[int, ChildIndex[Span]]] = []
        for anchor, anchor_len in anchors:
            tops = self._tops.below(anchor).get(namespace)
            if tops is not None:
                assert self._tops.length(anchor) == anchor_len, f"anchor {anchor!r} changed its length"
                starts.append((anchor_len, tops))
        return longest(starts, tokens, end)

    def namespaces(
        self, anchors: Sequence[tuple[Anchor | None, int]], group: Hashable, tokens: Sequence[int], limit: int
    ) -> list[Hashable]:
        """Namespaces of a group (see `group_of`) in which tokens[:] may match below these anchors, `limit` at most.

        In no other one does it match. Those in which a span was listed last come first, of the longest anchor that
        has any. O(anchors * distinct lengths of short top spans), however many namespaces there are.
        """
        tokens = as_tokens(tokens)
        return list(islice(self._tops.namespaces(anchors, group, tokens, len(tokens)), limit))

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
        lookahead: Sequence[int] = (),
        reach: int = 0,
    ) -> tuple[Span, bool]:
        """Adds n = len(tokens) tokens held in m slots below `parent`, or below the anchor if parent is None.

        lookahead: the tokens right behind them whose queries had a say in what the m slots hold. They are part of the
        key: only a prompt that goes on with them may see the span. tokens and lookahead are copied.

        Returns (span, True), or (the live child with the same key, False): then nothing was added and the slots
        stay the caller's. Either way the chain is marked as used; a new span is unlocked. Same tokens, those of the
        lookahead included, means same key: n, m and raw are not compared, the first one stays. ValueError on a span
        that cannot be: no tokens, m outside 1..n, raw with m != n or a lookahead, a dead parent, a place other than
        the parent's. Own tokens plus the chain's length.

        reach: of spans that are inserted one below the other, path_tokens of the last. Only the caller's touch() of
        that one marks them as used, so that n of them do not walk the chain n times.

        Hits follow SGLang's hit_count, which counts a request once on each node that it passes over: 1 on a new
        span or on the twin; the chain above is the request's own or was counted by its match.
        """
        own, behind = array("q", tokens), array("q", lookahead)
        if not own or not 1 <= m <= len(own) or (raw and m != len(own)):
            raise ValueError(f"a span needs 1 <= m <= n tokens, and m == n if raw: n={len(own)}, m={m}, raw={raw}")
        if raw and behind:
            raise ValueError(f"nothing chose what a raw span keeps, so it has no lookahead: {len(behind)}")
        if (anchor is None) != (anchor_len == 0) or anchor_len < 0:
            raise ValueError(f"anchor None means length 0 and nothing else does: {anchor!r}, {anchor_len}")
        if (known_len := self._tops.length(anchor)) not in (None, anchor_len):
            raise ValueError(f"anchor {anchor!r} is {known_len} tokens long, not {anchor_len}")
        if parent is not None:
            if parent.dead:
                raise ValueError(f"the parent is dead: {parent!r}")
            if (parent.anchor, parent.anchor_len, parent.namespace) != (anchor, anchor_len, namespace):
                raise ValueError(f"anchor and namespace must be the parent's: {parent!r}, {anchor!r}")
            known = min(parent.lookahead, len(own))
            if own[:known] != parent.seen[parent.n : parent.n + known]:
                raise ValueError(f"the tokens are not those that the parent was chosen for: {parent!r}")

        siblings = parent.children if parent is not None else self._tops.below(anchor).get(namespace)
        if siblings is not None:
            key = (own + behind).tobytes()
            existing = siblings.exact(key)
            if existing is None and (joined := siblings.joined(key)) is not None:
                existing = self._part(joined, len(own) + len(behind))
            if existing is not None:
                existing.hits += 1
                if not reach:
                    self.touch(existing)
                return existing, False

        self._serial += 1
        span = Span(
            parent=parent,
            anchor=anchor,
            anchor_len=anchor_len,
            namespace=namespace,
            tokens=own,
            lookahead=behind,
            slots=slots,
            m=m,
            raw=raw,
            meta=meta,
            serial=self._serial,
        )
        span.reach = max(span.reach, reach)
        self._list(span)
        self._live[span.serial] = span
        self.evictable_slots += m
        span.created = self._clock + 1
        if not reach:
            self.touch(span)
        return span, True
