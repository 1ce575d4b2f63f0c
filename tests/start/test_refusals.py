"""A start that cannot work ends with one clear line; nothing else is printed as the reason."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from keepkv_sglang.settings.config import OPTIONS, REQUEST_KEYS, ConfigError, KeepKVConfig, from_text
from keepkv_sglang.settings.values import SHOWN, budget
from keepkv_sglang.start import flags, refuse
from tests.support.bad_input import COMMAND_LINES, CONFIGURATIONS, PYTHON_REQUESTS, REQUESTS, SAYS_WHAT_TO_DO


@pytest.mark.server
def test_command_line_refusals(model_path):
    """One process parses all command lines through SGLang's real parser, hooks included."""
    script = """
import argparse, contextlib, io, json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
out = []
for case in json.loads(sys.argv[2]):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        try:
            args = parser.parse_args(["--model-path", sys.argv[1], "--enable-keepkv", *case])
            ServerArgs.from_cli_args(args)
            code = 0
        except SystemExit as error:
            code = error.code
    out.append((code, errors.getvalue().strip().splitlines()[-1:]))
print(json.dumps(out))
"""
    import json

    cases = [list(case) for case, _ in COMMAND_LINES] + [[]]
    done = subprocess.run(
        [sys.executable, "-c", script, str(model_path), json.dumps(cases)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    for (case, expected), (code, lines) in zip(COMMAND_LINES, results, strict=False):
        assert code == 2 and expected in lines[0], (case, code, lines)
    assert results[-1][0] == 0, results[-1]


def str_of(value):
    return str(value)[:20] if not isinstance(value, int) or value < 1 << 60 else "huge"


class Args:
    """A stand-in with ServerArgs' defaults of the fields that matter."""

    def __init__(self, **values):
        self.__dict__.update(values)


@pytest.mark.parametrize("field", [rule[0] for rule in refuse.FLAG_RULES])
def test_every_flag_rule_refuses_and_says_what_to_do(field):
    bad = {"page_size": 16, "speculative_algorithm": "EAGLE", "disaggregation_mode": "prefill", "pp_size": 2,
           "tokenizer_worker_num": 2, "cuda_graph_backend_prefill": "full", "kv_canary": "raise",
           "dcp_size": 2, "attn_cp_size": 2, "kv_cache_dtype": "fp8_e5m2", "dllm_algorithm": "x"}  # fmt: skip
    with pytest.raises(ConfigError, match=r"use --|leave out --"):
        refuse.check_server_args(Args(**{field: bad.get(field, True)}))
    refuse.check_server_args(
        Args(page_size=1, disaggregation_mode="null", kv_cache_dtype="auto", kv_canary="none", tokenizer_worker_num=1)
    )


@pytest.mark.parametrize("name", [rule[0] for rule in refuse.ENVIRONMENT_RULES])
def test_every_rule_on_sglangs_environment(name, monkeypatch):
    from sglang.srt.environ import envs

    monkeypatch.setenv(name, "0")
    refuse.check_environment(envs)
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"{name}: .*; set it to 0"):
        flags.attach(Args(page_size=1, disaggregation_mode="null", kv_cache_dtype="auto"), KeepKVConfig(enabled=True))


@pytest.mark.parametrize(
    "model",
    [
        {"is_hybrid_swa": True}, {"sliding_window_size": 4096}, {"is_encoder_decoder": True}, {"model_is_mrope": True},
        {"is_generation": False}, {"attention_chunk_size": 8192},
        {"hf_text_config": Args(layer_types=["full_attention", "linear_attention"])},
        {"attention_arch": Args(name="MLA")},
    ],
    ids=lambda model: next(iter(model)),  # the same in every worker of pytest -n
)  # fmt: skip
def test_models_that_cannot_work(model):
    with pytest.raises(ConfigError, match="without --enable-keepkv"):
        refuse.check_model(Args(**model))
    refuse.check_model(Args(attention_arch=Args(name="MHA"), hf_text_config=Args(layer_types=["full_attention"])))


@pytest.mark.parametrize("field", [rule[0] for rule in refuse.CPU_RULES])
def test_what_a_cpu_cannot_run(field):
    with pytest.raises(ConfigError, match="leave out --"):
        refuse.check_cpu(Args(**{field: True}))
    refuse.check_cpu(Args(enable_lora=False, lora_paths=None))


PLAIN_LAYER = {
    "layer_id": 3, "logit_cap": 0, "sliding_window_size": -1, "is_cross_attention": False, "qk_head_dim": 64,
    "v_head_dim": 64, "xai_temperature_len": -1, "attn_type": Args(name="DECODER"),
}  # fmt: skip


@pytest.mark.parametrize(
    "odd",
    [
        {"logit_cap": 30.0}, {"sliding_window_size": 4096}, {"is_cross_attention": True}, {"v_head_dim": 32},
        {"xai_temperature_len": 1024}, {"attn_type": Args(name="ENCODER_ONLY")},
    ],
    ids=lambda odd: next(iter(odd)),
)  # fmt: skip
def test_layers_that_our_kernels_do_not_compute(odd):
    with pytest.raises(ConfigError, match=r"attention layer 3 uses .*; start the server without --enable-keepkv"):
        refuse.check_layer(Args(**PLAIN_LAYER | odd))
    refuse.check_layer(Args(**PLAIN_LAYER))


@pytest.mark.parametrize(
    ("text", "value"), [("0.2", 0.2), ("1", 1.0), ("1.0", 1.0), ("2", 2), ("150", 150), ("1e-3", 1e-3)]
)
def test_budget_values(text, value):
    """Numbers from requests and Engine, their text from the command line."""
    assert from_text("budget", text) == value and isinstance(from_text("budget", text), type(value))
    assert budget(value) == value and isinstance(budget(value), type(value))


@pytest.mark.parametrize(
    "bad", [0, -1, 1.5, "x", "0.2", " 0.2 ", None, True, float("nan"), float("inf"), 2.5, [1], 10**5000], ids=str_of
)
def test_budget_values_refused(bad):
    with pytest.raises(ConfigError, match=r"fraction in \(0, 1\]"):
        budget(bad)


@pytest.mark.parametrize("text", ["", " 0.2", "1_0", "٣", "nan", "inf", "0x1", "1" * 400])
def test_no_number_on_the_command_line(text):
    with pytest.raises(ConfigError, match=r"not a number|out of range"):
        from_text("budget", text)
    with pytest.raises(ConfigError, match=r"not a whole number|out of range"):
        from_text("window", text)


def test_config_is_one_record():
    config = KeepKVConfig(enabled=True)
    assert set(OPTIONS) == set(config.__dataclass_fields__)
    assert config.with_request({"budget": 0.3}).fingerprint() != config.fingerprint()
    assert config.with_request({}).fingerprint() == config.fingerprint() == KeepKVConfig(enabled=True).fingerprint()
    assert not KeepKVConfig().with_request({"enabled": True}).enabled, "a request cannot switch a server on"
    assert not KeepKVConfig(enabled=True, budget=1).compresses
    assert flags.flag_name("enabled") == "enable_keepkv" and flags.flag_name("min_tokens") == "keepkv_min_tokens"


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2, 1 / 3, 0.5, 0.99])
def test_kept_slots_adds_up(budget):
    """Cut anywhere, [0, n) keeps ceil(budget * n) plus at most one slot per piece."""
    import math

    config = KeepKVConfig(enabled=True, budget=budget)
    for n in (1, 2, 30, 64, 1499):
        assert config.kept_slots(0, n) == max(1, math.ceil(budget * n - 1e-9))
        pieces = [config.kept_slots(i, min(i + 64, n)) for i in range(0, n, 64)]
        assert math.ceil(budget * n - 1e-9) <= sum(pieces) <= math.ceil(budget * n - 1e-9) + len(pieces)


