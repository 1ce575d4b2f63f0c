"""An import inside a function has its reason: a comment beside it, or a sentence in the file's first docstring."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from keepkv_sglang.tools.places import REPO

FILES = [path for room in ("keepkv_sglang", "radix", "kernels") for path in sorted((REPO / room).rglob("*.py"))]


def inside_functions(tree: ast.Module) -> list[ast.stmt]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [node for f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(REPO)) for path in FILES])
def test_imports_inside_functions_say_why(path: Path):
    text = path.read_text()
    tree = ast.parse(text)
    if "imported where" in " ".join((ast.get_docstring(tree) or "").split()):
        return
    lines = text.splitlines()
    for node in inside_functions(tree):
        beside = lines[node.lineno - 2 : node.end_lineno]
        assert any("#" in line for line in beside), f"line {node.lineno}: why is this not at the top?"
