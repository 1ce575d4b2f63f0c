"""One small conversation: a prompt, its reply, and a next turn behind both, asked for under different settings.

The user's message says the same sentence many times. There votes matter most: what is merged are copies, so one slot
can stand for all of them, and without votes what was said fifty times weighs as much as what was said once.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from keepkv_sglang.tools.remote import RefusedError
from keepkv_sglang.tools.verify.server import Answer, Server

SYSTEM = "You keep the log of a harbour. Answer in one short sentence, from what the user has told you."
SAID = "The keeper lights the lamp at dusk.\n"
TIMES = 50  # SAID is said so often, more where the server leaves prompts of that length whole
TIMES_AGAIN = 10  # in the next turn
REPLY = 8  # tokens
FULL: Mapping[str, Any] = {"enabled": False}


class Talk:
    """The conversation on one server. Each run has namespaces of the prefix cache of its own, so it finds nothing of
    anybody's, and nobody finds anything of it."""

    def __init__(self, server: Server) -> None:
        """Raises RefusedError, and ValueError where the server has no room for it."""
        self.server, self.run = server, uuid.uuid4().hex[:8]
        once = len(self._plain(SAID))
        self.prompt = self._rendered(max(TIMES, -(-2 * int(server.keepkv["config"]["min_tokens"]) // once)))
        self.next = self._plain("\n" + SAID * TIMES_AGAIN)
        most = min(int(server.keepkv["total_slots"]), int(server.info.get("max_req_input_len") or 1 << 40))
        needed = len(self.prompt) + REPLY + len(self.next)
        if needed > most:
            raise ValueError(
                f"the conversation has {needed} tokens, and the server takes {most}: a larger pool is needed"
            )

    def first(self, settings: Mapping[str, Any], namespace: str) -> Answer:
        """The prompt and a reply."""
        return self.server.generate(self.prompt, REPLY, settings, self._name(namespace))

    def second(self, settings: Mapping[str, Any], namespace: str) -> Answer:
        """The next turn: log-probabilities of its tokens. The reply before it is the full cache's, whatever the
        settings answered, so that all read the same."""
        history = [*self.prompt, *self.full.ids]
        return self.server.generate(
            [*history, *self.next], 1, settings, self._name(namespace), given=len(self.next) - 1
        )

    @cached_property
    def full(self) -> Answer:
        """The prompt with KeepKV off, cold."""
        return self.first(FULL, "off")

    @cached_property
    def full_next(self) -> Answer:
        """The next turn with KeepKV off."""
        _ = self.full  # its prompt is in the cache first
        return self.second(FULL, "off")

    def _name(self, namespace: str) -> str:
        return f"keepkv-verify-{self.run}-{namespace}"

    def _plain(self, text: str) -> list[int]:
        return self.server.tokens(prompt=text, add_special_tokens=False)

    def _rendered(self, times: int) -> list[int]:
        """As a chat, so that there is a first message that stays uncompressed; as plain text without a template."""
        said = SAID * times
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}]
        for chat in (messages, [{"role": "user", "content": f"{SYSTEM}\n{said}"}]):
            try:
                return self.server.tokens(messages=chat)
            except RefusedError:
                continue  # a template may know no system message, and a base model has none
        return self._plain(f"{SYSTEM}\n\n{said}")
