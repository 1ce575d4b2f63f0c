"""From calls and two readings of /server_info to the numbers of one run. Arithmetic only; no server, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from keepkv_sglang.tools.report.statistics import percentile

from .client import Call

PERCENTILES = (50, 90, 99)


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN when there is nothing to divide by."""
    return part / whole if whole else math.nan


def summarise(calls: Sequence[Call], seconds: float, before: Any, after: Any) -> dict[str, float]:
    """The numbers of one run, by name; docs/bench.md says what each means.

    seconds: wall clock from the first request to the last answer. before, after: the scheduler's `internal_states[0]`
    of /server_info around the run, with `step_times`. Rates count successful requests only. NaN: does not apply.
    """
    good = [call for call in calls if call.ok]
    generated = sum(len(call.output) for call in good)
    prompt = sum(len(call.prompt) for call in good)
    cached = sum(call.meta.get("cached_tokens", 0) for call in good)
    compressed = sum(keepkv(call, "cached_compressed_tokens") for call in good)
    logical = [len(call.prompt) + len(call.output) - 1 for call in good]
    held = [keepkv(call, "slots_held", tokens) for call, tokens in zip(good, logical, strict=True)]
    gaps = [b - a for call in good for a, b in pairwise(call.arrivals)]
    out = {
        "requests": len(calls),
        "errors": len(calls) - len(good),
        "short_answers": sum(len(call.output) != call.new_tokens for call in good),
        "seconds": seconds,
        "requests_per_s": ratio(len(good), seconds),
        "generated_per_s": ratio(generated, seconds),
        "generated": generated,
        "mean_output": ratio(generated, len(good)),
        "hit_rate": ratio(cached, prompt),
        "compressed_share": ratio(compressed, cached),
        "slots_held": fmean(held) if held else math.nan,
        "slots_per_token": ratio(sum(held), sum(logical)),
        "retractions": sum(call.meta.get("num_retractions", 0) for call in good),
    }
    for name, values in (
        ("ttft", [call.ttft for call in good]),
        ("latency", [call.latency for call in good]),
        ("gap", gaps),
    ):
        out |= {f"{name}_p{p}": percentile(values, p) for p in PERCENTILES}
    return out | steps(seconds, generated - len(good), before, after)


def steps(seconds: float, decoded: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """What the scheduler's own counts say about a run of `seconds` in which `decoded` tokens came from decode steps.

    The decode phase is the wall clock without the time in prefill forwards: scheduling, compression and everything
    else counts as decoding, so nothing of ours is hidden in it.
    """
    prefill, decode = (cells(kind, before, after) for kind in ("prefill", "decode"))
    prefill_s = sum(cell[1] for cell in prefill.values())
    decode_s = sum(cell[1] for cell in decode.values())
    decode_steps = sum(cell[0] for count, cell in decode.items() if count)
    out = {
        "prefill_s": prefill_s,
        "decode_step_s": decode_s,
        "decode_phase_s": seconds - prefill_s,
        "decode_per_s": ratio(decoded, seconds - prefill_s),
        "decode_step_per_s": ratio(decoded, decode_s),
        "running_mean": ratio(sum(count * cell[0] for count, cell in decode.items()), decode_steps),
        "running_max": max(decode, default=math.nan),
        "prefill_tokens": sum(cell[2] for cell in prefill.values()),
    }
    names = ("hook_seconds", "seconds", "compressions")
    counters = {name: _counter(after, name) - _counter(before, name) for name in names}
    pressure = _counter(after, "pressure_seconds") - _counter(before, "pressure_seconds")
    return out | {
        "compressions": counters["compressions"],
        "compress_s": counters["seconds"] + pressure,
        "compress_share": ratio(counters["seconds"] + pressure, seconds),
        "hook_share": ratio(counters["hook_seconds"] + pressure, seconds),
    }


def cells(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[int, tuple[float, float, float]]:
    """{requests in the batch: (steps, seconds, tokens)} between two readings, without empty ones."""
    old = before.get("step_times", {}).get(kind, {})
    out = {}
    for count, cell in after.get("step_times", {}).get(kind, {}).items():
        change = tuple(b - a for a, b in zip(old.get(count, (0, 0, 0)), cell, strict=True))
        if change[0]:
            out[int(count)] = (change[0], change[1], change[2])
    return out


def keepkv(call: Call, key: str, default: float = 0) -> float:
    """A field of the answer's meta_info["keepkv"]; the default where the server has no KeepKV."""
    return (call.meta.get("keepkv") or {}).get(key, default)


def _counter(state: Mapping[str, Any], key: str) -> float:
    return float(state.get("keepkv", {}).get("counters", {}).get(key, 0))


def by_turn(calls: Sequence[Call]) -> dict[str, dict[str, float]]:
    """For each turn: mean seconds from prompt to last token, slots held and logical tokens at its end, hit rate.

    Turn numbers as text, because this goes into JSON.
    """
    out = {}
    for turn in sorted({call.turn for call in calls if call.ok}):
        good = [call for call in calls if call.ok and call.turn == turn]
        logical = [len(call.prompt) + len(call.output) - 1 for call in good]
        out[str(turn)] = {
            "seconds": fmean(call.latency for call in good),
            "slots": fmean(keepkv(call, "slots_held", tokens) for call, tokens in zip(good, logical, strict=True)),
            "tokens": fmean(logical),
            "hit_rate": ratio(
                sum(call.meta.get("cached_tokens", 0) for call in good), sum(len(call.prompt) for call in good)
            ),
        }
    return out


def agreement(calls: Sequence[Call], reference: Mapping[tuple[int, ...], Sequence[int]]) -> dict[str, float]:
    """How far outputs agree with those of the full cache, over requests whose whole prompt is equal.

    reference: prompt -> output of the full cache. compared: how many requests have their prompt in it; where replies
    are fed back, a prompt differs once a reply did. agreed: mean share of the output's tokens before the first that
    differs. first_token: share of requests whose first token agrees; identical: whose whole output does.
    """
    shares, first = [], []
    for call in calls:
        expected = reference.get(tuple(call.prompt)) if call.ok else None
        if expected:
            length = min(len(expected), len(call.output))
            same = next((i for i in range(length) if expected[i] != call.output[i]), length)
            shares.append(same / length)
            first.append(same > 0)
    count = len(shares)
    return {
        "compared": count,
        "agreed": ratio(sum(shares), count),
        "first_token": ratio(sum(first), count),
        "identical": ratio(sum(share == 1 for share in shares), count),
    }
