"""What a reader with five minutes meets: short pages, short sentences, few files per step."""

from __future__ import annotations

import re

import pytest

from keepkv_sglang.tools.places import REPO

PATH = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|cpp|h)|(?:[a-z_]+/)+)`")


def prose(page: str) -> str:
    """The running text: no code, no tables, no headings; links by their words."""
    text = re.sub(r"```.*?```", " ", (REPO / page).read_text(), flags=re.S)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "!["))]
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", "\n".join(lines))
    return re.sub(r"\n\s*([-\d]+\.?) ", ". ", text)


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_sentences_are_short(page):
    sentences = [s.split() for s in re.split(r"[.!?]\s|\n\n", prose(page))]
    lengths = [len(words) for words in sentences if len(words) > 1]
    assert sum(lengths) / len(lengths) < 14


def test_readme_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) <= 110


def test_each_step_of_the_design_names_two_files_at_most():
    text = (REPO / "docs" / "design.md").read_text()
    life = text[text.index("## At start") : text.index("## When something")]
    steps = re.split(r"\n(?=\d+\. )", life)
    assert len(steps) > 20
    for step in steps:
        named = set(PATH.findall(re.split(r"\n\n|\n!\[", step)[0]))
        assert len(named) <= 2, (step[:60], named)


def test_every_file_that_the_design_names_exists():
    for page in ("docs/design.md", "docs/usage.md", "README.md"):
        for name in PATH.findall((REPO / page).read_text()):
            places = [REPO / name, REPO / "keepkv_sglang" / name, REPO / "docs" / name, REPO / "radix" / name]
            assert any(place.exists() for place in places) or "/" not in name, (page, name)
