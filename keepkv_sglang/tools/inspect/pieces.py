"""The text of each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def pieces(model: str | Path, tokens: Sequence[int]) -> list[str]:
    """One text per token; joined, they are the whole text. A token that ends in the middle of a character is "", and
    the character belongs to the token that completes it. ValueError for a model without a tokenizer."""
    from tokenizers.decoders import DecodeStream  # start-up cost, as the next one
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {model}: name the model's folder with --model ({error})") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"the tokenizer of {model} has no fast form, which says where each token's text ends")
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(backend, token) or "" for token in tokens]
