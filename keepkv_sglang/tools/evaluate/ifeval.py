"""Checks of IFEval's instructions (Zhou et al., arXiv 2311.07911), one small function per instruction id.

Written after the behaviour of google-research/instruction_following_eval (Apache-2.0), the strict variant. Differs from
it: sentences are counted by a regular expression and words of capital letters without NLTK's tokenizer, and upper or
lower case is checked without asking langdetect whether the text is English. `language:response_language` needs
langdetect and is not here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}


def _check(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def known(instructions: Sequence[str]) -> bool:
    """True when each of them can be checked."""
    return all(name in CHECKS for name in instructions)


def followed(text: str, instructions: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[bool]:
    """One per instruction. settings: IFEval's kwargs, one per instruction. An empty text follows none."""
    if not text.strip():
        return [False] * len(instructions)
    return [
        bool(CHECKS[name](text, **{key: value for key, value in given.items() if value is not None}))
        for name, given in zip(instructions, settings, strict=True)
    ]


def _compare(count: int, relation: str, wanted: int) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def sentences(text: str) -> int:
    """Pieces that end with . ! or ? before white space or the end, and an unfinished last one."""
    return len([piece for piece in re.split(r"(?<=[.!?])[\"')\]]*\s+|\n{2,}", text.strip()) if re.search(r"\w", piece)])


@_check("punctuation:no_comma")
def no_comma(text: str) -> bool:
    return "," not in text


@_check("length_constraints:number_words")
def number_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


@_check("length_constraints:number_sentences")
def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(sentences(text), relation, num_sentences)


@_check("length_constraints:number_paragraphs")
def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Separated by ***; only the first and the last may be empty."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


@_check("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Separated by two line breaks."""
    parts = re.split(r"\n\n", text)
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    words = parts[nth_paragraph - 1].split()
    return bool(words) and re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0].lower() == first_word.lower()


@_check("change_case:english_lowercase")
def english_lowercase(text: str) -> bool:
    return text.islower()


@_check("change_case:english_capital")
def english_capital(text: str) -> bool:
    return text.isupper()


@_check("change_case:capital_word_frequency")
def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"[\w'-]+", text)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


@_check("keywords:existence")
def existence(text: str, keywords: Sequence[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


@_check("keywords:forbidden_words")
def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


@_check("keywords:frequency")
def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


@_check("keywords:letter_frequency")
def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


@_check("detectable_format:number_highlighted_sections")
def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", text) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


@_check("detectable_format:number_bullet_lists")
def number_bullet_lists(text: str, num_bullets: int) -> bool:
    found = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE) + re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(found) == num_bullets


@_check("detectable_format:title")
def title(text: str) -> bool:
    return any(part.lstrip("<").rstrip(">").strip() for part in re.findall(r"<<[^\n]+>>", text))


@_check("detectable_format:json_format")
def json_format(text: str) -> bool:
    body = text.strip()
    for mark in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(mark)
    try:
        json.loads(body.removesuffix("```").strip())
    except ValueError:
        return False
    return True


@_check("detectable_format:multiple_sections")
def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)) - 1 >= num_sections


@_check("detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    return any(option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


@_check("detectable_content:number_placeholders")
def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@_check("detectable_content:postscript")
def postscript(text: str, postscript_marker: str) -> bool:
    pattern = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}.get(postscript_marker)
    pattern = pattern or rf"\s*{re.escape(postscript_marker.lower())}.*$"
    return bool(re.search(pattern, text.lower(), re.MULTILINE))


@_check("combination:repeat_prompt")
def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_check("combination:two_responses")
def two_responses(text: str) -> bool:
    """Exactly two different ones, separated by six asterisks; only the first and the last piece may be empty."""
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    answers = [part.strip() for part in parts if part.strip()]
    return len(answers) == 2 and answers[0] != answers[1]


@_check("startend:quotation")
def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


@_check("startend:end_checker")
def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
