"""Chat messages as token pieces: what a client's next request adds to the last one, and where a reply lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keepkv_sglang.tools.evaluate.probe import Probe

Message = Mapping[str, str]


def message(role: str, content: str) -> Message:
    """One chat message."""
    return {"role": role, "content": content}


def rendered(probe: Probe, messages: Sequence[Message], reply_follows: bool = False) -> str:
    """The chat template's text."""
    return probe.tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=False, add_generation_prompt=reply_follows
    )


def pieces(probe: Probe, parts: Sequence[tuple[Sequence[Message], bool]]) -> list[list[int]]:
    """Token ids of each part: (messages, does a reply follow?); each is rendered behind all before it. With a reply
    that follows, the template's opening of that reply belongs to the part. ValueError for a template that writes
    earlier messages differently once others follow: such a chat cannot be cut."""
    made: list[list[int]] = []
    before = ""
    messages: list[Message] = []
    for more, reply_follows in parts:
        messages += more
        text = rendered(probe, messages, reply_follows)
        if not text.startswith(before):
            raise ValueError(f"the chat template of {probe.path} rewrites earlier messages: use another model")
        made.append(probe.ids(text[len(before) :]))
        before = text
    return made


def end_tokens(probe: Probe) -> list[int]:
    """Tokens that end a reply."""
    tokenizer = probe.tokenizer
    after = rendered(probe, [message("user", "KEEPKV")]).rpartition("KEEPKV")[2]
    return [i for i in {tokenizer.eos_token_id, *probe.ids(after)[:1]} if i is not None]
