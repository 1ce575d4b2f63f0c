"""Texts to measure on: real documents from the shared data folder and from Python's own library, in two halves.

Defaults are chosen on the development half and reported on the held-out half. No text is in both.

Python's own texts are imported where they are used: start-up cost.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HALVES = ("dev", "held-out")
LIBRARY = (
    "ast", "bisect", "calendar", "csv", "difflib", "fractions", "heapq", "json/decoder", "queue", "random", "sched",
    "shutil", "statistics", "string", "textwrap", "zipfile",
)  # fmt: skip
"""Modules of Python's library whose source is measured on."""
Pair = tuple[str, str]
"""(what comes first, what must follow it): without a second part the text is cut where the prompt is full."""


class Document(NamedTuple):
    """`prompt` tokens are compressed; the `following` tokens are teacher-forced behind them."""

    number: int
    source: str
    half: str  # one of HALVES
    prompt: list[int]
    following: list[int]


def documents(
    tokenize: Callable[[str], list[int]], folder: Path, count: int, prompt: int, following: int
) -> list[Document]:
    """`count` documents of prompt + following tokens, one source after the other; every other round of the sources
    is held out. ValueError when a source has not that many texts of that length."""
    made: list[Document] = []
    sources = {name: _Source(name, list(source(folder)), tokenize) for name, source in SOURCES.items()}
    for number in range(count):
        name = list(SOURCES)[number % len(SOURCES)]
        head, tail = sources[name].cut(prompt, following)
        made.append(Document(number, name, HALVES[number // len(SOURCES) % 2], head, tail))
    return made


class _Source:
    """One source's texts, each used once."""

    def __init__(self, name: str, texts: list[Pair], tokenize: Callable[[str], list[int]]) -> None:
        self.name, self.texts, self.tokenize = name, texts, tokenize
        self.rest: list[int] | None = None  # tokens of all that was left, once no single text was long enough

    def cut(self, prompt: int, following: int) -> tuple[list[int], list[int]]:
        """The first text that is long enough. With a second part, the first keeps its last `prompt` tokens.

        The sources' texts are cut to characters. For a tokenizer with longer tokens some are too short: then what is
        left of the source is one text. ValueError when that is too short as well.
        """
        if self.rest is None:
            for index, (first, second) in enumerate(self.texts):
                head = self.tokenize(first)
                if not second:
                    head, tail = head[:prompt], head[prompt : prompt + following]
                else:
                    head, tail = head[-prompt:], self.tokenize(second)[:following]
                if len(head) == prompt and len(tail) == following:
                    del self.texts[index]
                    return head, tail
            self.rest = self.tokenize("".join(first for first, second in self.texts if not second))
        head, tail, self.rest = (
            self.rest[:prompt], self.rest[prompt : prompt + following], self.rest[prompt + following :]
        )  # fmt: skip
        if len(tail) < following:
            raise ValueError(
                f"source {self.name} has not enough text for that many documents of that length: use fewer or shorter"
            )
        return head, tail


def lines(path: Path) -> list[Any]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _bfcl(folder: Path) -> Iterator[Pair]:
    """A system prompt of tool documents, then turns of a task that uses those tools."""
    answers = {a["id"]: a for a in lines(folder / "bfcl/possible_answer/BFCL_v4_multi_turn_base.json")}
    names = {
        "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
        "TwitterAPI": "posting_api", "PostingAPI": "posting_api", "TicketAPI": "ticket_api",
        "TradingBot": "trading_bot", "TravelAPI": "travel_booking", "TravelBooking": "travel_booking",
        "VehicleControlAPI": "vehicle_control",
    }  # fmt: skip
    tasks = lines(folder / "bfcl/BFCL_v4_multi_turn_base.json")
    for task in tasks[:: max(1, len(tasks) // 40)]:
        tools = [folder / f"bfcl/multi_turn_func_doc/{names[c]}.json" for c in task["involved_classes"]]
        system = "You call functions. These are the functions you may call:\n" + "".join(t.read_text() for t in tools)
        turns = zip(task["question"], answers[task["id"]]["ground_truth"], strict=False)
        talk = "".join(f"\nUser: {q[0]['content']}\nCalls: {json.dumps(a)}" for q, a in turns if q)
        yield system, talk


def _swe_agent(folder: Path) -> Iterator[Pair]:
    for start in (0, 6000, 12000, 18000):
        for path in sorted((folder / "swe_agent").glob("ctf*.traj")):
            steps = json.loads(path.read_text())["history"]
            text = "\n\n".join(f"{s['role']}: {s.get('content') or ''}" for s in steps if s["role"] != "system")
            yield text[start : start + 12_000], ""


def _dialogues(name: str) -> Callable[[Path], Iterator[Pair]]:
    def source(folder: Path) -> Iterator[Pair]:
        talks = [d["messages_display"] for d in lines(folder / "tau_bench" / name)]
        for i in range(0, len(talks) - 3, 3):
            yield "\n\n".join(talks[i : i + 4]), ""

    return source


def _joined(texts: Sequence[str], seed: int) -> Iterator[Pair]:
    """Shuffled texts one after the other, 8,000 characters a document, no text twice."""
    shuffled = random.Random(seed).sample(list(texts), len(texts))
    joined = "\n\n".join(shuffled)
    for start in range(0, len(joined), 8_000):
        yield joined[start : start + 8_000], ""


def _mt_bench(folder: Path) -> Iterator[Pair]:
    return _joined([f"User: {turn}" for r in lines(folder / "mt_bench/question.jsonl") for turn in r["turns"]], 1)


def _ifeval(folder: Path) -> Iterator[Pair]:
    return _joined([f"User: {r['prompt']}" for r in lines(folder / "ifeval/input_data_first300.jsonl")], 2)


def _gsm8k(folder: Path) -> Iterator[Pair]:
    rows = lines(folder / "gsm8k/test_first400.jsonl")
    return _joined([f"Question: {r['question']}\nAnswer: {r['answer']}" for r in rows], 3)


def _ruler(folder: Path) -> Iterator[Pair]:
    """Needles until the prompt is full, then questions about needles near its end and their answers."""
    for row in lines(folder / "ruler/4096_niah_multikey_3_first200.jsonl"):
        needles = [x for x in row["input"].splitlines() if x.startswith("One of the special magic uuids")]
        asked = [needles[-5], needles[-9], needles[-13]]
        parts = [x.removeprefix("One of the special magic uuids for ").rstrip(".").split(" is: ") for x in asked]
        yield "\n".join(needles), "".join(f"\nThe special magic uuid for {a} in the text is: {b}." for a, b in parts)


def _manual(folder: Path) -> Iterator[Pair]:
    """Python's language reference, as pydoc carries it."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        text = topics[name]
        for start in range(0, len(text) - 9_000, 18_000):
            yield text[start : start + 9_000], ""


def _library(folder: Path) -> Iterator[Pair]:
    """Source code of Python's standard library."""
    for name in LIBRARY:
        for path in (Path(sysconfig.get_path("stdlib")) / f"{name}.py",):
            if path.exists():
                yield path.read_text()[:9_000], ""


SOURCES: dict[str, Callable[[Path], Iterator[Pair]]] = {
    "bfcl": _bfcl,
    "swe_agent": _swe_agent,
    "tau_airline": _dialogues("MockAirlineDomainEnv-few_shot.jsonl"),
    "tau_retail": _dialogues("MockRetailDomainEnv-few_shot.jsonl"),
    "mt_bench": _mt_bench,
    "ifeval": _ifeval,
    "gsm8k": _gsm8k,
    "ruler": _ruler,
    "manual": _manual,
    "library": _library,
}
