"""How many different settings requests may use at the same time: each is a namespace of the prefix cache.

Settings are alive while a request with them lives or a cached span has them. The server's own are always admitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakSet

from keepkv_sglang.settings.config import ConfigError
from keepkv_sglang.turn.state import RequestState


class Configurations:
    """Fingerprints of settings (KeepKVConfig.fingerprint) that are alive.

    limit: most of them at once. cached(): fingerprints that cached spans have; asked only when the limit is reached.
    """

    def __init__(self, limit: int, own: str, cached: Callable[[], Iterable[str]]) -> None:
        self.limit, self.own = limit, own
        self.refused = 0
        self._cached = cached
        self._alive: dict[str, WeakSet[RequestState]] = {}

    def __len__(self) -> int:
        return len(self._alive)

    def admit(self, fingerprint: str, state: RequestState) -> None:
        """Counts a request. Raises ConfigError where its settings would be one too many."""
        if fingerprint not in self._alive:
            if len(self._alive) >= self.limit and fingerprint != self.own:
                self._forget_dead()
                if len(self._alive) >= self.limit:
                    self.refused += 1
                    raise ConfigError(
                        f"keepkv: {self.limit} different settings are in use, as many as this server allows at once; "
                        "use the server's own (leave keepkv out), those of earlier requests, or start it with a larger "
                        "--keepkv-configurations"
                    )
            self._alive[fingerprint] = WeakSet()
        self._alive[fingerprint].add(state)

    def _forget_dead(self) -> None:
        cached = set(self._cached())
        for fingerprint in [f for f, states in self._alive.items() if not states and f not in cached]:
            del self._alive[fingerprint]
