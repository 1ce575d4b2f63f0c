"""The servers that are soaked."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """pool: slots. longest: tokens of a conversation. workers: clients at once. priorities: requests have random ones.
    exact: originals come back bit for bit."""

    pool: int
    longest: int
    workers: int
    flags: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    priorities: bool = False
    exact: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--enable-keepkv", "--max-total-tokens", str(self.pool), *self.flags)


COMMON = ("--keepkv-request-keys", "all", "--keepkv-references", "32", "--keepkv-window", "16", "--enable-mixed-chunk")
SHAPES = {
    # Everything is short: slots, blocks of host memory, requests at once. SGLang's own test switch retracts one request
    # of a decode batch every 40 steps, beside the retractions that the pool makes necessary.
    "tiny": Shape(
        pool=500, longest=800, workers=5, priorities=True,
        flags=(
            *COMMON, "--keepkv-budget", "0.2", "--keepkv-interval", "32", "--chunked-prefill-size", "128",
            "--keepkv-host-ratio", "2", "--keepkv-host-dtype", "int4", "--disable-overlap-schedule",
            "--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "5",
            "--default-priority-value", "0", "--max-running-requests", "4",
        ),
        env={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"},
    ),
    # Overlapping schedule, small chunks, merging under pressure, long prompts compressed in pieces, originals bit for
    # bit, some of them streamed.
    "ample": Shape(
        pool=2500, longest=900, workers=5, exact=True,
        flags=(
            *COMMON, "--keepkv-budget", "0.2", "--keepkv-interval", "64", "--chunked-prefill-size", "256",
            "--keepkv-host-ratio", "4", "--keepkv-pressure", "merge", "--keepkv-pressure-free", "0.5",
            "--keepkv-piece-tokens", "64",
        ),
    ),
}  # fmt: skip
