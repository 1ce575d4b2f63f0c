"""How a request's configuration becomes the policy of one span: the one place, for the server and for `keepkv eval`."""

from __future__ import annotations

from keepkv_sglang.config import KeepKVConfig
from keepkv_sglang.layer_compress import SpanPolicy


def span_policy(config: KeepKVConfig, m: int, *, at_start: bool, followed: bool = False) -> SpanPolicy:
    """The policy that keeps `m` slots of a span.

    at_start: nothing precedes the span, so its first tokens are sinks. followed: the span's successor is computed
    already, so its recent tokens need no protection (docs/log.md).
    """
    return SpanPolicy(
        m=m,
        merge=config.merge,
        recent=0 if followed else config.recent,
        sinks=config.sinks if at_start else 0,
        threshold=config.threshold,
        scorer=config.scorer,
        chunk=config.chunk,
    )
