"""A GGUF file becomes a Hugging Face folder: float32 safetensors, tokenizer, chat template.

torch and transformers are imported where they are used: a folder that exists needs neither.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.models.say import ModelError, say


def convert(source: Path, folder: Path, end_of_turn: str | None) -> None:
    """De-quantises `source` into `folder`. end_of_turn: the token that ends a chat message; None: the file's own eos.

    ModelError without what reads GGUF files, or for an architecture that transformers cannot convert.
    """
    if missing := [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]:
        raise ModelError(f"Converting a GGUF file needs {', '.join(missing)}: pip install accelerate gguf")
    say("loading torch and transformers")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        say("reading the tokenizer")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        say("de-quantising the weights to float32")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
    # What transformers raises: for an architecture, a quantisation and metadata that it does not know.
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ModelError(f"transformers cannot convert {source.name}: {error}") from error
    # The weights are plain float32 now; with the GGUF note left in, transformers refuses to save them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    if end_of_turn is not None:
        tokenizer.eos_token = end_of_turn
        assert isinstance(tokenizer.eos_token_id, int) and tokenizer.chat_template
    # Said in both places that servers read.
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    say("writing safetensors")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes private files; a cache may be shared