def check_message(error, said):
    """What the table wants, short, and what to do instead."""
    text = str(error)
    assert re.search(said, text), text
    assert SAYS_WHAT_TO_DO.search(text), text
    assert len(text) < 300 + SHOWN


ALL_REQUESTS = REQUESTS + PYTHON_REQUESTS


@pytest.mark.parametrize(("wanted", "said"), ALL_REQUESTS, ids=range(len(ALL_REQUESTS)))
def test_a_bad_request_value_is_a_short_message_that_says_what_to_do(wanted, said):
    with pytest.raises(ConfigError) as found:
        KeepKVConfig(enabled=True).with_request(wanted)
    check_message(found.value, said)
    assert "package.module" not in str(found.value), "requests may not name paths"


@pytest.mark.parametrize(("wanted", "said"), CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_a_bad_configuration_is_a_short_message_that_says_what_to_do(wanted, said):
    with pytest.raises(ConfigError) as found:
        KeepKVConfig(**{"enabled": True, **wanted})
    check_message(found.value, said)


def test_the_matrix_is_wide():
    """Every key that a request may name has a bad value, and so has every option of the server."""
    assert {key for wanted, _ in REQUESTS if isinstance(wanted, dict) for key in wanted} >= set(REQUEST_KEYS)
    flags_ = {flags.flag_name(name): name for name in OPTIONS}
    named = {arg[2:].replace("-", "_") for case, _ in COMMAND_LINES for arg in case}
    configured = {key for wanted, _ in CONFIGURATIONS for key in wanted} | {flags_.get(name) for name in named}
    assert configured >= {name for name, item in OPTIONS.items() if item.server}


def test_what_the_server_was_started_with_bounds_a_request():
    """Cheaper is always allowed, dearer only where the server opens the key."""
    config = KeepKVConfig(enabled=True, window=16, interval=64, chunk=3)
    cheaper = {"window": 8, "references": 0, "interval": 256, "min_tokens": 100, "span_tokens": 0, "chunk": 3}
    assert config.with_request(cheaper).window == 8
    with pytest.raises(ConfigError, match="--keepkv-request-keys window"):
        config.with_request({"window": 17})
    assert KeepKVConfig(enabled=True, request_keys="window, chunk").request_keys == "chunk,window"
    opened = KeepKVConfig(enabled=True, window=16, request_keys="window")
    assert opened.with_request({"window": 256}).window == 256
    with pytest.raises(ConfigError, match="use at least 128"):
        opened.with_request({"interval": 127})
    assert KeepKVConfig(enabled=True, request_keys="all").with_request({"interval": 2, "chunk": 5}).interval == 2
    pieces = KeepKVConfig(enabled=True, span_tokens=512)
    assert pieces.with_request({"span_tokens": 1024}).span_tokens == 1024
    with pytest.raises(ConfigError, match="use 0 or at least 512"):
        pieces.with_request({"span_tokens": 256})
