"""Which requests are never compressed, and why: what meta_info and a refusal say about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keepkv_sglang.settings.config import KeepKVConfig


@dataclass(frozen=True)
class NotCompressed:
    """What the server remembers of such a request. reason: a key of REASONS."""

    reason: str
    budget: float | int


REASONS = {
    "request": 'KeepKV is off for it ("enabled": false); without that, a small enough budget would let it in',
    "budget 1": "its budget is 1, which compresses nothing; a smaller budget would let it in",
    "session": "a request in a session is never compressed; send it without the session, or use a larger pool",
    "beam search": "beam search is never compressed; leave out beam_width, or use a larger pool",
    "input embeddings": "input embeddings are never compressed; send tokens, or use a larger pool",
    "multimodal input": "multimodal input is never compressed; use a larger pool",
    "settings": "its settings were refused",
}
"""Reason -> what a prompt that is too long for the pool uncompressed is told."""


def why_not(req: Any, config: KeepKVConfig) -> str | None:
    """The reason why this request of SGLang's is never compressed under its configuration; None: it is.

    Token ids must say what the KV is: no embeddings, no media, no session rows, no beams.
    """
    if not config.enabled:
        return "request"
    if req.session is not None:
        return "session"
    if req.input_embeds is not None or req.positional_embed_overrides is not None:
        return "input embeddings"
    if req.multimodal_inputs is not None:
        return "multimodal input"
    if getattr(req, "beam_group", None) is not None:
        return "beam search"
    return None if config.compresses else "budget 1"
