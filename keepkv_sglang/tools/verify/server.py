"""What `keepkv verify` asks of a running server: one answer with its log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keepkv_sglang.tools.remote import Remote, keepkv_states

TOP = 20  # so many of the most probable tokens come with each place
LogProbs = dict[int, float]


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

    def __init__(self, remote: Remote) -> None:
        """Raises UnreachableError, OffError."""
        self._remote = remote
        self.info = remote.get("/server_info")
        self.keepkv = keepkv_states(remote.url, self.info)[0]

    def tokens(self, **what: Any) -> list[int]:
        """Token ids of a `prompt`, or of `messages` as the chat template renders them. Raises RefusedError."""
        ids: list[int] = self._remote.post("/tokenize", what)["tokens"]
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
        return _answer(self._remote.post("/generate", body))

    def flush(self) -> None:
        """Empties the prefix cache, for everybody. Raises RefusedError while requests run."""
        self._remote.post("/flush_cache", {})


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
