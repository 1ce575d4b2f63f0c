"""Thousands of idle tenants and configurations: what a request or a waiting one costs does not depend on them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.radix_cache import RadixKey

from keepkv_sglang.radix.adapter.covered import MOST_NAMESPACES
from keepkv_sglang.radix.adapter.publish import insert_span
from keepkv_sglang.radix.tree import SpanTree
from keepkv_sglang.tools.simulate.traces import BORDER
from tests.support.served import OFF, SYSTEM, Server, serving, text
from tests.support.spans import NO_ANCHOR, add

IDLE = 400


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(slots=3000) as server:
        yield server


@pytest.fixture
def matched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Namespaces that the tree is searched in, in order."""
    namespaces: list[Any] = []
    match = SpanTree.match

    def counted(self: SpanTree, anchors: Any, namespace: Any, *args: Any, **kwargs: Any) -> Any:
        namespaces.append(namespace)
        return match(self, anchors, namespace, *args, **kwargs)

    monkeypatch.setattr(SpanTree, "match", counted)
    return namespaces


def idle(server: Server, prompt: list[int], kind: str, start: int = 0) -> None:
    """Spans of other tenants, or of other configurations of the same one, that begin like a prompt or not."""
    for n in range(start, start + IDLE):
        namespace = (None, f"salt {n}", None, "s") if kind == "salts" else (None, None, None, f"setting {n}")
        slots = server.world.allocator.alloc(1)
        tokens = array("q", prompt if kind == "same text" else [*prompt[:1], 5000 + n, *prompt[2:]])
        insert_span(server.tree, None, None, 0, namespace, tokens, len(tokens), slots.to(torch.int64), raw=False)


@pytest.mark.parametrize("kind", ["salts", "settings", "same text"])
def test_idle_namespaces_cost_nothing(server, matched, kind, monkeypatch):
    monkeypatch.setattr(server.tree, "check", lambda: None)  # it looks for every span
    prompt = text(1000, 60)
    server.run(prompt)
    idle(server, prompt, kind)
    matched.clear()
    server.run(prompt, kind=OFF)
    most = MOST_NAMESPACES if kind == "same text" else 1
    assert len(matched) <= 2 * most, "it is computed twice: its prompt, and its reply"
    matched.clear()
    server.tree.touch_prefix(RadixKey(array("q", prompt), None))
    assert 1 <= len(matched) <= most


def test_a_waiting_request_keeps_what_its_tenant_cached_in_any_configuration(server):
    prompt = [*SYSTEM, *text(200, 60), BORDER, 5]
    server.run(prompt)
    server.run(prompt, kind={"budget": 0.5})
    idle(server, prompt, "salts")
    server.run([*SYSTEM, *text(700, 60), BORDER, 5])
    before = server.tree.spans.now
    server.tree.touch_prefix(RadixKey(array("q", prompt), None))
    young = [span for span in server.tree.spans.spans() if span.last_access > before]
    assert {span.namespace[-1] for span in young if not span.raw} >= {
        span.namespace[-1] for span in server.tree.spans.spans() if span.namespace[:2] == (None, None)
    }
    assert all(span.namespace[:2] == (None, None) for span in young)
    assert {span.hits for span in young} == {1}, "it has not been admitted"


def test_a_copy_of_a_span_is_known_among_many_configurations(server):
    prompt = text(1000, 100)
    idle(server, prompt, "settings")
    server.run(prompt)
    idle(server, [*text(3000, 60)], "same text", start=IDLE)
    server.run(prompt, kind=OFF)
    uncompressed = server.tree.tree_core.total_size()[0]
    server.tree.evict_slots(80)
    assert server.tree.tree_core.total_size()[0] < uncompressed - 70
    assert server.cached(prompt) == len(prompt) - 1


def test_which_namespaces_a_key_may_match_in() -> None:
    tree = SpanTree(group_of=lambda namespace: str(namespace)[0])
    add(tree, range(40), namespace="a1")
    add(tree, range(50), namespace="a2")
    add(tree, [0, 1, 2], namespace="a3")
    add(tree, [0, 1, 2, 9], namespace="a4")
    add(tree, range(40), namespace="b1")
    add(tree, [10, 11], namespace="a5", anchor=("x", 10))
    joined = add(tree, [0], namespace="a6", raw=True)
    assert tree.join(joined, [7], [*joined.slots, 10**9])

    def may(tokens: Any, anchors: Any = (NO_ANCHOR,), group: str = "a", limit: int = 99) -> list[Any]:
        return tree.namespaces(anchors, group, tokens, limit)

    assert sorted(may(range(100))) == ["a1", "a2", "a3", "a6"], "a6 by its first token, a2 by its first 32"
    assert may(range(100))[:2] == ["a2", "a1"] and may(range(100), limit=1) == ["a2"], "the last listed first"
    assert may(range(100), (NO_ANCHOR, ("x", 10)))[0] == "a5"
    assert may(range(31)) == ["a3", "a6"] and may([0, 7]) == ["a6"] and may([1]) == []
    assert may(range(100), group="b") == ["b1"] and may(range(100), group="c") == []
    for span in list(tree.spans()):
        tree.remove(span)
    assert may(range(100)) == [] and not tree._tops.listed()
