"""SGLang's requests and what we know of each: its settings are resolved once, when it arrives.

The state hangs on SGLang's own Req, so it lives exactly as long. Nothing here imports SGLang: a Req is what has the
attributes that are read.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable
from typing import Any

from keepkv_sglang.runtime.configurations import Configurations
from keepkv_sglang.runtime.counters import Counters
from keepkv_sglang.settings.config import ConfigError, KeepKVConfig
from keepkv_sglang.settings.values import shown
from keepkv_sglang.turn.eligibility import NotCompressed, why_not
from keepkv_sglang.turn.limits import Limits, Row
from keepkv_sglang.turn.protection import Protection
from keepkv_sglang.turn.state import RequestState

logger = logging.getLogger("keepkv")

STATE = "keepkv"  # attribute of SGLang's Req: its RequestState, or None
OFF = "keepkv_off"  # attribute of SGLang's Req: its NotCompressed, where STATE is None
REQUEST_KEY = "keepkv"  # key in sampling_params.custom_params


def known_state(req: Any) -> RequestState | None:
    """The state of a request that has arrived; None where it has none, or was never seen."""
    state: RequestState | None = getattr(req, STATE, None)
    return state


def row_of(req: Any) -> Row:
    """What the request asks of its next row."""
    return Row(req.origin_input_ids, len(req.full_untruncated_fill_ids), req.prefix_len)


def logical_tokens(req: Any) -> array[int]:
    """All token ids of a request in logical order: prompt, then what was generated up to the stop."""
    tokens: array[int] = req.origin_input_ids + req.output_ids_through_stop
    return tokens


class Requests:
    """What the hooks and the prefix cache (radix/adapter/requests.py) ask about requests.

    cached(): fingerprints of the configurations that cached spans have.
    """

    known_state = staticmethod(known_state)
    tokens_of = staticmethod(logical_tokens)

    def __init__(
        self,
        config: KeepKVConfig,
        limits: Limits,
        counters: Counters,
        pressure_key: str | None,
        cached: Callable[[], Iterable[str]],
    ) -> None:
        self.config, self.limits, self.counters, self.pressure_key = config, limits, counters, pressure_key
        self.configurations = Configurations(config.configurations, config.fingerprint(), cached)

    def state_of(self, req: Any) -> RequestState | None:
        """The request's state, or None when nothing of it is ever merged; `not_compressed` then says why.

        Resolved once, when the request arrives (hooks/admission.py). Raises ConfigError, that one time, for settings
        that the front end did not refuse.
        """
        if not hasattr(req, STATE):
            setattr(req, STATE, None)
            setattr(req, OFF, NotCompressed("settings", self.config.budget))
            self._resolve(req)
        return known_state(req)

    def _resolve(self, req: Any) -> None:
        config = self._config_of(req)
        reason = why_not(req, config)
        if reason is not None:
            setattr(req, OFF, NotCompressed(reason, config.budget))
            return
        namespace = (req.extra_key, req.cache_salt, req.lora_id, config.fingerprint())
        protection = self.protection_of(config, req.origin_input_ids)
        state = RequestState(config, namespace, len(req.origin_input_ids), protection)
        self.configurations.admit(namespace[-1], state)
        setattr(req, STATE, state)

    def _config_of(self, req: Any) -> KeepKVConfig:
        """Flags with the request's own values. Raises ConfigError."""
        params = req.sampling_params.custom_params if req.sampling_params is not None else None
        if params is not None and not isinstance(params, dict):
            raise ConfigError(f"custom_params must be an object, not {shown(params)}")
        return self.config.with_request((params or {}).get(REQUEST_KEY))

    def not_compressed(self, req: Any) -> NotCompressed:
        """Why this request has no state."""
        off: NotCompressed = getattr(req, OFF)
        return off

    def protection_of(self, config: KeepKVConfig, prompt: Any) -> Protection:
        """What this configuration marks in a prompt (array('q') of token ids)."""
        return Protection.of(config.protect, config.fair, prompt, self.limits.border)

    def too_long(self, req: Any) -> bool:
        """Whether the request's tokens cannot all be in the pool at once: then it is compressed between chunks. Where
        its history is streamed they need not be."""
        if (state := known_state(req)) is not None and state.streamed:
            return False
        return self.limits.too_long(len(req.origin_input_ids) + len(req.output_ids))

    def note_published(self) -> None:
        """The cache has one more span of a request."""
        self.counters.published += 1

    def mispublished(self, req: Any, why: str) -> bool:
        """False, counted and logged: what would have been published does not agree with what SGLang says."""
        self.counters.mispublished += 1
        logger.error("nothing of request %s is published: %s", shown(str(req.rid)), why)  # a client may choose it
        return False
