"""Files of a record: whole or not there, for their owner only, and a disk that is full costs no request."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
import torch

from keepkv_sglang.faults import guard
from keepkv_sglang.runtime import record
from keepkv_sglang.settings.config import ConfigError, KeepKVConfig
from keepkv_sglang.start import refuse


def test_only_the_owner_reads_it(tmp_path):
    record._write(str(tmp_path / "a.json"), lambda file: file.write(b"{}"))
    (file,) = tmp_path.iterdir()
    assert file.name == "a.json" and file.read_bytes() == b"{}" and file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("torch.save: file write failed")])
def test_a_full_disk_is_noted_and_leaves_nothing(tmp_path, error, monkeypatch):
    monkeypatch.setattr(guard, "errors", type(guard.errors)())

    def fill(file):
        file.write(b"half")
        raise error

    record._write(str(tmp_path / "a.json"), fill)
    assert list(tmp_path.iterdir()) == [] and guard.errors == {"record": 1}


def test_names_say_nothing_to_a_file_system():
    assert record.in_file_name("../a b\0/" + "x" * 20) == "___a_b__xxxxxxxx"


def test_the_folder_is_made_at_start_or_refused(tmp_path):
    config = KeepKVConfig(enabled=True, record=str(tmp_path / "a" / "b"))
    refuse.check_record(config.record)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="name a folder that can be made"):
        refuse.check_record(str(tmp_path / "file"))
    refuse.check_record("")


def test_a_folder_is_absolute_and_no_request_chooses_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = KeepKVConfig(enabled=True, record="here")
    assert config.record == os.path.join(tmp_path, "here")
    assert config.fingerprint() == KeepKVConfig(enabled=True).fingerprint(), "it changes no entry of the cache"
    with pytest.raises(ConfigError, match="record: a setting of the server"):
        config.with_request({"record": "/tmp/x"})
    with pytest.raises(ConfigError, match="record 5 is not a path"):
        KeepKVConfig(record=5)


def test_nothing_is_recorded_unless_asked():
    assert record.begin(SimpleNamespace(config=KeepKVConfig(enabled=True)), None, None, None, None, None) is None


def test_heads_with_less_are_filled_up(tmp_path):
    recorder = record.Recorder(str(tmp_path / "a.pt"), 2, {"rid": "x"})
    for kept in ([0, 2], [0, 1, 2], [1], [2]):
        recorder.add(SimpleNamespace(
            kept=torch.tensor([kept]), assign=torch.tensor([[0, 0, -1]]), lv=torch.zeros(len(kept), 1)
        ))  # fmt: skip
    recorder.write()
    data = torch.load(tmp_path / "a.pt")
    assert data["kept"].tolist() == [[[0, 2, -1], [0, 1, 2]], [[1, -1, -1], [2, -1, -1]]]
    assert data["assign"].shape == (2, 2, 3) and data["lv"].shape == (2, 3, 2) and data["rid"] == "x"
    assert torch.equal(data["lv"].mT.isinf(), data["kept"] < 0)
