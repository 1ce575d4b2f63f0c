"""What one request may learn of another: the tokens that both share, and nothing else.

A request is run behind two neighbours that agree with it on the tokens that it shares with them, and differ behind
these. It must not be able to tell them apart: the same tokens, log-probabilities, hits and counts, bit for bit. The
computation is the same in both runs, so nothing but the neighbour's own tokens could make a difference.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from keepkv_sglang.tools.server_process import ServerProcess
from tests.support.client import Answer, flush, generate, tokens

Keepkv = dict[str, Any] | None
SETTINGS = st.sampled_from(
    (None, {"budget": 0.5}, {"enabled": False}, {"protect": "20-60"}, {"fair": "0-50,50-90"}, {"unpack": False})
)
SALTS = st.sampled_from(({}, {"cache_salt": "neighbour"}, {"extra_key": "neighbour"}))


def seen(answer: Answer) -> tuple[Any, ...]:
    """All that an answer says."""
    return answer.ids, answer.logprobs, answer.cached, answer.keepkv


def behind(server: ServerProcess, history: list[tuple[list[int], int, Keepkv, dict]], own: list[int], keepkv: Keepkv):
    """What a request sees in a server that has answered `history` and nothing else."""
    flush(server)
    for ids, new, theirs, extra in history:
        generate(server, ids, new, theirs, **extra)
    return seen(generate(server, own, 4, keepkv))


def check(server: ServerProcess, examples: int, common: dict[str, Any]) -> None:
    """Draws prompts, where they part, what each asks for. common: settings that all requests have."""

    def asked(keepkv: Keepkv) -> Keepkv:
        return {**common, **(keepkv or {})} or None

    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate], derandomize=examples < 50,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        seed=st.integers(0, 10**6),
        first=st.integers(40, 130),  # an earlier turn of the request's own, in the cache already
        shared=st.integers(0, 170),  # tokens that the neighbour begins with, too
        more=st.integers(1, 80),
        new=st.integers(1, 12),
        ours=SETTINGS,
        theirs=SETTINGS,
        salt=SALTS,
    )
    def one(seed: int, first: int, shared: int, more: int, new: int, ours: Keepkv, theirs: Keepkv, salt: dict) -> None:
        own = tokens(180, seed)
        runs = []
        for other in (seed + 1, seed + 2):
            neighbour = own[:shared] + tokens(more, other)
            history = [(own[:first], 2, asked(ours), {}), (neighbour, new, asked(theirs), salt)]
            runs.append(behind(server, history, own, asked(ours)))
        assert runs[0] == runs[1], "the neighbour's own tokens were seen"
        if salt:
            alone = behind(server, [(own[:first], 2, asked(ours), {})], own, asked(ours))
            assert alone == runs[0], "a neighbour behind another salt was seen"

    one()
