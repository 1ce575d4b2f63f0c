"""What the cache asks about requests. runtime/requests.py answers; the cache itself knows nothing of the runtime."""

from __future__ import annotations

from array import array
from typing import Any, Protocol

import torch


class Protected(Protocol):
    """What a request marks (turn/protection.py)."""

    def keyed(self, tokens: array[int]) -> array[int]:
        """`tokens`, from position 0 on, with their marks (radix/marks.py)."""
        ...

    def touches(self, start: int, end: int) -> bool:
        """Whether any token of [start, end) is marked."""
        ...


class State(Protocol):
    """A request that may be compressed."""

    admitted: bool
    anchor_len: int

    @property
    def namespace(self) -> tuple[Any, ...]:
        """extra_key, cache_salt, lora_id, fingerprint of its settings."""
        ...

    @property
    def protection(self) -> Protected: ...


class HostSide(Protocol):
    """Originals in host memory (runtime/unpack.py)."""

    def load(self, req: Any) -> tuple[int, Any] | None:
        """Fills slots of the request's own: (tokens, the node that its shared part ends with); None: there is no
        room."""
        ...

    def slots_of(self, req: Any) -> torch.Tensor | None:
        """These slots, int64, until its row has them."""
        ...

    def reset(self) -> None:
        """Everything cached is forgotten."""
        ...


class Requests(Protocol):
    """pressure_key: last part of the namespace of what may be merged under pressure; None: nothing is."""

    pressure_key: str | None

    def state_of(self, req: Any) -> State | None:
        """None for a request that is never compressed."""
        ...

    def known_state(self, req: Any) -> State | None:
        """The same of a request that may not have arrived yet."""
        ...

    def tokens_of(self, req: Any) -> array[int]:
        """All its token ids, up to the stop."""
        ...

    def note_published(self) -> None:
        """The cache has one more span of a request."""
        ...

    def mispublished(self, req: Any, why: str) -> bool:
        """False; counted and logged."""
        ...
