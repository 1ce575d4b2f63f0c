"""--attention-backend beside --enable-keepkv: ours by hardware, and a forced one that cannot run is an error."""

from __future__ import annotations

import argparse
import logging
from types import SimpleNamespace

import pytest
import torch

from keepkv_sglang.runtime import attach, process
from keepkv_sglang.settings.config import ConfigError, KeepKVConfig
from keepkv_sglang.start import flags, seams
from keepkv_sglang.start.seams import Seam


def chosen(**values):
    flags._choose_backends(values)
    return values["attention_backend"]


@pytest.mark.parametrize("wish", [None, "auto"])
@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "keepkv_cpu"), ("cuda", "keepkv_triton"), ("cuda:1", "keepkv_triton")]
)
def test_hardware_chooses(device, backend, wish):
    values = {"device": device, "attention_backend": wish}
    flags._choose_backends(values)
    assert values["attention_backend"] == backend
    assert values["radix_cache_backend"] == "keepkv"


def test_a_gpu_backend_says_that_no_server_ran(caplog):
    with caplog.at_level(logging.WARNING, "keepkv"):
        assert chosen(device="cuda", attention_backend="keepkv_flashinfer") == "keepkv_flashinfer"
    assert "No server with keepkv_flashinfer has run on a GPU" in caplog.text and "scripts/gpu_check.sh" in caplog.text
    caplog.clear()
    chosen(device="cpu")
    chosen(device="cuda")  # servers with keepkv_triton have run
    assert not caplog.text


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [
        ("cpu", "keepkv_triton", "runs on cuda devices.*device is cpu; leave it out or use keepkv_cpu"),
        ("cpu", "keepkv_flashinfer", "runs on cuda devices"),
        ("cuda", "keepkv_cpu", "runs on cpu devices.*keepkv_triton or keepkv_flashinfer"),
        ("cuda", "fa3", "cannot weight attention by votes; leave it out or use keepkv_triton"),
        ("cpu", "torch_native", "cannot weight attention by votes; leave it out or use keepkv_cpu"),
        ("xpu", None, "no attention backend for xpu"),
    ],
)
def test_what_cannot_run_is_refused(device, backend, message):
    with pytest.raises(ConfigError, match=message):
        chosen(device=device, attention_backend=backend)


def test_flashinfer_must_be_installed(monkeypatch):
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs FlashInfer.*keepkv_triton"):
        chosen(device="cuda", attention_backend="keepkv_flashinfer")


def test_one_backend_for_prefill_and_decode():
    assert chosen(device="cuda", decode_attention_backend="keepkv_triton") == "keepkv_triton"
    with pytest.raises(ConfigError, match="--decode-attention-backend keepkv_flashinfer beside keepkv_triton"):
        chosen(device="cuda", decode_attention_backend="keepkv_flashinfer")


def test_a_quantised_pool_is_refused():
    keys = torch.zeros(4, 1, 8, dtype=torch.float8_e4m3fn)  # --kv-cache-dtype auto with an FP8 checkpoint
    pool = SimpleNamespace(start_layer=0, layer_num=1, get_key_buffer=lambda layer: keys)
    rt, host = process.Runtime(KeepKVConfig(enabled=True)), attach.HostMemory(lambda: 0, torch.empty)
    with pytest.raises(ConfigError, match="float8_e4m3fn; use --kv-cache-dtype bfloat16"):
        attach.model_runner(rt, SimpleNamespace(token_to_kv_pool=pool), host, 0, 1)


def test_our_attention_without_keepkv_runs_and_says_so(capsys):
    flags._check_off({"attention_backend": "keepkv_cpu"})
    assert "nothing is compressed; add --enable-keepkv" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--radix-cache-backend keepkv works with KeepKV only"):
        flags._check_off({"radix_cache_backend": "keepkv"})


def test_no_flags_where_the_hook_that_reads_them_cannot_sit(monkeypatch):
    """--enable-keepkv is then an argument that the server does not know, and not one that does nothing."""
    row = Seam("sglang.srt.server_args.ServerArgs.from_cli_args", ("cls", "namespace"), "BEFORE")
    monkeypatch.setattr(seams, "HOOKS", (row,))
    parser = argparse.ArgumentParser()
    flags.add_cli_args(None, parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--enable-keepkv"])


def heads_of(*arguments):
    """What --keepkv-heads becomes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device")
    flags.add_cli_args(None, parser)
    args = parser.parse_args(["--enable-keepkv", *arguments])
    flags.before_from_cli_args(None, args)
    return getattr(args, "keepkv_heads", KeepKVConfig().heads)


def test_heads_are_uniform_on_a_gpu_unless_they_are_named(monkeypatch):
    """Packed spans have not been measured there."""
    assert heads_of("--device", "cpu") == "all"
    assert heads_of("--device", "cuda") == "uniform"
    assert heads_of("--device", "cuda", "--keepkv-heads", "all") == "all"
    monkeypatch.setattr(flags, "attach", lambda args, config: args.append(config))
    build = flags.engine_server_args(lambda **_: [])
    for device, given, wanted in (
        ("cpu", {}, "all"),
        ("cuda", {}, "uniform"),
        ("cuda", {"keepkv_heads": "layer"}, "layer"),
    ):
        (config,) = build(enable_keepkv=True, device=device, **given)
        assert config.heads == wanted
    assert build()[0] == KeepKVConfig()


@pytest.mark.parametrize(
    ("heads", "device", "reads", "packs"),
    [
        ("all", "cpu", True, True),
        ("uniform", "cpu", True, True),  # a request may ask for it
        ("all", "cpu", False, False),
        ("all", "meta", True, True),  # what is no CPU is a GPU
        ("uniform", "meta", True, False),
        ("layer", "meta", False, False),  # FlashInfer
    ],
)
def test_where_spans_are_packed(heads, device, reads, packs, caplog):
    pools = [[torch.zeros(4, 1, 8, device=device) for _ in range(2)] for _ in range(2)]
    rt = process.Runtime(KeepKVConfig(enabled=True, heads=heads))
    rt.kv_pool = SimpleNamespace(
        layer_num=2, get_key_buffer=pools[0].__getitem__, get_value_buffer=pools[1].__getitem__
    )
    rt.votes = SimpleNamespace(log_votes=[torch.zeros(4, 1, device=device) for _ in range(2)])
    with caplog.at_level(logging.INFO, "keepkv"):
        found = attach.cells(rt, reads)
    assert (found is not None) == packs
    assert ("does not read packed spans" in caplog.text) == (heads != "uniform" and not reads)
    assert ("have not run on a GPU" in caplog.text) == (packs and device != "cpu")
