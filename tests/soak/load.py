"""The load: clients that each do one random action after the other, stopped now and then for a quiet moment."""

from __future__ import annotations

import json
import math
import random
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.server_process import ServerProcess
from tests.soak.oracle import Oracle
from tests.soak.report import Tally
from tests.soak.shapes import Shape
from tests.support.client import Answer

STUCK_S = 180
"""Longest that a request may take: a hundred times what most take, and twice what the slowest of a soak took."""
GRACE_S = 2


class Disturbed(Exception):
    """A request did not end as asked, and one of ours that may do that was at work: an abort of everything, or an
    injected error."""


class Windows:
    """When was something at work that may disturb requests? Thread-safe enough: lists only grow."""

    def __init__(self) -> None:
        self._spans: list[list[float]] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        span = [time.monotonic(), float("inf")]
        self._spans.append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic()

    def met(self, began: float) -> bool:
        """Whether one was open at any time since then; GRACE_S longer than it was open, for what it left in a queue."""
        return any(end + GRACE_S >= began for _, end in self._spans)


class Soak:
    """One run. fault: the file whose content is the error that is injected at the moment (inject/sitecustomize.py).
    small: see Oracle."""

    def __init__(
        self,
        server: ServerProcess,
        shape: Shape,
        texts: list[list[int]],
        seed: int,
        fault: Path,
        model: Path,
        small: bool,
    ) -> None:
        self.server, self.shape, self.texts, self.seed = server, shape, texts, seed
        self.fault, self.model = fault, model
        self.oracle = Oracle(server, texts, seed, small)
        self.tally = Tally()
        self.aborting, self.injecting = Windows(), Windows()
        self.control = threading.Lock()  # who pauses, injects or replaces weights
        self._go, self._over = threading.Event(), threading.Event()
        self._busy, self._changed = 0, threading.Condition()

    # -- requests -----------------------------------------------------------------------------------------------------

    def prepare(self, request: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """With a random priority, where the server has priorities."""
        return request | {"priority": rng.randrange(0, 30)} if self.shape.priorities else request

    def ask(self, request: dict[str, Any], rng: random.Random) -> Any:
        """One request to /generate; the answer's data. Disturbed, or AssertionError for any other end."""
        began = time.monotonic()
        status, data = self.server.post_json("/generate", self.prepare(request, rng), timeout_s=STUCK_S)
        return self.judge(status, data, began)

    def generate(self, request: dict[str, Any], rng: random.Random) -> Answer:
        """The same, and as many tokens as were asked for; fewer where the pool has no room for them, as SGLang does."""
        answer = Answer(self.ask(request, rng))
        new, prompt = request["sampling_params"]["max_new_tokens"], len(request["input_ids"])
        room = prompt + new < self.shape.pool - 8  # SGLang keeps some
        fewer = not room and 0 < len(answer.ids) < new and answer.meta["finish_reason"]["type"] == "length"
        assert len(answer.ids) == new or fewer, f"{len(answer.ids)} tokens of {new}: {answer.meta['finish_reason']}"
        self._check_numbers(answer, prompt)
        return answer

    def _check_numbers(self, answer: Answer, prompt: int) -> None:
        said, tokens = answer.keepkv, prompt + len(answer.ids)
        assert said["logical_tokens"] in (tokens - 1, tokens), (said, tokens)
        assert 0 < said["slots_held"] <= said["logical_tokens"], said
        self.tally.add("retractions in answers", answer.retractions)
        # After a retraction `said` is of the row that was made last, and SGLang's count of the first one.
        assert 0 <= answer.cached < prompt, answer.cached
        assert answer.retractions or said["cached_compressed_tokens"] <= answer.cached, (answer.cached, said)

    def judge(self, status: int, data: Any, began: float, abort: bool = False) -> Any:
        """The data of an answer that is whole. abort: this request itself was aborted."""
        if status == 500 and "KeepKV failed" in str(data) and self.injecting.met(began):
            raise Disturbed("failed by an injected error")
        for part in data if isinstance(data, list) else [data]:
            reason = part.get("meta_info", {}).get("finish_reason") if isinstance(part, dict) else None
            aborted = isinstance(reason, dict) and reason.get("type") == "abort"
            if (aborted or (status != 200 and "bort" in str(part))) and (abort or self.aborting.met(began)):
                raise Disturbed("aborted")
            assert not aborted, f"aborted by nobody: {reason}"
        assert status == 200, (status, str(data)[:500])
        return data

    @contextmanager
    def stream(self, request: dict[str, Any], rng: random.Random) -> Iterator[Any]:
        """The open answer of a streaming request; closing it is the client going away."""
        text = json.dumps(self.prepare(request, rng) | {"stream": True}).encode()
        call = urllib.request.Request(f"{self.server.base_url}/generate", text, {"Content-Type": "application/json"})
        began = time.monotonic()
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(call, timeout=STUCK_S) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            self.judge(error.code, error.read().decode(errors="replace"), began)

    # -- clients ------------------------------------------------------------------------------------------------------

    def run(self, actions: list[Any], seconds: float, slice_s: float, quiet: Any) -> None:
        """`actions` (actions.Action) by their weights, for so many seconds; after every slice quiet(number, last),
        which is not counted. Ends at the first failure; nothing of it is left running, or it says so."""
        clients = [
            threading.Thread(target=self._client, args=(number, actions), daemon=True)
            for number in range(self.shape.workers)
        ]
        for client in clients:
            client.start()
        slices = math.ceil(seconds / slice_s)
        try:
            for number in range(slices):
                self._go.set()
                until = time.monotonic() + seconds / slices
                while time.monotonic() < until and not self.tally.failures:
                    time.sleep(0.1)
                self._go.clear()
                if not self._all_done(1.5 * STUCK_S):
                    self.tally.fail(f"stuck: {self._busy} clients still wait after {1.5 * STUCK_S:.0f} s")
                if not self.tally.failures:
                    self.guarded("quiet moment", lambda number=number: quiet(number, number == slices - 1))
                if self.tally.failures:
                    break
        finally:
            self._over.set()
            self._go.set()
            for client in clients:
                client.join(5)

    def _all_done(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy or bool(self.tally.failures), seconds)

    def _client(self, number: int, actions: list[Any]) -> None:
        rng = random.Random(f"client {number} of {self.seed}")
        weights = [action.weight for action in actions]
        while not self._over.is_set() and not self.tally.failures:
            self._go.wait()
            with self._changed:
                if self._over.is_set() or not self._go.is_set():
                    continue
                self._busy += 1
            action = rng.choices(actions, weights)[0]
            self.guarded(action.name, lambda action=action: action.run(self, rng))
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def guarded(self, name: str, run: Any) -> None:
        began = time.monotonic()
        try:
            outcome = run()
        except Disturbed as disturbed:
            outcome = str(disturbed)
        except Exception as error:
            outcome = "FAILED"
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.tally.fail(f"{name}: {type(error).__name__}: {error} ({where.line})")
        self.tally.note(name, outcome, time.monotonic() - began)
