"""Files of KEEPKV_RECORD: none unless it is set, and nobody but their owner reads them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from keepkv_sglang.runtime import record


def test_nothing_is_recorded_unless_asked(monkeypatch):
    monkeypatch.delenv("KEEPKV_RECORD", raising=False)
    assert record.begin(None, None, None, 0) is None


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_file_is_its_owners_and_holds_what_was_chosen(tmp_path, open_umask):
    recorder = record.Recorder(str(tmp_path), {"rid": "../a request", "rank": 0})
    layer = SimpleNamespace(kept=torch.tensor([[0, 2]]), assign=torch.tensor([[0, 0, 1]]), lv=torch.zeros(2, 1))
    recorder.layer(layer)
    recorder.layer(layer)
    recorder.write()
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".pt" and path.name.endswith("-___a_request.pt")
    assert path.stat().st_mode & 0o777 == 0o600
    data = torch.load(path)
    assert data["kept"].shape == (2, 1, 2) and data["rid"] == "../a request"
