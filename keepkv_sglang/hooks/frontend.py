"""Hooks in the process that talks to clients: a bad per-request value is an HTTP 400 before anything is scheduled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Any

from keepkv_sglang import flags
from keepkv_sglang.anchor import message_border
from keepkv_sglang.config import ConfigError
from keepkv_sglang.protect import names_system
from keepkv_sglang.runtime import REQUEST_KEY

_border_of = lru_cache(maxsize=1)(message_border)


def check_sampling_params(server_args: Any, sampling_params: Any, tokenizer: Any) -> None:
    """Raises ConfigError (a ValueError: SGLang answers 400) for bad keepkv parameters of one or more requests."""
    config = flags.config_of(server_args)
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        custom = params.get("custom_params") if isinstance(params, dict) else None
        if not isinstance(custom, dict) or custom.get(REQUEST_KEY) is None:
            continue
        wanted = custom[REQUEST_KEY]
        off = isinstance(wanted, dict) and wanted.get("enabled") is False
        if not config.enabled and not off and flags.has_flags(server_args):
            raise ConfigError("this server runs without KeepKV; start it with --enable-keepkv or leave out keepkv")
        resolved = config.with_request(wanted)
        if "protect" in wanted and names_system(resolved.protect) and _border_of(tokenizer) is None:
            raise ConfigError(
                "protect: this model's chat template shows no end of a message, so the server does not know where "
                "the system prompt ends; name its tokens instead, such as 0-500"
            )


def before_create_tokenized_object(self: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE TokenizerManager._create_tokenized_object: covers every endpoint and the Engine."""
    check_sampling_params(self.server_args, getattr(obj, "sampling_params", None), self.tokenizer)


async def around_serve_generate_request(original: Any, obj: Any, request: Any) -> Any:
    """AROUND http_server.serve_generate_request: a bad stream is refused before HTTP 200 is sent."""
    from sglang.srt.entrypoints import http_server

    try:
        manager = http_server._global_state.tokenizer_manager
        check_sampling_params(manager.server_args, obj.sampling_params, manager.tokenizer)
    except ConfigError as error:
        return http_server._create_error_response(error)
    return await original(obj, request)


def around_wait_one_response(original: Any, self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    """AROUND TokenizerManager._wait_one_response: meta_info["keepkv"] is one object, not SGLang's list of values."""

    async def responses() -> AsyncIterator[Any]:
        async for out in original(self, *args, **kwargs):
            values = out["meta_info"].get(REQUEST_KEY) if isinstance(out, dict) and "meta_info" in out else None
            if isinstance(values, list):
                out = {**out, "meta_info": {**out["meta_info"], REQUEST_KEY: values[-1] if values else None}}
                if not values:
                    del out["meta_info"][REQUEST_KEY]
            yield out

    return responses()
