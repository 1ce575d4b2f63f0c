"""Random requests on the whole cache manager (SGLang's tree, its pools, our tree, schedule and compressor; no model).

Each slot remembers the longest text that its content may know of. A request must never be shown a slot that knows of
anything but the request's own tokens: neither a neighbour's prompt nor what came later in another conversation. And
each token that a request protects must be in a slot of its own, from its first step to its last.
"""

from __future__ import annotations

from array import array
from itertools import count, pairwise
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.sampling.sampling_params import SamplingParams

from keepkv_sglang.compress.select import check_ranges, select
from keepkv_sglang.radix.span import Span
from keepkv_sglang.runtime import due, pressure, stream
from keepkv_sglang.runtime.compressor import Outcome
from keepkv_sglang.settings.config import ConfigError, KeepKVConfig
from keepkv_sglang.tools.simulate.traces import BORDER
from keepkv_sglang.tools.simulate.world import World
from tests.support.machines import case
from tests.support.served import OFF

SIZE = 40, 30, HealthCheck.filter_too_much
SLOTS = 320
# Few messages, so that conversations share beginnings; one is a prefix of another, one longer than a third of the pool.
MESSAGES = [tuple(range(10 * n, 10 * n + length)) for n, length in enumerate((9, 24, 31, 70), start=1)]
MESSAGES.append(MESSAGES[3][:40])
PICK = st.integers(0, 10**6)
PROTECTING = [
    {"protect": "system,90-120"},
    {"protect": "5-15,60-80", "fair": "30-90,90-300"},
    {"protect": "60-80,130-140", "budget": 20},
    {"protect": "0-9999"},
]
KINDS = st.sampled_from([None] * 8 + [OFF, OFF, {"budget": 0.6}, {"budget": 20}, {"span_tokens": 64}, *PROTECTING])
REQUEST = {
    "history": st.integers(0, 4),  # 0: a new conversation, n: the n-th last one goes on
    "messages": st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=2),
    "kind": KINDS,
    "extra_key": st.sampled_from([None] * 7 + ["tenant"]),
    "reply": st.integers(1, 60),
}


