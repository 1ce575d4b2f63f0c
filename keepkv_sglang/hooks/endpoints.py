"""HTTP: `custom_params` where SGLang's own parsers drop it, and what KeepKV did to a request, by its id.

SGLang reads custom_params in /generate, /v1/completions and /v1/chat/completions. The endpoints of ENDPOINTS end in the
same tokenizer manager, and their parsers ignore the key without a word. Here it is taken from the body, checked, and
handed to `frontend.before_create_tokenized_object` through the request's own context. SGLang is imported where it is
used: seams.py loads this file in every process, and those imports take seconds.
"""

from __future__ import annotations

import json
import os
from typing import Any

from keepkv_sglang.hooks.checks import REPORTS, check_sampling_params, custom_params, reports
from keepkv_sglang.settings.config import ConfigError
from keepkv_sglang.start import flags

ENDPOINTS = frozenset(
    {
        "/v1/messages",
        "/v1/responses",
        "/v1/score",
        "/v1/rerank",
        "/v1/decisions",
        "/v1/systemone",
        os.environ.get("SGLANG_OLLAMA_CHAT_ROUTE", "/api/chat"),
        os.environ.get("SGLANG_OLLAMA_GENERATE_ROUTE", "/api/generate"),
    }
)
MARK = b"custom_params"


class CustomParams:
    """ASGI middleware. Bodies without the word custom_params pass unread."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in ENDPOINTS:
            await self.app(scope, receive, send)
            return
        body, messages = b"", []
        while True:
            message = await receive()
            messages.append(message)
            body += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body"):
                break

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        try:
            found = find(body)
        except ConfigError as error:
            await _refuse(send, str(error))
            return
        token = custom_params.set(found)
        try:
            await self.app(scope, replay, send)
        finally:
            custom_params.reset(token)


def find(body: bytes) -> Any:
    """custom_params of a JSON body: at its top level, or in Ollama's `options`. None: not there, or no JSON, about
    which the endpoint itself complains. Raises ConfigError where this server would refuse them."""
    from sglang.srt.entrypoints import http_server

    if MARK not in body:
        return None
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict):
        return None
    options = parsed.get("options")
    found = parsed.get("custom_params", options.get("custom_params") if isinstance(options, dict) else None)
    manager = http_server._global_state.tokenizer_manager
    check_sampling_params(manager.server_args, {"custom_params": found}, manager.tokenizer)
    return found


async def _refuse(send: Any, message: str) -> None:
    """HTTP 400 in the form that Anthropic's and OpenAI's clients read."""
    error = {"type": "invalid_request_error", "message": message, "code": 400}
    body = json.dumps({"type": "error", "error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def request_report(rid: str) -> Any:
    """GET /keepkv/requests/ID: meta_info["keepkv"] of an answer, for endpoints whose answers have no meta_info.

    ID is the answer's `id` (OpenAI endpoints, streams too) or meta_info["id"]; only who got the answer knows it.
    """
    from fastapi import HTTPException

    if rid not in reports:
        raise HTTPException(404, f"no finished request {rid[:80]!r} among the last {REPORTS} answers of this server")
    return reports[rid]


def before_run_http_server(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE http_server._setup_and_run_http_server: SGLang's authorisation is added later, and so runs first."""
    if not flags.config_of(server_args).enabled:
        return
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import AuthLevel, auth_level  # in the HTTP process alone, as the server itself

    http_server.app.add_middleware(CustomParams)
    http_server.app.add_api_route("/keepkv/requests/{rid}", request_report, methods=["GET"])
    # Our counters tell the sizes of others' prompts: with --admin-api-key they are the operator's (docs/security.md).
    for endpoint in (http_server.server_info, http_server.get_server_info):
        auth_level(AuthLevel.ADMIN_OPTIONAL)(endpoint)
