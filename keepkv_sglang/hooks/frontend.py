"""Hooks in the process that talks to clients: a bad request is an HTTP 400 before anything is scheduled."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import numpy as np

from keepkv_sglang import flags
from keepkv_sglang.anchor import message_border
from keepkv_sglang.config import ConfigError, KeepKVConfig
from keepkv_sglang.hooks import endpoints
from keepkv_sglang.protect import names_system
from keepkv_sglang.runtime import REQUEST_KEY
from keepkv_sglang.values import shown

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


def before_create_tokenized_object(
    self: Any, obj: Any, _input_text: Any = None, input_ids: Any = None, *_args: Any, **_kwargs: Any
) -> None:
    """BEFORE TokenizerManager._create_tokenized_object: covers every endpoint and the Engine."""
    params = getattr(obj, "sampling_params", None)
    extra = endpoints.custom_params.get()
    if extra is not None and isinstance(params, dict) and params.get("custom_params") is None:
        params = obj.sampling_params = {**params, "custom_params": extra}
    check_sampling_params(self.server_args, params, self.tokenizer)
    if _guards_tokens(self.server_args):
        check_tokens(input_ids, self.model_config.vocab_size)


async def around_serve_generate_request(original: Any, obj: Any, request: Any) -> Any:
    """AROUND http_server.serve_generate_request: a bad stream is refused before HTTP 200 is sent."""
    from sglang.srt.entrypoints import http_server

    try:
        manager = http_server._global_state.tokenizer_manager
        check_sampling_params(manager.server_args, obj.sampling_params, manager.tokenizer)
        if _guards_tokens(manager.server_args):
            check_tokens(obj.input_ids, manager.model_config.vocab_size)
    except ConfigError as error:
        return http_server._create_error_response(error)
    return await original(obj, request)


def around_update_request_meta_info(
    original: Any, self: Any, meta_info: Any, state: Any, customized_info: Any, index: int, *args: Any, **kwargs: Any
) -> None:
    """AROUND TokenizerManager.update_request_meta_info: meta_info["keepkv"] is one object, in the last output of every
    kind of stream. SGLang accumulates a list per output token, and slices it by token."""
    others = {key: values for key, values in customized_info.items() if key != REQUEST_KEY}
    original(self, meta_info, state, others, index, *args, **kwargs)
    values = customized_info.get(REQUEST_KEY)
    if values and values[index]:
        meta_info[REQUEST_KEY] = values[index][-1]
        reports[str(meta_info["id"])] = values[index][-1]
        while len(reports) > REPORTS:
            reports.popitem(last=False)


def _guards_tokens(server_args: Any) -> bool:
    """With KeepKV, and wherever our platform runs SGLang on a CPU."""
    return flags.config_of(server_args).enabled or _our_platform()


@lru_cache(maxsize=1)
def _our_platform() -> bool:
    from keepkv_sglang.platform import decide

    return decide().active
