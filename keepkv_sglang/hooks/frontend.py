"""Hooks in the process that talks to clients: a bad request is an HTTP 400 before anything is scheduled."""

from __future__ import annotations

from typing import Any

from keepkv_sglang.hooks.checks import (
    REPORTS,
    check_sampling_params,
    check_tokens,
    custom_params,
    guards_tokens,
    reports,
)
from keepkv_sglang.runtime.requests import REQUEST_KEY
from keepkv_sglang.settings.config import ConfigError


def before_create_tokenized_object(
    self: Any, obj: Any, _input_text: Any = None, input_ids: Any = None, *_args: Any, **_kwargs: Any
) -> None:
    """BEFORE TokenizerManager._create_tokenized_object: covers every endpoint and the Engine."""
    params = getattr(obj, "sampling_params", None)
    extra = custom_params.get()
    if extra is not None and isinstance(params, dict) and params.get("custom_params") is None:
        params = obj.sampling_params = {**params, "custom_params": extra}
    check_sampling_params(self.server_args, params, self.tokenizer)
    if guards_tokens(self.server_args):
        check_tokens(input_ids, self.model_config.vocab_size)


async def around_serve_generate_request(original: Any, obj: Any, request: Any) -> Any:
    """AROUND http_server.serve_generate_request: a bad stream is refused before HTTP 200 is sent."""
    from sglang.srt.entrypoints import http_server  # start-up cost: seams.py loads this file in every process

    try:
        manager = http_server._global_state.tokenizer_manager
        check_sampling_params(manager.server_args, obj.sampling_params, manager.tokenizer)
        if guards_tokens(manager.server_args):
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
