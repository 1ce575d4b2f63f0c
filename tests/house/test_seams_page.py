"""docs/seams.md has a row for every name of SGLang in seams.py, and names only functions of ours that exist."""

from __future__ import annotations

import pkgutil
import re
from collections import Counter

import pytest

from keepkv_sglang.start.seams import HOOKS, MEASURING, USES, Seam
from keepkv_sglang.tools.places import REPO

PAGE = (REPO / "docs" / "seams.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("|")]
TARGETS = sorted({seam.target for seam in (*HOOKS, *MEASURING, *USES)})
SHARED = {name for name, count in Counter(target.rsplit(".", 1)[1] for target in TARGETS).items() if count > 1}
HOOK = re.compile(r"(BEFORE|AFTER|AROUND) `([a-z_.]+:[a-z_]+)`")


def names_of(target: str) -> list[str]:
    """How the page may write it: its last two parts, or the last one where no other target ends alike."""
    parts = target.split(".")
    return [".".join(parts[-2:]), *([parts[-1]] if parts[-1] not in SHARED else [])]


@pytest.mark.parametrize("target", TARGETS)
def test_every_name_has_a_row(target):
    assert any(f"`{name}`" in row for name in names_of(target) for row in ROWS)


@pytest.mark.parametrize("seam", [*HOOKS, *MEASURING], ids=lambda seam: seam.hook)
def test_a_hooks_row_says_when_and_which_function_of_ours(seam: Seam):
    ours = f"{seam.kind} `{seam.hook.removeprefix('keepkv_sglang.')}`"
    assert any(f"`{names_of(seam.target)[0]}`" in row and ours in row for row in ROWS)


def test_no_other_hook_is_named():
    named = set(HOOK.findall(PAGE))
    assert named == {(seam.kind, seam.hook.removeprefix("keepkv_sglang.")) for seam in (*HOOKS, *MEASURING)}
    assert all(callable(pkgutil.resolve_name(f"keepkv_sglang.{function}")) for _, function in named)


def test_the_files_it_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and all((REPO / "docs" / link).exists() for link in links)
