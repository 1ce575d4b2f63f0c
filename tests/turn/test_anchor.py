"""Where the first message ends, on the real template and on hand-made token lists."""

from __future__ import annotations

from array import array

import pytest

from keepkv_sglang.turn.anchor import MessageBorder, first_message_end, message_border
from tests.support.tokenizer import byte_tokenizer

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


# Written for this test after the published formats: what stands between messages, and where a system message goes.
TEMPLATES = {
    "llama 3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "<s>{% set ns = namespace(first='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.first = m.content + '\n\n' %}{% elif m.role == 'user' %}[INST] {{ ns.first + m.content }}[/INST]"
        "{% set ns.first = '' %}{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        "<s>[INST] Be brief.\n\nHello[/INST]",
    ),
    "gemma": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos><start_of_turn>user\nHello<end_of_turn>",
    ),
    "phi": (
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|system|>\nBe brief.<|end|>",
    ),
    "deepseek": (
        ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"],
        "<|begin|>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}",
        "<|begin|>Be brief.<|User|>",
    ),
    "chatml": (
        ["<|im_start|>", "<|im_end|>"],
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>system\nBe brief.<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_first_message_of_common_templates(name):
    special, template, first = TEMPLATES[name]
    tokenizer = byte_tokenizer(special, template)
    border = message_border(tokenizer)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "More"},
    ]

    def tokens(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)

    chat = chat[1:] if name == "gemma" else chat
    ids = tokens(chat)
    assert tokenizer.decode(ids[: first_message_end(ids, border)]) == first
    # A single message is what should be compressed: at most what opens it stays.
    alone = tokens([{"role": "user", "content": "Hello, and a long text"}])
    assert "Hello" not in tokenizer.decode(alone[: first_message_end(alone, border)])


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
