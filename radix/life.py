"""Which spans live, how old they are, who holds them, and which goes next: the base of SpanTree."""

from __future__ import annotations

from collections.abc import Iterator

from .children import ChildIndex
from .order import EvictionHeap, Usage, order_of
from .span import Span, children_first
from .tops import Anchor, GroupOf, Tops


class SpanLife:
    """Every live span is listed below its parent or anchor, and counted once.

    key               the policy's key of a span, or of a `Usage` for what the adapter compares with one: the
                      smaller one goes first
    evictable_slots   sum of m over spans with lock_ref == 0
    protected_slots   sum of m over spans with lock_ref > 0
    """

    def __init__(self, policy: str, group_of: GroupOf) -> None:
        self.key = order_of(policy)
        self._group_of = group_of
        self._clock = 0
        self._serial = 0
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.evictable_slots = 0
        self.protected_slots = 0
        self._live: dict[int, Span] = {}  # by serial
        self._access_sum = 0  # of last_access
        self._tops = Tops(self._group_of)
        self._heap = EvictionHeap(self.key)

    def __len__(self) -> int:
        return len(self._live)

    def spans(self) -> Iterator[Span]:
        """Every live span, the first inserted first (a span made by split() counts as new)."""
        return iter(self._live.values())

    def has_anchor(self, anchor: Anchor | None) -> bool:
        """Whether any live span hangs below this anchor."""
        return anchor in self._tops

    # -- lists ------------------------------------------------------------------------------------

    def _siblings(self, span: Span) -> ChildIndex[Span] | None:
        """The index that lists a span, or will."""
        if span.parent is None:
            return self._tops.below(span.anchor).get(span.namespace)
        return span.parent.children

    def _list(self, span: Span) -> None:
        """Puts a span into the index below its parent or anchor."""
        if span.parent is None:
            self._tops.add(span)
            return
        if span.parent.children is None:
            span.parent.children = ChildIndex()
        span.parent.children.add(span)
        link: Span | None = span.parent
        while link is not None and link.reach < span.reach:  # none above a span reaches less than it
            link.reach = span.reach
            link = link.parent

    def _unlist(self, span: Span) -> None:
        """Takes a span out of the index that lists it, before anything of its key changes."""
        if span.parent is None:
            self._tops.discard(span)
            return
        assert span.parent.children is not None
        span.parent.children.discard(span)
        if not span.parent.children:
            span.parent.reach = span.parent.path_tokens

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
        before = count = 0
        link: Span | None = span
        while link is not None:
            before += link.last_access
            count += 1
            link.last_access = now
            if hit:
                link.hits += 1
            link = link.parent
        self._access_sum += now * count - before
        self._heap.add(span)  # the others have a child

    # -- locks ------------------------------------------------------------------------------------

    def lock(self, span: Span) -> None:
        """A request starts to use the chain: +1 on every span of it. O(chain)."""
        assert not span.dead, f"lock of a dead span: {span!r}"
        taken = 0
        link: Span | None = span
        while link is not None:
            if not link.lock_ref:
                taken += link.m
            link.lock_ref += 1
            link = link.parent
        self.evictable_slots -= taken
        self.protected_slots += taken

    def unlock(self, span: Span) -> None:
        """Undoes one lock() of the same span. Spans that become free may be evicted again. O(chain)."""
        assert not span.dead, f"unlock of a dead span: {span!r}"
        # Counts never grow downwards, so the span itself having one means that all above it have one.
        assert span.lock_ref > 0, f"unlock without lock: {span!r}"
        given = 0
        link: Span | None = span
        while link is not None:
            link.lock_ref -= 1
            if not link.lock_ref:
                given += link.m
            link = link.parent
        self.protected_slots -= given
        self.evictable_slots += given
        self._heap.add(span)  # the others have a child

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
        return self._remove_all(children_first(top for tops in self._tops.below(anchor).values() for top in tops))

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
