"""The plain-CPU platform: when it is used, what it defaults, and that a server starts with no flags."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch

from keepkv_sglang.start import platform

CPU_ONLY = platform.decide().active
needs_plain_cpu = pytest.mark.skipif(not CPU_ONLY, reason="stock SGLang supports this machine")


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with no accelerator, no AMX and no wish of the user."""
    for name in ("KEEPKV_PLATFORM", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for name in ("xpu", "npu", "hpu", "mps"):
        absent = types.SimpleNamespace(is_available=lambda: False)
        monkeypatch.setattr(torch, name, absent, raising=False)
    return monkeypatch


def test_used_on_a_plain_cpu(plain_cpu: pytest.MonkeyPatch) -> None:
    assert platform.activate() == "keepkv_sglang.start.platform_cpu:KeepKVCpuPlatform"


def test_stays_out_of_the_way_of_cuda_and_rocm(plain_cpu: pytest.MonkeyPatch) -> None:
    plain_cpu.setattr(torch.cuda, "is_available", lambda: True)
    assert platform.activate() is None
    assert "CUDA" in platform.decide().reason
    plain_cpu.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in platform.decide().reason


@pytest.mark.parametrize("device", ["xpu", "npu", "hpu", "mps"])
def test_stays_out_of_the_way_of_other_devices(plain_cpu: pytest.MonkeyPatch, device: str) -> None:
    plain_cpu.setattr(getattr(torch, device), "is_available", lambda: True)
    assert platform.activate() is None
    assert device.upper() in platform.decide().reason


@pytest.mark.parametrize("cpu_build", [True, False])
def test_amx_counts_only_with_sglangs_cpu_kernels(plain_cpu: pytest.MonkeyPatch, cpu_build: bool) -> None:
    # The PyPI sgl_kernel is CUDA-only: AMX tiles alone do not make stock SGLang run.
    plain_cpu.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    plain_cpu.setitem(sys.modules, "sgl_kernel", types.ModuleType("sgl_kernel"))
    operators = types.SimpleNamespace(convert_weight_packed=None) if cpu_build else types.SimpleNamespace()
    plain_cpu.setattr(torch.ops, "sgl_kernel", operators, raising=False)
    assert (platform.activate() is None) == cpu_build


def test_the_user_can_turn_it_off(plain_cpu: pytest.MonkeyPatch) -> None:
    plain_cpu.setenv("KEEPKV_PLATFORM", "off")
    assert platform.activate() is None
    plain_cpu.setenv("KEEPKV_PLATFORM", "auto")
    assert platform.activate() is not None
    plain_cpu.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


def test_an_unknown_wish_is_an_error(plain_cpu: pytest.MonkeyPatch) -> None:
    plain_cpu.setenv("KEEPKV_PLATFORM", "cuda")
    with pytest.raises(ValueError, match="use 'auto'"):
        platform.activate()


def test_importing_it_imports_neither_torch_nor_sglang() -> None:
    code = "import sys, keepkv_sglang.start.platform; assert not {'torch', 'sglang'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@needs_plain_cpu
def test_sglang_chooses_it_through_the_entry_point() -> None:
    code = "from sglang.srt.platforms import current_platform as p; print(type(p).__name__, p.device_name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["KeepKVCpuPlatform", "cpu"], done.stderr[-2000:]
    off = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KEEPKV_PLATFORM": "off"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert off.stdout.split() == ["SRTPlatform", "unknown"], off.stderr[-2000:]


# ---- defaults


def _args(folder: Path, **changes: object) -> types.SimpleNamespace:
    values: dict[str, object] = dict(
        model_path=str(folder),
        dtype="auto",
        attention_backend="intel_amx",
        max_total_tokens=None,
        mem_fraction_static=None,
        chunked_prefill_size=None,
        max_running_requests=None,
        tp_size=1,
        dp_size=1,
        pp_size=1,
    )
    return types.SimpleNamespace(**{**values, **changes})


def _config(folder: Path, **changes: object) -> Path:
    # transformers' key for the dtype was torch_dtype until version 5
    config = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@needs_plain_cpu
def test_pool_is_sized_in_bytes_not_by_a_share_of_the_machine(tmp_path: Path) -> None:
    import sglang  # noqa: F401  SGLang resolves its platform while it is imported, as in a server

    # behind it, as in a server: this file imports SGLang's platform classes
    from keepkv_sglang.start.platform_cpu import KV_POOL_BYTES, cpu_defaults

    folder = _config(tmp_path, dtype="float32")
    # K and V x 3 layers x 2 kv heads x head_dim 16 x 4 bytes
    assert cpu_defaults(_args(folder))["max_total_tokens"] == KV_POOL_BYTES // (2 * 3 * 2 * 16 * 4)
    half = cpu_defaults(_args(folder, dtype="bfloat16", tp_size=2))
    assert half["max_total_tokens"] == KV_POOL_BYTES // (2 * 3 * 2 * 16 * 2 // 2)
    assert "max_total_tokens" not in cpu_defaults(_args(folder, mem_fraction_static=0.3))
    assert "max_total_tokens" not in cpu_defaults(_args(folder, max_total_tokens=999))


@needs_plain_cpu
@pytest.mark.parametrize(
    ("native", "checkpoint", "expected"),
    [
        (False, "bfloat16", "float32"),
        (False, "float32", "float32"),
        (True, "bfloat16", None),
        (True, "float32", "float32"),
        (True, "float16", "float32"),
    ],
)
def test_float32_unless_the_cpu_multiplies_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, checkpoint: str, expected: str | None
) -> None:
    from keepkv_sglang.start import platform_cpu  # imports SGLang, which resolves its platform then

    monkeypatch.setattr(platform_cpu, "has_native_bfloat16", lambda: native)
    folder = _config(tmp_path, torch_dtype=checkpoint)
    assert platform_cpu.cpu_defaults(_args(folder)).get("dtype") == expected
    assert "dtype" not in platform_cpu.cpu_defaults(_args(folder, dtype="float16"))


