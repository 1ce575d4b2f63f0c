"""Plots: a file for each, with and without logarithmic axes."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepkv_sglang.tools.report import plots

pytestmark = pytest.mark.skipif(not plots.available(), reason="no matplotlib")


@pytest.mark.parametrize(("log", "log_x", "bottom"), [(True, False, None), (False, True, 0)])
def test_curves(tmp_path: Path, log: bool, log_x: bool, bottom: float | None):
    path = tmp_path / "curves.png"
    series = {"a": {1.0: 2.0, 10.0: 3.0}, "b": {1.0: 4.0}}
    assert plots.curves(series, path, "x", "y", log=log, log_x=log_x, bottom=bottom, title="t") == path
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_boxes(tmp_path: Path):
    path = tmp_path / "boxes.png"
    assert plots.boxes({"a": [1.0, 2.0, 9.0], "b": [0.1, 0.2]}, path, "x") == path
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
