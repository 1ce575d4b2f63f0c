"""A running server as its operator reaches it over HTTP: `keepkv top`, `verify` and `inspect` ask through this.

httpx comes with openai, which SGLang brings.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import httpx

KEY = "KEEPKV_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")  # a proxy in the environment must not see these calls


class UnreachableError(ValueError):
    """Nothing at this address answers as an SGLang server does; the message says what to do."""


class OffError(ValueError):
    """An SGLang server without KeepKV."""


class RefusedError(ValueError):
    """The server does not allow this one request (HTTP 4xx); the message is its own."""


class WrongError(ValueError):
    """The server failed on a request (HTTP 5xx), or answered it otherwise than asked; the message says how."""


def add_api_key(parser: argparse.ArgumentParser) -> None:
    """The one option that every command with a URL has."""
    parser.add_argument("--api-key", default=os.environ.get(KEY), help=f"of the server (default: ${KEY})")


class Remote:
    """A server by its address, `http://` may be left out. api_key: of --api-key. timeout_s: for one answer."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600) -> None:
        """Sends nothing. Raises UnreachableError for what is no address."""
        self.url, self._timeout_s = (url if "://" in url else f"http://{url}").rstrip("/"), timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            proxied = httpx.URL(self.url).host not in LOCAL
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=proxied)
        except (httpx.InvalidURL, ValueError) as error:
            raise UnreachableError(f"no server answers at {url}: {error}") from None

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object that every SGLang server has. Raises UnreachableError."""
        try:
            answer = self._get(path).json()
        except ValueError as error:
            if isinstance(error, UnreachableError):
                raise
            raise UnreachableError(f"{self.url}{path} gave no JSON; is this the address of an SGLang server?") from None
        if not isinstance(answer, dict):
            raise UnreachableError(f"{self.url}{path} gave {type(answer).__name__}; is this an SGLang server?")
        return answer

    def text(self, path: str) -> str:
        """Raises UnreachableError."""
        return self._get(path).text

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """JSON, or text where the answer is none. Raises RefusedError, WrongError, UnreachableError."""
        answer = self._send("POST", path, json=dict(body))
        if not answer.is_success:
            kind = WrongError if answer.is_server_error else RefusedError
            raise kind(f"HTTP {answer.status_code} on {path}: {_message(answer)}")
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    def _get(self, path: str) -> httpx.Response:
        answer = self._send("GET", path)
        if not answer.is_success:
            raise UnreachableError(f"{self.url}{path} answered HTTP {answer.status_code}; is this an SGLang server?")
        return answer

    def _send(self, method: str, path: str, **rest: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **rest)
        except httpx.HTTPError as error:
            raise UnreachableError(f"no server answers at {self.url}: {self._reason(error)}") from None
        if answer.status_code in (401, 403):
            raise UnreachableError(f"the server at {self.url} wants its key: give --api-key")
        return answer

    def _reason(self, error: httpx.HTTPError) -> str:
        if isinstance(error, httpx.TimeoutException):
            return f"not within {self._timeout_s:.0f} s"
        return "connection refused" if "refused" in str(error) else str(error) or repr(error)


def keepkv_states(url: str, info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """KeepKV's part of a /server_info, one for each rank of data parallelism. Raises OffError."""
    states = [state["keepkv"] for state in info.get("internal_states") or () if "keepkv" in state]
    if not states:
        raise OffError(f"the server at {url} runs without KeepKV; start it with --enable-keepkv")
    return states


def _message(answer: httpx.Response) -> str:
    """What an error says, in one line."""
    try:
        error = answer.json()["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        text = answer.text
    return " ".join(text.split())[:300]