@needs_plain_cpu
def test_sglang_resolves_them_and_the_user_wins(model_path: Path) -> None:
    code = """
import json, sys
from sglang.srt.server_args import ServerArgs
from sglang.srt.arg_groups.overrides import resolution_result
out = []
for extra in ({}, dict(dtype="bfloat16", mem_fraction_static=0.3, chunked_prefill_size=512,
                       max_running_requests=4, attention_backend="flex_attention")):
    args = ServerArgs(model_path=sys.argv[1], **extra)
    args.resolve_once()
    names = ("device dtype attention_backend sampling_backend mem_fraction_static chunked_prefill_size "
             "max_running_requests max_total_tokens sleep_on_idle").split()
    out.append({name: resolution_result(args, name) for name in names})
print(json.dumps(out))
"""
    command = [sys.executable, "-c", code, str(model_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, chosen = json.loads(done.stdout.splitlines()[-1])
    assert plain == {
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "mem_fraction_static": 0.8,
        "chunked_prefill_size": 2048,
        "max_running_requests": 256,
        "max_total_tokens": (4 << 30) // (2 * 30 * 3 * 64 * 4),
        "sleep_on_idle": True,
    }
    assert (chosen["dtype"], chosen["mem_fraction_static"]) == ("bfloat16", 0.3)
    assert (chosen["chunked_prefill_size"], chosen["max_running_requests"]) == (512, 4)
    assert (chosen["attention_backend"], chosen["max_total_tokens"]) == ("flex_attention", None)


# ---- a real server


@pytest.mark.server
@needs_plain_cpu
def test_a_server_starts_with_no_flags_and_answers(model_path: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    command = [
        sys.executable,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(model_path),
        "--port",
        str(port),
    ]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # processes spawned (conftest.py)
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, log)
        body = {
            "text": "The capital of France is",
            "sampling_params": {"max_new_tokens": 3, "temperature": 0},
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            assert "Paris" in json.load(response)["text"]
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer in {seconds:.0f} s:\n{log.read_text()[-3000:]}")


@pytest.mark.parametrize(
    ("ranks", "cores", "shares"),
    [(1, {0, 1}, None), (2, {0, 1}, "0|1"), (2, {0, 1, 4, 5}, "0,4|1,5"), (3, {2, 3}, "2|3|2")],
)
def test_ranks_share_the_cores_of_this_process(monkeypatch, ranks, cores, shares) -> None:
    """SGLang itself wants a NUMA node for each, and says so a minute later."""
    from keepkv_sglang.start import platform_cpu  # imports SGLang, which resolves its platform then

    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: cores)
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    platform_cpu.bind_ranks(ranks)
    assert (os.environ["SGLANG_CPU_OMP_THREADS_BIND"] or None) == shares
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "7|8|9|10")
    platform_cpu.bind_ranks(ranks)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "7|8|9|10", "the user's choice stays"
