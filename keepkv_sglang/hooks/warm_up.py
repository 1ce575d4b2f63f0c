"""What goes through the server before it listens: the calibration text, and on a GPU a first compression.

SGLang is imported where it is used: seams.py loads the hooks in every process, and those imports take seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from keepkv_sglang.memory.calibration import CALIBRATION
from keepkv_sglang.start import flags

logger = logging.getLogger("keepkv")


async def warm_up(_disaggregation_mode: str, tokenizer_manager: Any) -> None:
    """Sends the text through the server, then empties the cache. A failure only means that keys score themselves, and
    that the first client waits for kernels to be compiled."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if tokenizer_manager.tokenizer is None:
        return
    args = tokenizer_manager.server_args
    text = tokenizer_manager.tokenizer.encode(CALIBRATION)
    try:
        for rank in range(args.dp_size):
            for sampling in _runs(args):
                request = GenerateReqInput(
                    input_ids=list(text),
                    sampling_params=sampling,
                    routed_dp_rank=rank if args.dp_size > 1 else None,
                )
                await tokenizer_manager.generate_request(request, None).__anext__()
        if args.tokenizer_worker_num == 1:  # with several, another may be serving already
            await tokenizer_manager.flush_cache(timeout_s=10)
    except Exception as error:  # a pool or context smaller than the text
        logger.warning("KeepKV's warm-up failed, prefixes under pressure are scored by their keys: %s", error)


def _runs(args: Any) -> Iterator[dict[str, Any]]:
    """Sampling parameters of each pass of the text. On a GPU a second one compresses it and a reply's first interval:
    that loads cuSOLVER and compiles every kernel of ours, which takes seconds."""
    config = flags.config_of(args)
    if config.pressure != "off":
        yield {"max_new_tokens": 1, "temperature": 0, "custom_params": {"keepkv": {"enabled": False}}}
    if args.device != "cpu" and config.compresses:
        yield {"max_new_tokens": config.interval + 2, "temperature": 0, "ignore_eos": True}
