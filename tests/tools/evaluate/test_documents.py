"""Texts: the same every time, and none in both halves."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from keepkv_sglang.tools.evaluate.documents import HALVES, SOURCES, documents
from keepkv_sglang.tools.evaluate.fidelity import DOCUMENTS, FOLLOWING, half_of
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.repeated import Decoding
from keepkv_sglang.tools.evaluate.task import Setup
from keepkv_sglang.tools.places import data_folder


def words(text: str) -> list[int]:
    """A tokenizer that is quick: one number per word."""
    return [hash(word) for word in text.split()]


def test_halves_are_disjoint_and_even(data: Path):
    made = documents(words, data, 2 * len(SOURCES), 200, 20)
    assert made == documents(words, data, 2 * len(SOURCES), 200, 20)
    assert [d.number for d in made] == list(range(len(made)))
    halves = [[d for d in made if d.half == half] for half in HALVES]
    assert [sorted(d.source for d in half) for half in halves] == [sorted(SOURCES)] * 2
    assert all(len(d.prompt) == 200 and len(d.following) == 20 for d in made)

    def runs(half: list, size: int = 40) -> set[tuple[int, ...]]:
        return {
            tuple((d.prompt + d.following)[i : i + size])
            for d in half
            if d.source not in ("bfcl", "swe_agent")  # they begin alike: tool documents, instructions to the agent
            for i in range(220 - size + 1)
        }

    assert not runs(halves[0]) & runs(halves[1])
    assert len({tuple(d.following) for d in made}) == len(made)


def test_the_default_number_of_documents_exists(data: Path, probe: Probe):
    made = documents(probe.ids, data, DOCUMENTS, 1536, FOLLOWING)
    assert len(made) == DOCUMENTS and len({tuple(d.prompt + d.following) for d in made}) == DOCUMENTS


def test_too_much_asked_for_is_an_error(data: Path):
    with pytest.raises(ValueError, match="not enough text"):
        documents(words, data, 1000, 200, 40)


def test_a_folder_without_sources_is_not_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "SOURCES.md").touch()
    assert data_folder(tmp_path, "SOURCES.md") == tmp_path
    monkeypatch.setenv("KEEPKV_DATA", str(tmp_path))
    assert data_folder(tmp_path / "none", "SOURCES.md") == tmp_path


def test_items_counts_documents_of_the_half(probe: Probe, data: Path):
    """--items 3 of either half is three documents: the first of the whole half."""
    for half in HALVES:
        setup = Setup(probe, data, half, 0, 96, [], [0.1])
        everything, some = half_of(setup), half_of(replace(setup, items=3))
        assert len(everything) == DOCUMENTS // 2 and some == everything[:3]
        assert {document.half for document in everything} == {half}
        assert [d.number for d in Decoding().items(replace(setup, items=3, tokens=400))] == [d.number for d in some]


def test_for_longer_tokens_what_is_left_of_a_source_is_one_text(data: Path):
    """Qwen's tokens are longer than those that the texts were cut for: none of mt_bench's is long enough alone."""
    short, long = (lambda text, n=n: [hash(x) for x in re.findall(rf"\d|\D{{1,{n}}}", text)] for n in (4, 5))
    made = documents(long, data, 40, 1690, 60)
    assert [d.source for d in made[:10]] == list(SOURCES)
    assert len({tuple(d.prompt + d.following) for d in made}) == 40
    assert all((len(d.prompt), len(d.following)) == (1690, 60) for d in made)
    texts = [first for first, _ in SOURCES["mt_bench"](data)]
    assert [len(long(text)) >= 1750 for text in texts] == [False, True, False, False, False]
    rest = long("".join([texts[0], *texts[2:]]))
    wanted = [long(texts[1])[:1750], *(rest[at : at + 1750] for at in (0, 1750, 3500))]
    assert [d.prompt + d.following for d in made if d.source == "mt_bench"] == wanted
    assert documents(short, data, 5, 1690, 60)[4].prompt == short(texts[0])[:1690]


def test_the_demo_models_documents_are_those_of_the_published_tables(data: Path, probe: Probe):
    made = documents(probe.ids, data, 40, 1536, 128)
    # Python's own manual and library differ from release to release.
    texts = [(d.source, d.half, d.prompt, d.following) for d in made if d.source not in ("manual", "library")]
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()
    assert digest == "9d45e67f51ce782db5922ff5722140dd69cf7293116a95f4f7bfebbf5d2e73e3"
