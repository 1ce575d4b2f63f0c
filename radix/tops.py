"""The spans directly below the anchors: by anchor and namespace, and which namespaces a key can match in at all."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence

from .children import HEAD_TOKENS, WORD, ChildIndex
from .span import Span

Anchor = Hashable
GroupOf = Callable[[Hashable], Hashable]


class Heads:
    """What top spans of any namespace begin with -> these namespaces, each with the number of such spans.

    A span, or a joined one's part up to a border, is listed by all its tokens if it has up to HEAD_TOKENS, else by its
    first HEAD_TOKENS. So a key asks once per distinct short length, and once more.
    """

    __slots__ = ("lengths",)

    def __init__(self) -> None:
        self.lengths: dict[int, dict[bytes, dict[Hashable, int]]] = {}  # token count -> token bytes -> namespaces

    def __bool__(self) -> bool:
        return bool(self.lengths)

    def count(self, span: Span, change: int) -> None:
        """Lists a span (change 1) or what it was listed as (change -1)."""
        for at in (*span.borders, len(span.data) // WORD):
            n = min(at, HEAD_TOKENS)
            head = span.data[: n * WORD]
            heads = self.lengths.setdefault(n, {})
            namespaces = heads.setdefault(head, {})
            if change > 0:
                namespaces[span.namespace] = namespaces.pop(span.namespace, 0) + change  # the last one now
                continue
            namespaces[span.namespace] += change
            if not namespaces[span.namespace]:
                del namespaces[span.namespace]
                if not namespaces:
                    del heads[head]
                    if not heads:
                        del self.lengths[n]

    def of(self, tokens: array[int], start: int, end: int) -> Iterator[Hashable]:
        """Namespaces with a span that may begin tokens[start:end], the last listed first; one may come twice."""
        for n, heads in self.lengths.items():
            if start + n <= end:
                yield from reversed(heads.get(tokens[start : start + n].tobytes(), _NONE))


_NONE: dict[Hashable, int] = {}


class Tops:
    """anchor -> namespace -> its top spans. An anchor without spans is forgotten.

    group_of: what namespaces that may serve the same request have in common.
    """

    def __init__(self, group_of: GroupOf) -> None:
        self._group_of = group_of
        self._indexes: dict[Anchor | None, dict[Hashable, ChildIndex[Span]]] = {}
        self._lengths: dict[Anchor | None, int] = {}
        self._heads: dict[tuple[Anchor | None, Hashable], Heads] = {}

    def __contains__(self, anchor: Anchor | None) -> bool:
        return anchor in self._indexes

    def length(self, anchor: Anchor | None) -> int | None:
        """Tokens of an anchor that has spans, else None."""
        return self._lengths.get(anchor)

    def below(self, anchor: Anchor | None) -> dict[Hashable, ChildIndex[Span]]:
        """namespace -> top spans of this anchor; to be read only."""
        return self._indexes.get(anchor, {})

    def add(self, span: Span) -> None:
        """Lists a span without a parent below its anchor."""
        namespaces = self._indexes.setdefault(span.anchor, {})
        self._lengths[span.anchor] = span.anchor_len
        if (index := namespaces.get(span.namespace)) is None:
            index = namespaces[span.namespace] = ChildIndex()
        index.add(span)
        group = span.anchor, self._group_of(span.namespace)
        if (heads := self._heads.get(group)) is None:
            heads = self._heads[group] = Heads()
        heads.count(span, 1)

    def discard(self, span: Span) -> None:
        """Undoes add(); what the span has seen, and its borders, are those it was added with."""
        group = span.anchor, self._group_of(span.namespace)
        self._heads[group].count(span, -1)
        if not self._heads[group]:
            del self._heads[group]
        namespaces = self._indexes[span.anchor]
        namespaces[span.namespace].discard(span)
        if not namespaces[span.namespace]:
            del namespaces[span.namespace]
            if not namespaces:
                del self._indexes[span.anchor], self._lengths[span.anchor]

    def listed(self) -> dict[Hashable, dict[int, dict[bytes, dict[Hashable, int]]]]:
        """What namespaces() looks at: (anchor, group) -> token count -> token bytes -> namespace -> spans."""
        return {group: heads.lengths for group, heads in self._heads.items()}

    def namespaces(
        self, anchors: Sequence[tuple[Anchor | None, int]], group: Hashable, tokens: array[int], end: int
    ) -> Iterator[Hashable]:
        """Namespaces of the group in which tokens[:end] may match below these anchors, each once.

        Those of longer anchors come first, and of one anchor those that were listed last. A lookup per anchor and
        distinct short length.
        """
        seen = set()
        for anchor, anchor_len in reversed(anchors):
            heads = self._heads.get((anchor, group))
            for namespace in heads.of(tokens, anchor_len, end) if heads is not None else ():
                if namespace not in seen:
                    seen.add(namespace)
                    yield namespace
