"""Tiny random models of several families, made when a test asks for them.

Together they have: attention biases, norms of q and k, head sizes from 64 to 256, five kinds of rotary embedding, one
of them on a part of the head, tied and untied heads, one and several query heads per kv head. transformers is imported
where it is used: start-up cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 1024
SHAPE = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 3, "intermediate_size": 256, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
THETA = {"rope_theta": 10_000.0}


def shape(heads: int, kv_heads: int, dim: int, **more: Any) -> dict[str, Any]:
    heads_ = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    return {**heads_, "hidden_size": heads * dim, **more}


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512, **THETA,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, **THETA}
FAMILIES = {
    "Llama": shape(4, 2, 64, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "Qwen2": shape(6, 2, 64, rope_parameters=YARN, tie_word_embeddings=True),
    "Qwen3": shape(4, 2, 128, hidden_size=256, rope_parameters={"rope_type": "default", **THETA}),
    "Mistral": shape(4, 1, 80, rope_parameters={"rope_type": "linear", "factor": 2.0, **THETA}, sliding_window=None),
    # At the top of config.json, as checkpoints have it: SGLang does not read it in rope_parameters.
    "Phi3": shape(4, 4, 96, partial_rotary_factor=0.5, rope_parameters={"rope_type": "default", **THETA}),
    # The exact GELU, which is SGLang's Gemma whatever config.json names. transformers turns "gelu" into the tanh one.
    "Gemma": shape(
        2, 1, 256, hidden_size=256, hidden_act="gelu_python", rope_parameters={"rope_type": "default", **THETA}
    ),
    "Olmo2": shape(2, 2, 128, rope_parameters={"rope_type": "default", **THETA}),
}


def build(family: str, folder: Path) -> None:
    """Writes the family's model, without a tokenizer, into `folder`."""
    import transformers

    torch.manual_seed(7)
    given = {**SHAPE, **FAMILIES[family], "initializer_range": 0.08}
    config = getattr(transformers, f"{family}Config")(**given)
    changed = {key: getattr(config, key) for key, value in given.items() if getattr(config, key) != value}
    assert not changed, f"transformers changed {changed}"
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    for name, parameter in model.named_parameters():  # biases and norms are 0 and 1 otherwise
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
