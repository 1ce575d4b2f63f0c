"""Every check of ifeval.py with texts that follow the instruction and texts that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepkv_sglang.tools.evaluate.documents import lines
from keepkv_sglang.tools.evaluate.ifeval import CHECKS, followed, known, sentences
from keepkv_sglang.tools.evaluate.instructions import usable

LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("punctuation:no_comma", {}, ["One; two."], ["One, two."]),
    ("length_constraints:number_words", {"num_words": 3, **LEAST}, ["a b c", "a-b c"], ["a b"]),
    ("length_constraints:number_words", {"num_words": 3, **LESS}, ["a b"], ["a b c"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, **LEAST}, ["A. B!", "Mr is. He?"], ["A 1.5 b."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, **LESS}, ["One only"], ["A. B."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "a *** b ***"],
     ["a", "a\n\nb", "a *** *** b"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "hello"},
     ["a\n\nHello, b", 'a\n\n"Hello" b'], ["Hello\n\na", "a\n\nb\n\nHello", "hello"]),
    ("change_case:english_lowercase", {}, ["all small."], ["One big."]),
    ("change_case:english_capital", {}, ["ALL BIG."], ["One big."]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
     ["NASA and ESA"], ["NASA and Esa"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"},
     ["NASA and Esa"], ["NASA and ESA"]),
    ("keywords:existence", {"keywords": ["cat", "dog"]}, ["Cats and a DOG"], ["cats only"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["category"], ["a Cat."]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, **LEAST}, ["cat Cats"], ["cat"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, **LESS}, ["cat"], ["cat cat"]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, ["Qq"], ["q"]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "less than"}, ["q"], ["Qq"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* **b**", "*a* and *b c*"],
     ["*a* b", "** ** *\n*"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "* a\n* b\n- c"]),
    ("detectable_format:title", {}, ["<<My day>>\ntext"], ["<My day>", "<< >>"]),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": [1]}\n```'], ["{a: 1}", "text"]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1\na\nSECTION 2\nb"], ["SECTION 1\na", "section 1 section 2"]),
    ("detectable_format:constrained_response", {}, ["My answer is maybe."], ["Maybe."]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]"], ["[a] (b)"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. x", "p. s. x"], ["Bye. PS x"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S x"], ["Bye.\nP.S. x"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, ["say it. Yes."], ["Yes. Say it."]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "a************b"]),
    ("startend:quotation", {}, ['"all of it"'], ['"part" of it', '"']),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So. THE END.", '"So. The end."'], ["The end. So."]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "good", "bad"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_check(name: str, settings: dict[str, Any], good: list[str], bad: list[str]):
    for text in good:
        assert followed(text, [name], [settings]) == [True], text
    for text in [*bad, "", "  \n"]:
        assert followed(text, [name], [settings]) == [False], text


def test_every_check_has_a_case():
    assert {case[0] for case in CASES} == set(CHECKS)


def test_sentences():
    assert [sentences(text) for text in ("", "One", "One. Two", 'He said "no!" Then left.', "1.5 litres.")] == [
        0, 1, 2, 2, 1,
    ]  # fmt: skip


def test_the_prompts_of_the_data_folder(data: Path):
    """Only the language check is missing; settings of the file fit the functions' parameters."""
    rows = lines(data / "ifeval/input_data_first300.jsonl")
    names = {name for row in rows for name in row["instruction_id_list"]}
    assert names - set(CHECKS) == {"language:response_language"}
    for row in rows:
        if known(row["instruction_id_list"]):
            checked = followed("A short text.", row["instruction_id_list"], row["kwargs"])
            assert len(checked) == len(row["instruction_id_list"])
    chosen, left_out = usable(rows)
    assert len(chosen) + sum(left_out.values()) == len(rows)
    assert len(chosen) >= 60 and all(len(row["instruction_id_list"]) >= 2 for row in chosen)
