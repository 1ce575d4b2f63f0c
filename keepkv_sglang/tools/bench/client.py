"""One streamed /generate call and when its tokens came. Standard library only; one thread per call is enough here."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 3600.0  # a request may wait long for memory; that is what is measured


@dataclass
class Call:
    """One request of a workload. Times in seconds of time.perf_counter.

    agent, turn: where it belongs, for reports by turn. sent: when. arrivals: one entry per
    generated token, tokens of one chunk at the same time. meta: SGLang's meta_info of the last chunk. error: what
    went wrong, else "".
    """

    agent: int
    turn: int
    prompt: list[int]
    new_tokens: int
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def latency(self) -> float:
        """Seconds from sending to the last token."""
        return self.arrivals[-1] - self.sent

    @property
    def ok(self) -> bool:
        return not self.error and bool(self.arrivals)


def generate(port: int, call: Call) -> Call:
    """Streams the call's answer from 127.0.0.1:port and fills it in. Never raises: what went wrong is in call.error."""
    body = {
        "input_ids": call.prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": call.new_tokens, "ignore_eos": True},
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    call.sent = time.perf_counter()
    try:
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            call.error = f"HTTP {answer.status}: {answer.read(500).decode(errors='replace')}"
            return call
        for line in answer:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                _take(call, json.loads(line[6:]), time.perf_counter())
    except (OSError, http.client.HTTPException, ValueError) as error:
        call.error = repr(error)
    finally:
        connection.close()
    if not call.error and not call.output:
        call.error = "the stream ended without a token"
    return call


def _take(call: Call, chunk: dict[str, Any], now: float) -> None:
    """One chunk. SGLang sends all tokens so far in each."""
    if "error" in chunk:
        call.error = str(chunk["error"])
        return
    call.output = chunk["output_ids"]
    call.arrivals += [now] * (len(call.output) - len(call.arrivals))
    call.meta = chunk["meta_info"]
    reason = call.meta.get("finish_reason")
    if reason and reason.get("type") == "abort":
        call.error = str(reason.get("message", "aborted"))
