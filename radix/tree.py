"""SpanTree: the compressed half of the prefix cache, in plain Python.

SGLang's own tree keeps the uncompressed prefixes; this one keeps what hangs below them: chains of atomic
spans. It knows tokens, counts, locks and ages. Slots are opaque to it: it never allocates, reads or frees
one, it only says which span goes; whoever removes a span frees its slots. No sglang, no torch, no threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from .order import EvictionHeap, Usage, order_of
from .search import longest
from .span import ChildIndex, Span, as_tokens, children_first

Anchor = Hashable


class SpanTree:
    """Spans by (anchor, namespace), then by chain. Counts are in KV slots owned by spans, never the anchors'.

    policy            SGLang's --radix-eviction-policy: lru, lfu, fifo, slru, mru or filo. priority and tlru have no
                      meaning for spans and become lru; ValueError on any other name
    key               the policy's key of a span, or of a `Usage` for what the adapter compares with one: the
                      smaller one goes first
    evictable_slots   sum of m over spans with lock_ref == 0
    protected_slots   sum of m over spans with lock_ref > 0
    """

    def __init__(self, policy: str = "lru") -> None:
        self.key = order_of(policy)
        self._clock = 0
        self._serial = 0
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.evictable_slots = 0
        self.protected_slots = 0
        self._live: dict[int, Span] = {}  # by serial
        self._access_sum = 0  # of last_access
        self._tops: dict[Anchor | None, dict[Hashable, ChildIndex]] = {}  # anchor -> namespace -> top spans
        self._anchor_lens: dict[Anchor | None, int] = {}
        self._heap = EvictionHeap(self.key)

    def __len__(self) -> int:
        return len(self._live)

    def spans(self) -> Iterator[Span]:
        """Every live span, the first inserted first (a span made by split() counts as new)."""
        return iter(self._live.values())

    def has_anchor(self, anchor: Anchor | None) -> bool:
        """Whether any live span hangs below this anchor."""
        return anchor in self._tops

    # -- time -------------------------------------------------------------------------------------

    def tick(self) -> int:
        """Advances the logical clock and returns it. The adapter stamps SGLang's nodes with it too."""
        self._clock += 1
        return self._clock

    @property
    def now(self) -> int:
        """The clock: the time of the latest use of anything."""
        return self._clock

    @property
    def mean_age(self) -> float:
        """Mean over the spans of the time since their last use, in ticks; 0 without spans. O(1)."""
        return self._clock - self._access_sum / len(self._live) if self._live else 0.0

    def inherit(self, span: Span, usage: Usage) -> None:
        """The span stands for something older: a node of SGLang's tree that was merged into it."""
        self._access_sum += usage.last_access - span.last_access
        span.created, span.last_access, span.hits = usage.created, usage.last_access, usage.hits
        self._heap.add(span)

    def touch(self, span: Span, hit: bool = False) -> None:
        """Marks the whole chain as used now, and counts one hit on every span of it if asked. O(chain)."""
        now = self.tick()
        later = 0
        for link in span.chain():
            later += now - link.last_access
            link.last_access = now
            link.hits += hit
        self._access_sum += later
        self._heap.add(span)  # the others have a child

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

        Cost: O(length looked at + distinct lengths of the children that begin like the key). Spans are
        atomic, so a shorter child may lead to the longer chain: every matching span is followed, each is
        visited once. Only the winner is compared token by token.
        """
        tokens = as_tokens(tokens)
        end = len(tokens) if limit is None else min(limit, len(tokens))
        starts: list[tuple[int, ChildIndex]] = []
        for anchor, anchor_len in anchors:
            tops = self._tops.get(anchor, {}).get(namespace)
            if tops is not None:
                assert self._anchor_lens[anchor] == anchor_len, f"anchor {anchor!r} changed its length"
                starts.append((anchor_len, tops))
        best = longest(starts, tokens, end, trust=True)
        if best is not None and not best.follows(tokens):  # two of the chain's hashes collided
            best = longest(starts, tokens, end, trust=False)
        if best is not None and touch:
            self.touch(best, hit=True)
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
        lookahead: Sequence[int] = (),
    ) -> tuple[Span, bool]:
        """Adds n = len(tokens) tokens held in m slots below `parent`, or below the anchor if parent is None.

        lookahead: the tokens right behind them whose queries had a say in what the m slots hold. They are part of the
        key: only a prompt that goes on with them may see the span. tokens and lookahead are copied.

        Returns (span, True), or (the live child with the same key, False): then nothing was added and the slots
        stay the caller's. Either way the chain is marked as used; a new span is unlocked. Same tokens, those of the
        lookahead included, means same key: n, m and raw are not compared, the first one stays. ValueError on a span
        that cannot be: no tokens, m outside 1..n, raw with m != n or a lookahead, a dead parent, a place other than
        the parent's. Own tokens plus the chain's length.

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
        if self._anchor_lens.get(anchor, anchor_len) != anchor_len:
            raise ValueError(f"anchor {anchor!r} is {self._anchor_lens[anchor]} tokens long, not {anchor_len}")
        if parent is not None:
            if parent.dead:
                raise ValueError(f"the parent is dead: {parent!r}")
            if (parent.anchor, parent.anchor_len, parent.namespace) != (anchor, anchor_len, namespace):
                raise ValueError(f"anchor and namespace must be the parent's: {parent!r}, {anchor!r}")
            known = min(parent.lookahead, len(own))
            if own[:known] != parent.seen[parent.n : parent.n + known]:
                raise ValueError(f"the tokens are not those that the parent was chosen for: {parent!r}")

        siblings = parent.children if parent is not None else self._tops.get(anchor, {}).get(namespace)
        if siblings is None:
            siblings = ChildIndex()
            if parent is not None:
                parent.children = siblings
            else:
                self._tops.setdefault(anchor, {})[namespace] = siblings
                self._anchor_lens[anchor] = anchor_len
        elif (existing := siblings.exact(own + behind)) is not None:
            existing.hits += 1
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
        siblings.add(span)
        self._live[span.serial] = span
        self.evictable_slots += m
        span.created = self._clock + 1
        self.touch(span)
        return span, True

    # -- changing ---------------------------------------------------------------------------------

    def replace(self, span: Span, slots: Any, m: int) -> Any:
        """Merges an unlocked span further: its n tokens are now in these m < span.m slots, and it is not raw.

        Its children stay, and so do its age and hits. Returns the old `slots` for the caller to free; the new
        ones are the tree's. What was matched before and not locked is outdated: path_slots of the span and of
        all below it have shrunk. O(subtree). ValueError on m outside 1..span.m - 1.
        """
        assert not span.dead, f"replace of a dead span: {span!r}"
        assert span.lock_ref == 0, f"replaced while locked: {span!r}"  # so all below it are unlocked too
        if not 1 <= m < span.m:
            raise ValueError(f"a merge leaves 1 to {span.m - 1} slots, not {m}: {span!r}")
        old, span.slots = span.slots, slots
        less = span.m - m
        span.m, span.raw = m, False
        self.evictable_slots -= less
        for link in children_first([span]):
            link.path_slots -= less
        return old

    def split(self, span: Span, at: int, upper_slots: Any, lower_slots: Any) -> tuple[Span, Span] | None:
        """Cuts an unlocked raw span of n tokens after `at` of them; returns (upper, lower).

        As in SGLang, lower is `span` itself with its children, and upper a new raw span above it, of the same
        age and hits, `meta` None. The caller gives each its part of the slots. A match finds what it found
        before, and now the first `at` tokens alone too. Returns None, nothing changed, if upper has a twin: a
        sibling with exactly its tokens. O(n). ValueError on a span that is not raw and `at` outside 1..n - 1.
        """
        assert not span.dead, f"split of a dead span: {span!r}"
        assert span.lock_ref == 0, f"split while locked: {span!r}"
        if not span.raw or not 0 < at < span.n:
            raise ValueError(f"only a raw span can be split, and inside: at {at}, {span!r}")
        siblings = self._siblings(span)
        first, rest = span.tokens[:at], span.tokens[at:]
        if siblings.exact(first) is not None:
            return None
        siblings.discard(span)
        self._serial += 1
        upper = Span(
            parent=span.parent,
            anchor=span.anchor,
            anchor_len=span.anchor_len,
            namespace=span.namespace,
            tokens=first,
            slots=upper_slots,
            m=at,
            raw=True,
            meta=None,
            serial=self._serial,
        )
        upper.created, upper.last_access, upper.hits = span.created, span.last_access, span.hits
        self._access_sum += span.last_access
        span.parent, span.slots = upper, lower_slots
        span.tokens = span.seen = rest
        span.n = span.m = len(rest)
        siblings.add(upper)
        upper.children = ChildIndex()
        upper.children.add(span)
        self._live[upper.serial] = upper
        return upper, span

    def adopt(self, anchor: Anchor | None, namespace: Hashable, span: Span) -> list[Span]:
        """The spans directly below the anchor become children of `span`, which stands for the same tokens.

        For an anchor that was merged into a span: what hung below it survives. The caller vouches that the
        anchor's content is the span's path. All moved spans must be unlocked; span may be locked. Afterwards
        nothing of this namespace hangs below the anchor. Where span already has a child with the same tokens,
        that one stays: the other's subtree is removed. Returns all that was removed, children first, for the
        caller to free their slots. O(spans below the anchor + their tops' tokens). ValueError if span is of
        another namespace or its path_tokens are not the anchor's length.
        """
        assert not span.dead, f"adopted by a dead span: {span!r}"
        if anchor not in self._tops or namespace not in self._tops[anchor]:
            return []
        if span.namespace != namespace or span.path_tokens != self._anchor_lens[anchor]:
            raise ValueError(f"anchor {anchor!r}+{self._anchor_lens[anchor]} in {namespace!r} is not {span!r}")
        tops = list(self._tops[anchor][namespace])
        for top in tops:  # all or nothing; a lock would go up, so all below them are unlocked too
            assert top.lock_ref == 0, f"adopted while locked: {top!r}"
        if span.children is None:
            span.children = ChildIndex()
        twins = [top for top in tops if span.children.exact(top.seen) is not None]
        removed = self._remove_all(children_first(twins))
        less = span.path_tokens - span.path_slots
        for top in tops:
            if top.dead:
                continue
            self._unlist(top)
            top.parent = span
            span.children.add(top)
            for link in children_first([top]):
                link.anchor, link.anchor_len = span.anchor, span.anchor_len
                link.path_slots -= less
        return removed

    def _siblings(self, span: Span) -> ChildIndex:
        """The index that lists a live span."""
        if span.parent is None:
            return self._tops[span.anchor][span.namespace]
        assert span.parent.children is not None
        return span.parent.children

    def _unlist(self, span: Span) -> None:
        """Takes a span out of the index that lists it; an anchor without spans is forgotten."""
        siblings = self._siblings(span)
        siblings.discard(span)
        if span.parent is None and not siblings:
            namespaces = self._tops[span.anchor]
            del namespaces[span.namespace]
            if not namespaces:
                del self._tops[span.anchor], self._anchor_lens[span.anchor]

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
                self._heap.add(link)

    # -- shrinking --------------------------------------------------------------------------------

    def oldest(self) -> Span | None:
        """The next to go: the unlocked childless span with the smallest key. A peek, O(log n) amortised."""
        return self._heap.first()

    def remove(self, span: Span) -> None:
        """Takes an unlocked childless span out of the tree; its slots are the caller's to free."""
        assert not span.dead, f"removed twice: {span!r}"
        assert span.lock_ref == 0, f"removed while locked: {span!r}"
        assert not span.children, f"removed before its children: {span!r}"
        self._unlist(span)
        del self._live[span.serial]
        self._access_sum -= span.last_access
        self.evictable_slots -= span.m
        span.dead = True
        self._heap.discard(span)
        if span.parent is not None:
            self._heap.add(span.parent)

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
            span.dead, span.lock_ref, span.queued = True, 0, None
        self._forget_everything()

    def _remove_all(self, spans: list[Span]) -> list[Span]:
        for span in spans:  # all or nothing
            assert span.lock_ref == 0, f"dropped while locked: {span!r}"
        for span in spans:
            self.remove(span)
        return spans
