"""Where the first message ends, on the real template and on hand-made token lists."""

from __future__ import annotations

from array import array

import pytest

from keepkv_sglang.turn.anchor import MessageBorder, first_message_end, message_border

BORDER = MessageBorder(token=2, trailing=4)


def test_border_of_the_demo_model(model_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    border = message_border(tokenizer)
    assert border is not None and tokenizer.decode([border.token]) == "<|im_end|>"
    # "\n<|im_start|>assistant\n"
    assert border.trailing == len(tokenizer.encode("\n<|im_start|>assistant\n"))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    end = first_message_end(ids, border)
    assert tokenizer.decode(ids[:end]) == "<|im_start|>system\nBe brief.<|im_end|>"


def test_no_template_no_border():
    class Bare:
        chat_template = None

    class Broken:
        chat_template = "x"
        all_special_ids = (2,)

        def apply_chat_template(self, *_args, **_kwargs):
            raise RuntimeError("template error")

    assert message_border(None) is None and message_border(Bare()) is None and message_border(Broken()) is None


@pytest.mark.parametrize(
    ("tokens", "end"),
    [
        ([5, 6, 7], 0),  # no border
        ([5, 6, 2], 0),  # one message
        ([5, 6, 2, 1, 1, 1, 1], 0),  # one message and the generation prompt
        ([5, 6, 2, 1, 1, 1, 1, 9], 3),  # an open second message
        ([5, 6, 2, 8, 9, 9, 2, 1, 1, 1, 1], 3),
    ],
)
def test_first_message_end(tokens, end):
    assert first_message_end(tokens, BORDER) == first_message_end(array("q", tokens), BORDER) == end
    assert first_message_end(tokens, None) == 0
