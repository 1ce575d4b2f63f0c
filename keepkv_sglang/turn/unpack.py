"""How much of a prompt is read over its originals: decided by counts, so that tensor-parallel ranks agree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matched:
    """What the prefix cache has of a prompt, in logical tokens.

    uncompressed: tokens [0, uncompressed) have a slot each in SGLang's tree. tokens: the match ends here. whole_from:
    from here to the end each token has a slot that nothing was merged into. compressed: some have not.
    """

    uncompressed: int
    tokens: int
    whole_from: int
    compressed: bool


class Incomplete(Exception):
    """The match is compressed, and the originals of some of its tokens are gone."""


def history(matched: Matched, archived: int, prompt_tokens: int, queries: int) -> int | None:
    """Tokens [0, history) of a prompt that are read as originals instead of the match; None: the match stays as it is.

    archived: tokens [0, archived) of the prompt have originals. queries: so many tokens before the last one are
    computed in any case, since a compression is scored with their queries; of a short history that may be all behind
    the uncompressed part. A prompt with nothing new but its last token, such as a parallel sample, keeps the match.
    Raises Incomplete where originals would have been wanted.
    """
    if matched.tokens >= prompt_tokens - 1:
        return None
    if archived <= matched.tokens and not matched.compressed:
        return None
    if archived < matched.whole_from:
        raise Incomplete
    end = max(min(max(archived, matched.tokens), prompt_tokens - 1 - queries), matched.uncompressed)
    return end if matched.compressed or end > matched.tokens else None
