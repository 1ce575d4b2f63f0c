"""What a server does before it listens."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from keepkv_sglang.hooks.warm_up import warm_up
from keepkv_sglang.memory.calibration import CALIBRATION
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.start import flags


class Manager:
    """Stands for SGLang's TokenizerManager; keeps what it is asked for."""

    tokenizer = SimpleNamespace(encode=lambda text: [ord(character) for character in text])

    def __init__(self, args, error=None):
        self.server_args, self.error, self.sent, self.flushed = args, error, [], 0

    async def generate_request(self, request, _http_request):
        if self.error is not None:
            raise self.error
        self.sent.append(request)
        yield {}

    async def flush_cache(self, timeout_s):
        self.flushed += 1


def run(monkeypatch, device="cpu", ranks=1, error=None, **settings):
    config = KeepKVConfig(enabled=True, **settings)
    monkeypatch.setattr(flags, "config_of", lambda _: config)
    manager = Manager(SimpleNamespace(device=device, dp_size=ranks, tokenizer_worker_num=1), error)
    asyncio.run(warm_up("null", manager))
    return manager


def test_the_text_is_read_uncompressed_where_its_queries_are_kept(monkeypatch):
    manager = run(monkeypatch, pressure="merge", ranks=2)
    assert [request.routed_dp_rank for request in manager.sent] == [0, 1] and manager.flushed == 1
    for request in manager.sent:
        assert request.input_ids == [ord(character) for character in CALIBRATION]
        assert request.sampling_params["custom_params"] == {"keepkv": {"enabled": False}}


def test_a_gpu_compresses_once_before_a_client_waits_for_it(monkeypatch):
    """A prompt, and a reply of an interval: two compressions."""
    manager = run(monkeypatch, device="cuda", interval=96)
    (request,) = manager.sent
    assert request.sampling_params == {"max_new_tokens": 98, "temperature": 0, "ignore_eos": True}
    assert len(request.input_ids) > KeepKVConfig().min_tokens and manager.flushed == 1
    assert len(run(monkeypatch, device="cuda", pressure="merge").sent) == 2
    assert not run(monkeypatch, device="cuda", budget=1.0).sent


def test_a_failure_is_one_line(monkeypatch, caplog):
    run(monkeypatch, device="cuda", error=ValueError("the pool is too small"))
    assert "warm-up failed" in caplog.text and "the pool is too small" in caplog.text


@pytest.mark.parametrize(
    ("device", "pressure", "wanted"), [("cpu", "off", False), ("cuda", "off", True), ("cpu", "merge", True)]
)
def test_it_is_asked_for_where_it_does_something(device, pressure, wanted):
    values = {"device": device, "keepkv_pressure": pressure, "warmups": "other"}
    flags._choose_backends(values)
    assert values["warmups"].split(",") == ["other", flags.WARMUP][: 1 + wanted]
