"""What changes a span that is there: the half of SpanTree that merges, joins, cuts and moves spans."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from .children import WORD
from .life import SpanLife
from .span import JOINED_TOKENS, Span, children_first
from .tops import Anchor, GroupOf

OnSplit = Callable[[Span, Span], None]


class SpanChanges(SpanLife):
    """on_split: called with (upper, lower) after the tree has cut a joined span at a border by itself."""

    def __init__(self, policy: str, group_of: GroupOf, on_split: OnSplit) -> None:
        self._on_split = on_split
        super().__init__(policy, group_of)

    def replace(self, span: Span, slots: Any, m: int) -> Any:
        """Merges an unlocked span further: its n tokens are now in these m < span.m slots, and it is not raw.

        Its children stay, and so do its age and hits; the borders of a joined one go. Returns the old `slots` for the
        caller to free; the new ones are the tree's. What was matched before and not locked is outdated: path_slots of
        the span and of all below it have shrunk. O(subtree). ValueError on m outside 1..span.m - 1.
        """
        assert not span.dead, f"replace of a dead span: {span!r}"
        assert span.lock_ref == 0, f"replaced while locked: {span!r}"  # so all below it are unlocked too
        if not 1 <= m < span.m:
            raise ValueError(f"a merge leaves 1 to {span.m - 1} slots, not {m}: {span!r}")
        if span.borders:
            self._unlist(span)
            span.borders = []
            self._list(span)
        old, span.slots = span.slots, slots
        less = span.m - m
        span.m, span.raw = m, False
        self.evictable_slots -= less
        for link in children_first([span]):
            link.path_slots -= less
        return old

    def can_join(self, span: Span, n: int) -> bool:
        """Whether n raw tokens may be appended to the span: it is raw, has no children and at most the caller's lock,
        is not what its parent's compression left raw (inside that one's budget), and stays short."""
        left = span.parent is not None and span.parent.lookahead
        return span.raw and not span.children and span.lock_ref <= 1 and not left and span.n + n <= JOINED_TOKENS

    def join(self, span: Span, tokens: Sequence[int], slots: Any) -> bool:
        """Appends raw tokens to a raw span that ends where they begin, instead of a span of their own below it.

        So turns of a token or two do not grow a chain of thousands of spans. Where the two met is a border of the span:
        a key that goes on otherwise behind it finds the part before it, as it would have found the span alone. The span
        is as old as its youngest part, and keeps its hits. It is evicted, and merged, as a whole.

        slots: of all its tokens, the new ones last. tokens are copied. False, and nothing has changed, where there is a
        span of the same tokens. What was matched before and not locked is outdated. O(chain + borders). AssertionError
        unless `can_join`.
        """
        own = array("q", tokens)
        assert not span.dead and own and self.can_join(span, len(own)), f"joined {len(own)} tokens to {span!r}"
        data = span.data + own.tobytes()
        if self._twin(span, data) is not None:
            return False
        self._unlist(span)
        span.borders.append(span.n)
        span.data, span.slots = data, slots
        span.n = span.m = span.n + len(own)
        span.path_tokens += len(own)
        span.path_slots += len(own)
        span.reach = span.path_tokens
        self._list(span)
        if span.lock_ref:
            self.protected_slots += len(own)
        else:
            self.evictable_slots += len(own)
        span.created = self._clock + 1
        self.touch(span)
        return True

    def split(self, span: Span, at: int, upper_slots: Any, lower_slots: Any) -> tuple[Span, Span] | None:
        """Cuts an unlocked raw span of n tokens after `at` of them; returns (upper, lower).

        As in SGLang, lower is `span` itself with its children, and upper a new raw span above it, of the same
        age and hits, `meta` None; each keeps its borders. The caller gives each its part of the slots. A match finds
        what it found before, and now the first `at` tokens alone too. Returns None, nothing changed, if upper has a
        twin: a sibling with exactly its tokens. O(n). ValueError on a span that is not raw and `at` outside 1..n - 1.
        """
        assert not span.dead, f"split of a dead span: {span!r}"
        assert span.lock_ref == 0, f"split while locked: {span!r}"
        if not span.raw or not 0 < at < span.n:
            raise ValueError(f"only a raw span can be split, and inside: at {at}, {span!r}")
        if self._twin(span, span.data[: at * WORD]) not in (None, span):
            return None
        return self._cut(span, at, upper_slots, lower_slots), span

    def _twin(self, span: Span, data: bytes) -> Span | None:
        """What is listed beside the span, or is itself, and ends or has a border right behind these tokens."""
        siblings = self._siblings(span)
        assert siblings is not None
        return siblings.exact(data) or siblings.joined(data)

    def _part(self, span: Span, at: int) -> Span:
        """The part of a joined span before its border `at`, now a span of its own. The span may be locked: whoever
        holds it holds the part too."""
        upper = self._cut(span, at, span.slots[:at], span.slots[at:])
        self._on_split(upper, span)
        return upper

    def _cut(self, span: Span, at: int, upper_slots: Any, lower_slots: Any) -> Span:
        self._unlist(span)
        self._serial += 1
        upper = Span(
            parent=span.parent,
            anchor=span.anchor,
            anchor_len=span.anchor_len,
            namespace=span.namespace,
            tokens=span.tokens[:at],
            slots=upper_slots,
            m=at,
            raw=True,
            meta=None,
            serial=self._serial,
        )
        upper.created, upper.last_access, upper.hits = span.created, span.last_access, span.hits
        upper.lock_ref, upper.borders = span.lock_ref, [border for border in span.borders if border < at]
        self._access_sum += span.last_access
        span.parent, span.slots = upper, lower_slots
        span.data = span.data[at * WORD :]
        span.n = span.m = span.n - at
        span.borders = [border - at for border in span.borders if border > at]
        self._live[upper.serial] = upper
        self._list(upper)
        self._list(span)
        return upper

    def adopt(self, anchor: Anchor | None, namespace: Hashable, span: Span) -> list[Span]:
        """The spans directly below the anchor become children of `span`, which stands for the same tokens.

        For an anchor that was merged into a span: what hung below it survives. The caller vouches that the
        anchor's content is the span's path. All moved spans must be unlocked; span may be locked. Afterwards
        nothing of this namespace hangs below the anchor. Where span already has a child with the same tokens,
        that one stays: the other's subtree is removed. Returns all that was removed, children first, for the
        caller to free their slots. Joined spans among both are cut at their borders. O(spans below the anchor + their
        tops' tokens). ValueError if span is of another namespace or its path_tokens are not the anchor's length.
        """
        assert not span.dead, f"adopted by a dead span: {span!r}"
        index = self._tops.below(anchor).get(namespace)
        if index is None:
            return []
        length = self._tops.length(anchor)
        if span.namespace != namespace or span.path_tokens != length:
            raise ValueError(f"anchor {anchor!r}+{length} in {namespace!r} is not {span!r}")
        for top in index:  # all or nothing; a lock would go up, so all below them are unlocked too
            assert top.lock_ref == 0, f"adopted while locked: {top!r}"
        for piece in [*index, *(span.children or ())]:
            while piece.borders:
                piece = self._part(piece, piece.borders[-1])
        tops = list(self._tops.below(anchor)[namespace])
        twins = [top for top in tops if span.children and span.children.exact(top.data) is not None]
        removed = self._remove_all(children_first(twins))
        less = span.path_tokens - span.path_slots
        for top in tops:
            if top.dead:
                continue
            self._unlist(top)
            top.parent = span
            for link in children_first([top]):
                link.anchor, link.anchor_len = span.anchor, span.anchor_len
                link.path_slots -= less
            self._list(top)
        return removed
