"""Where a prompt's first message ends: the part a request never compresses (DESIGN.md, "Anchor").

The border is the chat template's end-of-message token, found once by rendering a tiny conversation. A prompt whose
first message is also its last (no second border) has no anchor: a single long message is what should be compressed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("keepkv")


def end_of_message_token(tokenizer: Any) -> int | None:
    """Token id that ends a message in the tokenizer's chat template, or None when there is none to find."""
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return None
    marker = "KEEPKV"
    messages = [
        {"role": "user", "content": marker},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        after = text[text.index(marker) + len(marker) :]
        ids = tokenizer.encode(after, add_special_tokens=False)
    except Exception as error:  # templates are programs of third parties: any failure means "no border known"
        logger.info("No message border found in the chat template (%s); prompts have no anchor of their own", error)
        return None
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}) or {})
    return next((token for token in ids if token in special), None)


def first_message_end(tokens: Sequence[int], border: int | None) -> int:
    """Number of tokens up to and including the first border, or 0 without a second one behind it.

    tokens: an array('q') or list of token ids; O(n) in C through index().
    """
    if border is None:
        return 0
    try:
        first = tokens.index(border)
        tokens.index(border, first + 1)
    except ValueError:
        return 0
    return first + 1
