"""Where a prompt's first message ends: the part a request never compresses.

The border is the chat template's end-of-message token, found once by rendering a tiny conversation. A prompt whose
first message is also its last has no anchor: a single long message is what should be compressed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("keepkv")


@dataclass(frozen=True)
class MessageBorder:
    """token: the id that ends a message; trailing: tokens the template puts behind the last message's border."""

    token: int
    trailing: int


def message_border(tokenizer: Any) -> MessageBorder | None:
    """Reads the border off the tokenizer's chat template; None when there is no template or no such token."""
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return None
    marker = "KEEPKV"
    messages = [{"role": "user", "content": marker}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        after = text[text.rindex(marker) + len(marker) :]
        ids = tokenizer.encode(after, add_special_tokens=False)
    except Exception as error:  # templates are programs of third parties: any failure means "no border known"
        logger.info("No message border found in the chat template (%s); prompts have no anchor of their own", error)
        return None
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}) or {})
    for index, token in enumerate(ids):
        if token in special:
            return MessageBorder(token, len(ids) - index - 1)
    return None


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
