"""Sends the calibration text through the server before it listens.

SGLang is imported where it is used: seams.py loads the hooks in every process, and those imports take seconds.
"""

from __future__ import annotations

import logging
from typing import Any

from keepkv_sglang.memory.calibration import CALIBRATION

logger = logging.getLogger("keepkv")


async def warm_up(_disaggregation_mode: str, tokenizer_manager: Any) -> None:
    """Sends the text through the server, then empties the cache. A failure only means that keys score themselves."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if tokenizer_manager.tokenizer is None:
        return
    args = tokenizer_manager.server_args
    sampling = {"max_new_tokens": 1, "temperature": 0, "custom_params": {"keepkv": {"enabled": False}}}
    try:
        for rank in range(args.dp_size):
            request = GenerateReqInput(
                input_ids=tokenizer_manager.tokenizer.encode(CALIBRATION),
                sampling_params=dict(sampling),
                routed_dp_rank=rank if args.dp_size > 1 else None,
            )
            await tokenizer_manager.generate_request(request, None).__anext__()
        if args.tokenizer_worker_num == 1:  # with several, another may be serving already
            await tokenizer_manager.flush_cache(timeout_s=10)
    except Exception as error:  # a pool or context smaller than the text
        logger.warning("KeepKV's calibration failed, prefixes under pressure are scored by their keys: %s", error)
