"""Fixtures of the evaluation tests: the demo model as a probe, the shared texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.places import data_folder


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared data folder; tests that need it are skipped where it is not."""
    try:
        return data_folder(holds="SOURCES.md")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def probe(model_path: Path) -> Probe:
    return Probe(str(model_path))


@pytest.fixture(scope="session")
def ids(probe: Probe) -> list[int]:
    """Tokens of a text that needs no data folder: this library's own documentation."""
    import argparse

    text = " ".join((argparse.__doc__ or "").split())
    return probe.ids(text * 3)[:400]
