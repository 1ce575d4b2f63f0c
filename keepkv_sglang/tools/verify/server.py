"""A running server, reached over HTTP: what it is, and one answer with its log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

TOP = 20  # so many of the most probable tokens come with each place
LOCAL = ("127.0.0.1", "localhost", "::1")  # a proxy in the environment must not see these calls
LogProbs = dict[int, float]


class UnreachableError(Exception):
    """No server there, or none with KeepKV; the message says what to do."""


class RefusedError(Exception):
    """The server does not allow this one request; the message is its own."""


class WrongError(Exception):
    """The server failed on a request, or did not answer it in the way that was asked for; the message says how."""


@dataclass(frozen=True)
class Answer:
    """ids: generated tokens. top: in the place of each the log-probabilities of the TOP most probable ones and of
    itself. given: log-probabilities of the prompt's tokens from where they were asked for; given_top: in the place of
    each those of the TOP. cached: prompt tokens found in the prefix cache. keepkv: meta_info["keepkv"]."""

    ids: list[int]
    top: list[LogProbs]
    given: list[float]
    given_top: list[LogProbs]
    cached: int
    keepkv: Mapping[str, Any]


class Server:
    """info: /server_info. keepkv: its part of KeepKV, of the first scheduler."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600) -> None:
        """Raises UnreachableError."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            proxied = httpx.URL(url).host not in LOCAL
            self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=proxied)
            found = self._http.get("/server_info")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UnreachableError(f"no server answers at {url}: {error}") from error
        if found.status_code in (401, 403):
            raise UnreachableError(f"{url} wants another key: give --api-key")
        try:
            self.info: dict[str, Any] = found.raise_for_status().json()
            states = self.info["internal_states"]
        except (httpx.HTTPStatusError, ValueError, TypeError, KeyError) as error:
            raise UnreachableError(f"what answers at {url} is no SGLang server: {error!r}") from error
        if not states or "keepkv" not in states[0]:
            raise UnreachableError(f"the server at {url} runs without KeepKV: start it with --enable-keepkv")
        self.keepkv: dict[str, Any] = states[0]["keepkv"]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def tokens(self, **what: Any) -> list[int]:
        """Token ids of a `prompt`, or of `messages` as the chat template renders them. Raises RefusedError."""
        ids: list[int] = self._post("/tokenize", what)["tokens"]
        return ids

    def generate(
        self, ids: Sequence[int], new: int, settings: Mapping[str, Any], namespace: str, given: int = 0
    ) -> Answer:
        """Greedy, exactly `new` tokens. settings: the request's own. namespace: of the prefix cache. given: of so many
        tokens at the prompt's end the log-probabilities are asked for. Raises RefusedError, WrongError."""
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        body = {
            "input_ids": list(ids),
            "sampling_params": {**sampling, "custom_params": {"keepkv": dict(settings)}},
            "extra_key": namespace,
            "return_logprob": True,
            "top_logprobs_num": TOP,
            # SGLang says nothing of the first token from there on
            "logprob_start_len": len(ids) - given - 1 if given else -1,
        }
        if self.info.get("dp_size", 1) > 1:
            body["routed_dp_rank"] = 0  # each rank has a prefix cache of its own
        return _answer(self._post("/generate", body))

    def flush(self) -> None:
        """Empties the prefix cache, for everybody. Raises RefusedError while requests run."""
        self._post("/flush_cache", {})

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            answer = self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise UnreachableError(f"the server does not answer {path} any more: {error!r}") from error
        if not answer.is_success:
            kind = WrongError if answer.is_server_error else RefusedError
            raise kind(f"HTTP {answer.status_code} on {path}: {_message(answer)}")
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


def _answer(data: Mapping[str, Any]) -> Answer:
    meta = data["meta_info"]
    top = [
        {own[1]: own[0], **_log_probs(best)}
        for own, best in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
    ]
    given = [entry[0] for entry in meta.get("input_token_logprobs") or () if entry[0] is not None]
    given_top = [_log_probs(best) for best in meta.get("input_top_logprobs") or () if best]
    return Answer(data["output_ids"], top, given, given_top, meta["cached_tokens"], meta["keepkv"])


def _log_probs(entries: Sequence[Sequence[Any]]) -> LogProbs:
    return {token: value for value, token, _ in entries}


def _message(answer: httpx.Response) -> str:
    """What an error says, in one line."""
    try:
        error = answer.json()["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        text = answer.text
    return " ".join(text.split())[:300]
