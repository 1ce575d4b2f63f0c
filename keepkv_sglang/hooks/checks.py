"""What a request may say: checked in the process that talks to clients. And what its answer said, by its id."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy as np

from keepkv_sglang.runtime.requests import REQUEST_KEY
from keepkv_sglang.settings.config import ConfigError, KeepKVConfig
from keepkv_sglang.settings.protect import names_system
from keepkv_sglang.settings.values import shown
from keepkv_sglang.start import flags
from keepkv_sglang.start.platform import decide
from keepkv_sglang.turn.anchor import message_border

custom_params: ContextVar[Any] = ContextVar("keepkv_custom_params", default=None)
"""custom_params of the HTTP request that is being served, where SGLang's parser drops it (endpoints.py)."""

_border_of = lru_cache(maxsize=1)(message_border)
REPORTS = 1024
reports: OrderedDict[str, Any] = OrderedDict()
"""Request id -> meta_info["keepkv"] of the last REPORTS answers, for GET /keepkv/requests/ID (endpoints.py)."""


def check_sampling_params(server_args: Any, sampling_params: Any, tokenizer: Any) -> None:
    """Raises ConfigError (a ValueError: SGLang answers 400) for bad keepkv parameters of one or more requests."""
    config = flags.config_of(server_args)
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        custom = params.get("custom_params") if isinstance(params, dict) else None
        if custom is None or not (config.enabled or isinstance(custom, dict)):
            continue
        if not isinstance(custom, dict):
            raise ConfigError(
                f'custom_params must be an object such as {{"keepkv": {{"budget": 0.2}}}}, not {shown(custom)}'
            )
        if custom.get(REQUEST_KEY) is not None:
            _check_keepkv(config, custom[REQUEST_KEY], flags.has_flags(server_args), tokenizer)


def _check_keepkv(config: KeepKVConfig, wanted: Any, known_off: bool, tokenizer: Any) -> None:
    off = isinstance(wanted, dict) and wanted.get("enabled") is False
    if not config.enabled and not off and known_off:
        raise ConfigError("this server runs without KeepKV; start it with --enable-keepkv or leave out keepkv")
    resolved = config.with_request(wanted)
    if "protect" in wanted and names_system(resolved.protect) and _border_of(tokenizer) is None:
        raise ConfigError(
            "protect: this model's chat template shows no end of a message, so the server does not know where "
            "the system prompt ends; name its tokens instead, such as 0-500"
        )


def check_tokens(input_ids: Any, vocab_size: int) -> None:
    """Raises ConfigError for token ids outside [0, vocab_size): on a CPU they end the model, and with it the server.

    input_ids: None, a list of ids, or a list of such lists.
    """
    if isinstance(input_ids, list) and input_ids and isinstance(input_ids[0], list):
        for ids in input_ids:
            check_tokens(ids, vocab_size)
        return
    if not input_ids:
        return
    try:
        ids = np.frombuffer(array("q", input_ids), dtype=np.int64)
    except (TypeError, OverflowError):
        raise ConfigError(f"input_ids must be whole numbers from 0 to {vocab_size - 1}") from None
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ConfigError(f"input_ids: {bad} is no token of this model; use whole numbers from 0 to {vocab_size - 1}")


def guards_tokens(server_args: Any) -> bool:
    """With KeepKV, and wherever our platform runs SGLang on a CPU."""
    return flags.config_of(server_args).enabled or _our_platform()


@lru_cache(maxsize=1)
def _our_platform() -> bool:
    return decide().active