class CacheMachine(RuleBasedStateMachine):
    """One rule per moment of a request's life."""

    CONFIG: ClassVar[dict[str, Any]] = {}
    ARENA_ROWS = 0  # as the server's

    def __init__(self) -> None:
        super().__init__()
        config = KeepKVConfig(
            enabled=True,
            **{"budget": 0.3, "window": 4, "recent": 2, "sinks": 1, "interval": 8, "min_tokens": 6}
            | {"pressure": "merge", "request_keys": "all", "pressure_free": 0.4, "pressure_tokens": 64}
            | self.CONFIG,
        )
        self.world = World(
            config, slots=SLOTS, scale=1, longest=2000, rows=6, chunk_tokens=48, arena_rows=self.ARENA_ROWS
        )
        self.context = self.world.running()
        self.context.__enter__()
        self.rt = self.world.rt
        assert self.rt is not None
        self.knows: dict[int, tuple[Any, ...]] = {}  # slot -> (extra key, *the text its content may know of)
        self.whole: dict[int, int] = {}  # slot -> logical position, where it holds just that token
        self.texts: dict[Any, tuple[int, ...]] = {}  # running request -> all its tokens, the reply included
        self.fresh: list[Any] = []  # admitted, prompt not computed
        self.decoding: list[Any] = []
        self.finished: list[tuple[int, ...]] = []
        self.rids = count()
        self.fails = 0  # compressions that are about to fail
        self.compress_span, due.compress_span = due.compress_span, self.compressed_span
        self.is_cold = pressure.is_cold
        self.merge_unused, pressure.merge_unused = pressure.merge_unused, self.merged_unused
        if self.rt.originals is not None:
            self.watch(self.rt.originals)
        extend, decode = self.world._extend, self.world._decode
        self.world._extend = lambda req, stop: self.written(req, extend, req, stop)  # type: ignore[method-assign]
        self.world._decode = lambda req, n: self.written(req, decode, req, n)  # type: ignore[method-assign]

    def teardown(self) -> None:
        try:
            for req in [*self.fresh, *self.decoding]:
                self.world.abort(req)
            self.world.flush()
        finally:  # a failure must not follow the next example or test
            pressure.merge_unused, pressure.is_cold = self.merge_unused, self.is_cold
            due.compress_span = self.compress_span
            self.context.__exit__(None, None, None)

    # -- what slots know ----------------------------------------------------------------------------------------------

    def text(self, req: Any, end: int) -> tuple[Any, ...]:
        return (req.extra_key, *self.texts[req][:end])

    def row(self, req: Any) -> list[int]:
        return self.world.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_committed_len].tolist()

    def offset(self, req: Any) -> int:
        state = self.rt.requests.state_of(req)
        return state.offset if state is not None else 0

    def written(self, req: Any, function: Any, *args: Any) -> None:
        before = req.kv.kv_committed_len if req.kv.holds_kv else None
        function(*args)
        row = self.row(req)
        first = before if before is not None else len(row) + self.offset(req) - (req.extend_end - req.prefix_len)
        first = first - (self.offset(req) if before is None else 0)
        for place in range(first, len(row)):
            self.knows[row[place]] = self.text(req, place + self.offset(req) + 1)
            self.whole[row[place]] = place + self.offset(req)
        self.sees_only_itself(req, row)
        self.has_protected(req, row, len(row) + self.offset(req))

    def sees_only_itself(self, req: Any, row: list[int]) -> None:
        own = self.text(req, len(self.texts[req]))
        assert len(set(row)) == len(row)
        for slot in row:
            assert own[: len(self.knows[slot])] == self.knows[slot], f"slot {slot} knows more than {req.rid}"

    def has_protected(self, req: Any, row: list[int], end: int) -> None:
        state = self.rt.requests.state_of(req)
        if state is not None:
            held = {self.whole.get(slot) for slot in row}
            for first, stop in state.protection.whole:
                assert held.issuperset(range(first, min(stop, end))), f"{req.rid} lost a protected token"

    def compressed_span(self, rt: Any, req: Any, state: Any, span: Any, whole: bool = True) -> Outcome:
        before = self.row(req)
        self.sees_only_itself(req, before)
        if self.fails and not rt.requests.too_long(req):  # that one would fail, not go on
            self.fails -= 1
            return Outcome.FAILED
        streamed = self.streamed(req, state, span.end) if span.originals else None
        outcome = self.compress_span(rt, req, state, span, whole)
        if outcome is not Outcome.DONE:
            assert self.row(req) == before, "nothing has changed"
            return outcome
        begin = span.end - span.tokens
        policy, left, n = span.policy, span.left, span.sources
        whole = policy.whole
        check_ranges(policy, n)
        assert span.m > left, "something of the span is compressed"
        for kept in select(torch.rand(2, n), policy)[0].tolist():
            assert kept[span.m - left :] == [*range(n - left, n)], "what is left raw is its own"
        at = [index for first, stop in whole for index in range(first, stop)]
        if streamed is not None:
            assert streamed == [(self.text(req, place + 1), place) for place in range(span.end)]
            places = [begin + index for index in at]
        else:
            source = before[span.start : span.start + span.slots]
            places = [self.whole[source[index]] for index in at]
        assert set(places) == {p for a, b in state.protection.whole for p in range(max(a, begin), min(b, span.end))}
        target = self.row(req)[span.start : span.start + span.m]
        assert self.row(req) == [*before[: span.start], *target, *before[span.start + span.slots :]]
        for slot in target:
            self.knows[slot] = self.text(req, span.end)
            self.whole.pop(slot, None)
        self.whole.update(zip(target, places, strict=False))
        return outcome

    def merged_unused(self, rt: Any, config: Any, path: Any, start: int, end: int, target: Any) -> None:
        assert 0 <= start < len(path) - len(target)
        texts = [self.knows[slot] for slot in path.tolist()[start:]]
        assert all(longer[: len(text)] == text for text, longer in pairwise(texts))
        assert len(texts[-1]) - len(texts[0]) == len(texts) - 1, "one slot per token"
        assert len(texts[-1]) - 1 == end
        for slot in target.tolist():
            self.knows[slot] = texts[-1]
            self.whole.pop(slot, None)

    # -- what blocks of originals know --------------------------------------------------------------------------------

    def watch(self, originals: Any) -> None:
        """What a slot knows goes into its block and comes back; only a slot that nothing was merged into is stored."""
        blocks = self.blocks = {}

        def write(numbers: Any, counts: Any, keys: Any, values: Any, slots: torch.Tensor) -> None:
            tokens = [(self.knows[slot], self.whole[slot]) for slot in slots.tolist()]
            assert sum(counts) == len(tokens) and all(len(text) == place + 2 for text, place in tokens)
            for block, n in zip(numbers, counts, strict=True):
                blocks[block], tokens = tokens[:n], tokens[n:]

        def read(numbers: Any, counts: Any, keys: Any, values: Any, slots: torch.Tensor) -> None:
            tokens = [token for block in numbers for token in blocks[block]]
            assert [len(blocks[block]) for block in numbers] == list(counts)
            for slot, (text, place) in zip(slots.tolist(), tokens, strict=True):
                if slot:
                    self.knows[slot], self.whole[slot] = text, place

        def copy(source: torch.Tensor, target: torch.Tensor) -> None:
            for old, new in zip(source.tolist(), target.tolist(), strict=True):
                self.knows[new], self.whole[new] = self.knows[old], self.whole[old]

        originals.store.write, originals.store.read, originals.copy = write, read, copy

    def streamed(self, req: Any, state: Any, end: int) -> list[tuple[Any, int]]:
        """What attention and compression read of tokens [0, end) of a streamed request."""
        reading = stream.reading(self.rt, req, state, 0, end)
        numbers, counts, rows = reading._blocks
        tokens = [token for block in numbers.tolist() for token in self.blocks[block]]
        assert [len(self.blocks[block]) for block in numbers.tolist()] == counts.tolist()
        staged = {row: token for row, token in zip(rows.tolist(), tokens, strict=True) if row}
        for rows, slots in reading._slots:
            for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
                staged[row] = self.knows[slot], self.whole[slot]
        assert sorted(staged) == [*range(1, end + 1)] and reading.tokens == end
        return [staged[row] for row in range(1, end + 1)]

    # -- a request ----------------------------------------------------------------------------------------------------

    @rule(**REQUEST)
    def whole_request(self, **values: Any) -> None:
        req = self.start(**values)
        if req is not None:
            self.computed(len(self.fresh) - 1)
            self.finish(len(self.decoding) - 1)

    @rule(history=st.integers(1, 4), turns=st.integers(1, 6), token=st.integers(0, 1))
    def short_turns(self, history: int, turns: int, token: int) -> None:
        """A token or two at a time: raw spans that are joined, and parted where another goes on otherwise."""
        for _ in range(turns):
            if history > len(self.finished):
                return
            req = self.start(history, [(token,)], None, None, 1)
            if req is None:
                return
            self.computed(len(self.fresh) - 1)
            self.finish(len(self.decoding) - 1)
            history = 1

    @rule(**REQUEST)
    def arrive(self, **values: Any) -> None:
        self.start(**values)

    def start(self, history: int, messages: Any, kind: Any, extra_key: str | None, reply: int) -> Any:
        """Admits a request and computes its prompt; None if it was refused, has no room, or failed in mid-prompt."""
        prompt = self.finished[-history] if 0 < history <= len(self.finished) else ()
        for message in messages:
            prompt = (*prompt, *message, BORDER)
        custom = {"keepkv": kind} if kind else None
        sampling = SamplingParams(max_new_tokens=reply, custom_params=custom)
        req = Req(f"r{next(self.rids)}", "", array("q", prompt), sampling, extra_key=extra_key)
        tokens = array("q", prompt)
        req.origin_input_ids = tokens
        try:
            state = self.rt.requests.state_of(req)
        except ConfigError:
            return None  # such as fair ranges with a budget in slots
        if len(prompt) >= SLOTS - reply - 2 and (state is None or len(prompt) > 900):
            return None  # refused by the server
        same = reply // 2  # replies begin alike and part: SGLang's tree splits there
        self.texts[req] = (*prompt, *range(1000, 1000 + same), *range(2000 + reply, 2000 + 2 * reply - same))
        if not self.world.admit(req):
            del self.texts[req]
            return None
        node = req.last_node
        if req.prefix_len:
            matched = self.world.tree.prefix_device_indices(req).tolist()
            self.sees_only_itself(req, matched)
            seen = req.prefix_len + (node.lookahead if isinstance(node, Span) else 0)
            assert all(len(self.knows[slot]) - 1 <= seen for slot in matched), "knows of the future"
            self.has_protected(req, matched, req.prefix_len)
        if not self.world.prefill(req):
            self.world.abort(req)
            return None
        self.fresh.append(req)
        return req

    @precondition(lambda self: self.fresh)
    @rule(index=PICK)
    def computed(self, index: int) -> None:
        req = self.fresh.pop(index % len(self.fresh))
        self.world.prefilled(req)
        self.decoding.append(req)

    @precondition(lambda self: self.decoding)
    @rule(index=PICK)
    def finish(self, index: int) -> None:
        req = self.decoding.pop(index % len(self.decoding))
        prompt = len(req.origin_input_ids)
        self.world.finish(req, array("q", self.texts[req][prompt:]))
        if len(self.texts[req]) < 600:
            self.finished.append(self.texts[req])

    @precondition(lambda self: self.fresh or self.decoding)
    @rule(index=PICK)
    def abort(self, index: int) -> None:
        running = [*self.fresh, *self.decoding]
        req = running[index % len(running)]
        (self.fresh if req in self.fresh else self.decoding).remove(req)
        self.world.abort(req)

    # -- the cache ----------------------------------------------------------------------------------------------------

    @rule(slots=st.integers(1, 80))
    def evict(self, slots: int) -> None:
        before = self.world.free_or_evictable(), self.world.allocator.available_size()
        self.world.tree.evict_slots(slots)
        assert self.world.free_or_evictable() == before[0]
        freed = self.world.allocator.available_size() - before[1]
        assert freed >= min(slots, before[0] - before[1]), "evictable slots were not given up"

    @rule(waiting=st.integers(0, SLOTS), all_cold=st.booleans())
    def relieve(self, waiting: int, all_cold: bool) -> None:
        """Merging under pressure never evicts a prefix that fits afterwards, and changes no total."""
        merges = self.rt.counters.pressure_tokens
        self.rt.scheduler.waiting_queue = [type("Waiting", (), {"origin_input_ids": range(waiting)})]
        pressure.is_cold = (lambda spans, last_access: True) if all_cold else self.is_cold
        pressure.relieve(self.rt)
        assert self.rt.counters.pressure_tokens - merges <= self.rt.config.pressure_tokens

    @rule()
    def next_compression_fails(self) -> None:
        self.fails = 1

    @rule(history=st.integers(1, 4), cut=st.integers(0, 60), extra_key=st.sampled_from([None, "tenant"]))
    def wait(self, history: int, cut: int, extra_key: str | None) -> None:
        """SGLang touches what a waiting request will need; its tree may split a node then."""
        if history <= len(self.finished):
            text = self.finished[-history]
            self.world.tree.touch_prefix(RadixKey(array("q", text[: max(1, len(text) - cut)]), extra_key))

    @precondition(lambda self: not self.fresh and not self.decoding and len(self.finished) > 5)
    @rule()
    def flush(self) -> None:
        self.world.allocator.clear()
        self.world.rows.clear()
        self.world.tree.reset()
        self.finished.clear()
        assert self.world.allocator.available_size() == SLOTS

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        self.world.check()
        running = [*self.fresh, *self.decoding]
        private = [slot for req in running for slot in self.row(req)[req.kv.cache_protected_len :]]
        self.world.tree.check(running=private if running else None)


