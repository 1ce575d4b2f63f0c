"""A tokenizer that needs no file. transformers is imported where it is used: start-up cost."""

from __future__ import annotations

from typing import Any


def byte_tokenizer(special: list[str], template: str) -> Any:
    """One token per byte, and the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special)
    made.chat_template = template
    return made
