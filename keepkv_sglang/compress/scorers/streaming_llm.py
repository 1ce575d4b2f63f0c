"""StreamingLLM (arXiv 2309.17453): the sinks and the most recent tokens. Needs no queries."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.window import Window


def streaming_llm(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: the token's index, so that the latest are kept beside the policy's sinks. `pool_kernel` is unused.

    Differs from the paper: kept tokens stay at their positions (there, positions are counted inside the cache).
    The sinks are those of SpanPolicy: none in a span that does not begin at position 0.
    """
    heads, n = window.lv.shape
    return torch.arange(n, device=window.k.device, dtype=window.k.dtype).expand(heads, n)
