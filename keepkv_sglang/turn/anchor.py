"""Where a prompt's first message ends: the part a request never compresses.

The border is the special token behind a message, found once by rendering a tiny conversation. A prompt whose
first message is also its last has no anchor: a single long message is what should be compressed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("keepkv")


@dataclass(frozen=True)
class MessageBorder:
    """token: the id that ends a message; trailing: tokens the template puts behind the last message's border."""

    token: int
    trailing: int


def message_border(tokenizer: Any) -> MessageBorder | None:
    """Reads the border off the tokenizer's chat template; None when there is no template or no such token.

    It is the first special token behind a system message, which ends it or, as in DeepSeek's, opens the next message;
    behind a user message where the template has no system message.
    """
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return None
    system, user = "KEEPKV one", "KEEPKV two"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        try:
            text = _rendered(tokenizer, messages)
        except Exception:  # such as Gemma's, which raises for a system message
            text = _rendered(tokenizer, messages[1:])
        opening = _tokens_behind(tokenizer, text, user)
        ids = _tokens_behind(tokenizer, text, system) if 0 <= text.find(system) < text.find(user) else opening
    except Exception as error:  # templates are programs of third parties: any failure means "no border known"
        logger.info("No message border found in the chat template (%s); prompts have no anchor of their own", error)
        return None
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}) or {})
    border = next((token for token in ids if token in special), None)
    if border is None:
        return None
    return MessageBorder(border, len(opening) - opening.index(border) - 1 if border in opening else 0)


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _tokens_behind(tokenizer: Any, text: str, content: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text[text.rindex(content) + len(content) :], add_special_tokens=False)
    return ids


def first_message_end(tokens: Sequence[int], border: MessageBorder | None) -> int:
    """Number of tokens up to and including the first border, or 0 when no second message follows it.

    tokens: an array('q') or list of token ids; O(n) in C through index(). An open second message counts: what follows
    only has to be more than the generation prompt.
    """
    if border is None:
        return 0
    try:
        end = tokens.index(border.token) + 1
    except ValueError:
        return 0
    return end if len(tokens) - end > border.trailing else 0
