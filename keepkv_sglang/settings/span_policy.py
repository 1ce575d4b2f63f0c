"""How a request's configuration becomes the policy of one span: the one place, for the server and for `keepkv eval`."""

from __future__ import annotations

from keepkv_sglang.compress.select import UNIFORM, SpanPolicy
from keepkv_sglang.settings.config import KeepKVConfig


def span_policy(
    config: KeepKVConfig,
    m: int,
    *,
    sinks: int,
    followed: bool = False,
    whole: tuple[tuple[int, int], ...] = (),
    shares: tuple[tuple[int, int, int], ...] = (),
    carried: int = 0,
) -> SpanPolicy:
    """The policy that keeps `m` slots of a span.

    sinks: config.sinks for a span that nothing precedes, else 0. followed: the span's successor is computed already, so
    its recent tokens need no protection (docs/log.md). whole, shares, carried: as SpanPolicy has them.
    """
    return SpanPolicy(
        m=m,
        merge=config.merge,
        recent=0 if followed else max(config.recent, carried),
        sinks=sinks,
        threshold=config.threshold,
        scorer=config.scorer,
        chunk=config.chunk,
        whole=whole,
        shares=shares,
        carried=carried,
        # What a budget in slots keeps is merged again, and one number of tokens is needed for that.
        heads=UNIFORM if config.counts_slots else config.heads,
    )
