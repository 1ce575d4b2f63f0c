"""docs/row.svg and docs/tree.svg are what docs/pictures.py draws, and can be read."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from xml.etree import ElementTree

import pytest

from keepkv_sglang.tools.places import REPO

SCRIPT = REPO / "docs" / "pictures.py"
SVG = "{http://www.w3.org/2000/svg}"
LETTER = {None: 0.53, "bold": 0.6}
"""Mean width of a letter, in font sizes, in DejaVu Sans: the widest of the fonts that viewers fall back to."""


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("keepkv_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("name", ["row.svg", "tree.svg"])
def test_the_picture_is_not_stale(pictures, name):
    assert (REPO / "docs" / name).read_text() == pictures.PICTURES[name](), "run: python docs/pictures.py"


@pytest.mark.parametrize("name", ["row.svg", "tree.svg"])
def test_texts_are_large_inside_and_apart(name):
    root = ElementTree.parse(REPO / "docs" / name).getroot()
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = []
    for text in root.iter(f"{SVG}text"):
        size, x, y = float(text.get("font-size")), float(text.get("x")), float(text.get("y"))
        assert size >= 12, text.text
        length = LETTER[text.get("font-weight")] * size * len(text.text)
        left = x - length / 2 if text.get("text-anchor") == "middle" else x
        boxes.append((left, y - 0.75 * size, left + length, y + 0.2 * size, text.text))
    for left, top, right, bottom, words in boxes:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, words
    for a, b in itertools.combinations(boxes, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (a[4], b[4])


@pytest.mark.parametrize("name", ["row.svg", "tree.svg"])
def test_it_has_its_own_background_and_needs_nothing_else(name):
    root = ElementTree.parse(REPO / "docs" / name).getroot()
    paper = root.find(f"{SVG}rect")
    assert float(paper.get("width")) >= float(root.get("width")) - 1 and paper.get("fill").startswith("#")
    assert not [element for element in root.iter() if element.tag.removeprefix(SVG) in ("image", "style", "use")]