class ManyRecent(CacheMachine):
    CONFIG: ClassVar[dict[str, Any]] = {"recent": 20}


class SpanTokens(CacheMachine):
    CONFIG: ClassVar[dict[str, Any]] = {"span_tokens": 64, "min_tokens": 12}


class Slots(CacheMachine):
    CONFIG: ClassVar[dict[str, Any]] = {"budget": 24}


class Protecting(CacheMachine):
    CONFIG: ClassVar[dict[str, Any]] = {"protect": "system,90-120"}


class Originals(CacheMachine):
    """Later turns are read over originals; some are gone, since the host has fewer tokens than the pool."""

    CONFIG: ClassVar[dict[str, Any]] = {"host_ratio": 0.7, "unpack": 0.8, "unpack_overflow": "view", "references": 2}


class Streams(CacheMachine):
    """Slots for one history; the others are streamed."""

    CONFIG: ClassVar[dict[str, Any]] = {"host_ratio": 20, "unpack": 0.1, "protect": "system,90-120", "references": 4}


class ManyOriginals(CacheMachine):
    CONFIG: ClassVar[dict[str, Any]] = {"host_ratio": 20, "unpack": 1, "protect": "system,90-120", "references": 4}


class Starved(CacheMachine):
    """Room for one query window: most turns stay raw, until pressure merges them."""

    ARENA_ROWS = 5


TestCache = case(CacheMachine, *SIZE)
TestManyRecent = case(ManyRecent, *SIZE)
TestSpanTokens = case(SpanTokens, *SIZE)
TestSlots = case(Slots, *SIZE)
TestProtecting = case(Protecting, *SIZE)
TestOriginals = case(Originals, *SIZE)
TestStreams = case(Streams, *SIZE)
TestManyOriginals = case(ManyOriginals, *SIZE)
TestStarved = case(Starved, *SIZE)
