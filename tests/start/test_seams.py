"""A seam that does not match is named, and the server refuses to start (issue 2, item 2)."""

from __future__ import annotations

import pytest

from keepkv_sglang.settings.config import ConfigError
from keepkv_sglang.start import seams
from keepkv_sglang.start.seams import Seam


@pytest.mark.parametrize(
    ("seam", "reason"),
    [
        (Seam("sglang.srt.mem_cache.common.release_everything"), "not found"),
        (Seam("sglang.srt.mem_cache.no_such_module.thing"), "not found"),
        (Seam("sglang.srt.mem_cache.common.release_kv_cache", ("request", "tree_cache")), "signature changed"),
        (Seam("sglang.srt.mem_cache.common.release_kv_cache", ("req", "cache", "checkpoint")), "signature changed"),
    ],
    ids=["name", "module", "first", "middle"],
)
def test_a_seam_that_does_not_match_is_refused(monkeypatch, seam, reason):
    import sglang  # noqa: F401  SGLang resolves its platform while it is imported, as in a server

    result = seams.check(seam)
    assert not result.ok and reason in result.reason
    monkeypatch.setattr(seams, "HOOKS", (seam,))
    monkeypatch.setattr(seams, "USES", ())
    with pytest.raises(ConfigError, match="without --enable-keepkv"):
        seams.require()


def test_another_sglang_version_is_refused(monkeypatch):
    monkeypatch.setattr(seams, "TESTED_SGLANG", "0.5.22")
    with pytest.raises(ConfigError, match=r"pip install sglang==0\.5\.22"):
        seams.require()


def test_every_row_matches_the_installed_sglang():
    import sglang  # noqa: F401

    bad = [result for result in seams.check_all() if not result.ok]
    assert not bad, bad
    assert all(callable(seams.load_hook(seam)) for seam in seams.HOOKS)
