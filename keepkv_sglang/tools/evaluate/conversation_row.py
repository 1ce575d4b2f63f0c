"""A row of the probe that turn/ compresses as it does on the server: one request per turn."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Sequence

import torch

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.tools.evaluate.methods import compress_span
from keepkv_sglang.tools.evaluate.originals import Archive
from keepkv_sglang.tools.evaluate.probe import Row
from keepkv_sglang.tools.evaluate.results import OFF
from keepkv_sglang.turn import limits, plan, spans
from keepkv_sglang.turn.anchor import MessageBorder
from keepkv_sglang.turn.protection import Protection
from keepkv_sglang.turn.queries import capture, release, release_reply
from keepkv_sglang.turn.spans import DueSpan, Raw
from keepkv_sglang.turn.state import RequestState


class EndlessArena:
    """Arena rows for one request that shares them with nobody: the probe keeps the queries themselves."""

    rows = free_rows = 1 << 40

    def take(self, rows: int) -> list[int]:
        """So many row numbers; they say nothing."""
        return list(range(rows))

    def give_back(self, rows: list[int]) -> None:
        """Nothing to do."""


class ConversationRow:
    """The row of a conversation. Of each turn the prompt is prefilled in one chunk, then the reply decoded.

    A reply's last token is not computed before the next turn, as on a server: there it was only sampled.
    spans: what was compressed, in order. state: of the present turn's request. held: the row's slots behind each token
    that was fed. slots_before_reply: behind the prompt but its last token, once what was due is compressed.

    originals: how the K/V of compressed tokens are kept (results.ORIGINALS). "off": they are not; a prompt is read over
    the compressed row, and its last token, which belongs to the reply, after the compression. Else the server's course:
    a prompt is read whole over its history's originals, then all behind the anchor is compressed again, once, with this
    prompt's queries; the reply's first token was expected before that. Replies are decoded over the compressed row, and
    their K/V are archived as they were computed there.
    """

    def __init__(self, row: Row, config: KeepKVConfig, border: MessageBorder | None, originals: str = OFF) -> None:
        self.row, self.config = row, config
        self.archive = None if originals == OFF else Archive(originals)
        self._expected: torch.Tensor | None = None  # with originals, [1, vocabulary]: of the reply's first token
        self.limits = limits.Limits(EndlessArena(), border=border)
        self.spans: list[DueSpan] = []
        self.held: list[int] = []
        self.state: RequestState | None = None
        self.slots_before_reply = 0
        self._tokens = array("q")  # the whole conversation
        self._chain: plan.Chain | None = None
        self._tail: tuple[int, int, int] | None = None  # where the raw part of what the cache has begins

    def clone(self) -> ConversationRow:
        """A conversation that goes on from here with a prompt of its own."""
        other = copy.copy(self)
        other.row, other._tokens = self.row.clone(), self._tokens[:]
        other.spans, other.held = list(self.spans), list(self.held)
        other.archive = self.archive and self.archive.clone()
        return other

    def prompt(self, ids: Sequence[int]) -> None:
        """Prefills a turn's prompt (without originals: all but its last token), and what was not computed of the reply
        before; then compresses what is due. ids: what the prompt adds to the conversation."""
        self._tokens.extend(ids)
        end = len(self._tokens)
        if self.state is not None:
            self._chain = self._match(self.state.anchor_len, end)
        first = self.row.tokens
        state = self._begin(first, end)
        plan.plan_chunk(self.limits, state, first, end, too_long=False)
        log_probs = self._feed(self._tokens[first : end - 1 if self.archive is None else end], last=1)
        self._end_of_prompt(state, log_probs)

    def read_prompt(self, ids: Sequence[int]) -> None:
        """In place of the first prompt(), with originals: the row has read `ids` already, in one go. What the model
        expected behind them is not known: no reply can follow, only another prompt."""
        assert self.archive is not None and self.state is None and self.row.tokens == self.row.slots == len(ids)
        self._tokens.extend(ids)
        state = self._begin(0, len(ids))
        plan.plan_chunk(self.limits, state, 0, len(ids), too_long=False)
        self._fed(0, 0)
        self._end_of_prompt(state, None)

    def _end_of_prompt(self, state: RequestState, log_probs: torch.Tensor | None) -> None:
        """Everything due is compressed. log_probs [1, vocabulary] behind what was fed last."""
        self._compress_plan(state)
        if self.archive is not None:
            self._expected = log_probs
        self.slots_before_reply = self.row.slots - (self.row.tokens - state.reply_start)

    def whole_prompt(self, ids: Sequence[int]) -> None:
        """In place of the first prompt(): the row has `ids` but the last, as if the cache had matched them, and they
        stay uncompressed."""
        assert self.state is None and self.row.tokens == self.row.slots == len(ids) - 1
        self._tokens.extend(ids)
        self._begin(self.row.tokens, len(ids))
        self.slots_before_reply = self.row.slots

    def _match(self, anchor: int, prompt_tokens: int) -> plan.Chain:
        """What the row of the next prompt begins with: what it holds, or its history, unpacked."""
        if self.archive is not None:
            tokens = self.archive.history(self.row, prompt_tokens, self.limits.queries_of(self.config))
            if tokens is not None:
                self.archive.unpack(self.row, tokens)
                return plan.Chain.of_originals(anchor, tokens, tokens - self.archive.begin, self.archive.end)
        return plan.Chain(anchor, self.row.slots, self.row.tokens, self._tail or (anchor, anchor, 0))

    def _begin(self, matched: int, end: int) -> RequestState:
        protection = Protection.of(self.config.protect, self.config.fair, self._tokens, self.limits.border)
        self.state = RequestState(self.config, (), end, protection)
        plan.begin(self.limits, self.state, limits.Row(self._tokens[:], end, matched), self._chain)
        return self.state

    def reply(self, ids: Sequence[int]) -> torch.Tensor:
        """Decodes a reply that is known, compressing at every interval. Returns log-probabilities [len(ids),
        vocabulary]: row t is what the model expected in the place of ids[t]."""
        assert self.state is not None and len(ids)
        self._tokens.extend(ids)
        log_probs, last_queries = [], None
        if self.archive is not None:
            assert self._expected is not None
            log_probs.append(self._expected)
            last_queries = [q[-1:] for q in self.row.queries]  # of the prompt's last token, which is the reply's
        while left := len(self._tokens) - 1 - self.row.tokens:
            due = self.state.interval_start + self.config.interval
            step = min(left, max(1, due - self.row.tokens))
            log_probs.append(self._feed(self._tokens[self.row.tokens : self.row.tokens + step]))
            if last_queries is not None:
                self.row.queries = [torch.cat(pair) for pair in zip(last_queries, self.row.queries, strict=True)]
                last_queries = None
            if step < left and spans.reply_due(self.state, self.row.slots):
                self._compress_reply(self.state)
        return torch.cat(log_probs)

    def generate(self, count: int, stop: Sequence[int] = ()) -> list[int]:
        """A greedy reply of at most `count` tokens, fewer than an interval; it ends before a token of `stop`. Nothing
        can follow it."""
        assert count < self.config.interval
        if self.archive is None:
            return self.row.generate([self._tokens[-1]], count, stop)
        assert self._expected is not None
        first = int(self._expected[-1].argmax())
        if first in stop:
            return []
        return [first, *(self.row.generate([first], count - 1, stop) if count > 1 else [])]

    def _feed(self, ids: Sequence[int], last: int | None = None) -> torch.Tensor:
        first, slots = self.row.tokens, self.row.slots
        log_probs = self.row.feed(ids, last)
        self._fed(first, slots)
        return log_probs

    def _fed(self, first: int, slots: int) -> None:
        """Tokens from `first` on came behind so many slots."""
        assert self.state is not None
        self.held += range(slots + 1, self.row.slots + 1)
        capture(self.limits, self.state, first, self.row.tokens, ([], []), 0)

    def _compress_plan(self, state: RequestState) -> None:
        while state.plan and state.plan[0].end <= self.row.tokens:
            planned = state.plan.pop(0)
            due = spans.planned_span(state, planned, self.row.slots)
            if isinstance(due, DueSpan):
                self._compress(state, due)
            elif due is Raw.CLOSED:
                end = planned.end - state.offset
                spans.keep_raw(state, end, planned.end, cached_slots=end)
            release(self.limits, planned)

    def _compress_reply(self, state: RequestState) -> None:
        due = spans.reply_span(state, self.row.slots)
        assert due is not Raw.OPEN, "no query is lost here"
        if isinstance(due, DueSpan):
            self._compress(state, due)
        else:
            spans.keep_reply(state, self.row.slots, cached_slots=0)
        release_reply(self.limits, state)

    def _compress(self, state: RequestState, due: DueSpan) -> None:
        if self.archive is not None:
            self.archive.take(self.row, due)
        compress_span(self.row, due)
        state.offset += due.slots - due.m
        spans.commit(state, due)
        self.spans.append(due)
        self._tail = state.tail_slots, state.tail_tokens, state.carried
