"""What bench_span_quality measures with: documents, a model whose attention is probed, KL to the full cache."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

REPO = Path(__file__).resolve().parents[1]
SOURCES = ("bfcl", "swe_agent", "tau_airline", "tau_retail", "mt_bench", "ifeval", "gsm8k", "ruler")
FOLLOWING = 128  # teacher-forced tokens


class Document(NamedTuple):
    """`prompt` tokens are compressed; the `following` FOLLOWING tokens are teacher-forced behind them."""

    source: str
    half: str  # "dev" or "held-out"
    prompt: list[int]
    following: list[int]


class Layer(NamedTuple):
    """Of one layer, positions first: q [T, Hq, D] after RoPE, unscaled; k, v [T, Hkv, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Cache(NamedTuple):
    """A compressed cache of one layer: k, v [m, Hkv, D], lv [m, Hkv]."""

    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor


@dataclass
class Score:
    """KL(full || compressed), mean over the following tokens, and the share of equal top-1 tokens."""

    kl: float
    top1: float


class Probe:
    """A Hugging Face causal LM in float32 whose attention function is ours.

    While `past` is None it is plain causal attention and `seen` collects q, k, v of every layer; otherwise
    every layer's `past` entries stand in front of the keys, their log votes added to the logits (Eq. 6).
    """

    def __init__(self, path: str) -> None:
        AttentionInterface.register("keepkv_probe", self._attend)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="keepkv_probe"
        ).eval()
        self.past: list[Cache] | None = None
        self.seen: dict[int, Layer] = {}

    def _attend(self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any):
        """q [1, Hq, T, D], k, v [1, Hkv, T, D] -> [1, T, Hq, D], None. The model's own mask is not used."""
        scale = options.get("scaling") or q.shape[-1] ** -0.5
        index, tokens = module.layer_idx, q.shape[2]
        if self.past is None:
            self.seen[index] = Layer(*(t[0].transpose(0, 1) for t in (q, k, v)))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return out.transpose(1, 2), None
        past = self.past[index]
        group = q.shape[1] // k.shape[1]
        k = torch.cat((past.k.transpose(0, 1)[None], k), 2)
        v = torch.cat((past.v.transpose(0, 1)[None], v), 2)
        votes = past.lv.T.repeat_interleave(group, 0)[None, :, None].expand(1, -1, tokens, -1)
        own = torch.full((tokens, tokens), -math.inf).triu(1).expand(1, q.shape[1], -1, -1)
        bias = torch.cat((votes, own), 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
        return out.transpose(1, 2), None

    @torch.inference_mode()
    def prefill(self, tokens: list[int], last: int) -> tuple[list[Layer], torch.Tensor]:
        """All layers over `tokens`, and the log-probabilities at the last `last` of them, [last, vocabulary]."""
        self.past, self.seen = None, {}
        out = self.model(torch.tensor([tokens]), use_cache=False, logits_to_keep=last)
        return [self.seen[i] for i in range(len(self.seen))], out.logits[0].log_softmax(-1)

    @torch.inference_mode()
    def score(self, past: list[Cache], start: int, tokens: list[int], full: torch.Tensor) -> Score:
        """`tokens` at logical positions from `start` over `past`, against `full` [len(tokens), vocabulary]."""
        self.past = past
        position = torch.arange(start, start + len(tokens))[None]
        out = self.model(torch.tensor([tokens]), position_ids=position, use_cache=False)
        mine = out.logits[0].log_softmax(-1)
        kl = F.kl_div(mine, full, reduction="none", log_target=True).sum(-1).mean()
        return Score(float(kl), float((mine.argmax(-1) == full.argmax(-1)).float().mean()))

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, back: bool = False) -> torch.Tensor:
        """RoPE of the model on x [T, H, D] at positions [T]; `back` undoes it."""
        cos, sin = (t[0][:, None] for t in self.model.model.rotary_emb(x, positions[None]))
        return x * cos + half_turn(x) * (-sin if back else sin)


def half_turn(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (-x2, x1) on the halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def documents(probe: Probe, folder: Path, count: int, prompt_tokens: int) -> list[Document]:
    """`count` documents of prompt_tokens + FOLLOWING tokens, one source after the other; every other round of
    the sources is held out."""
    made, texts = [], {name: globals()[f"_{name}"](folder) for name in SOURCES}
    for i in range(count):
        source = SOURCES[i % len(SOURCES)]
        prompt, following = _cut(probe.tokenizer, texts[source], prompt_tokens)
        half = "held-out" if i // len(SOURCES) % 2 else "dev"
        made.append(Document(source, half, prompt, following))
    return made


def _cut(tokenizer: Any, texts: Iterator[tuple[str, str]], prompt_tokens: int) -> tuple[list[int], list[int]]:
    """From pairs (what comes first, what must follow it): the first that is long enough. Without a second part
    the text is cut where the prompt is full; with one, the first part keeps its last prompt_tokens."""
    for first, second in texts:
        head = tokenizer(first)["input_ids"]
        if not second:
            head, tail = head[:prompt_tokens], head[prompt_tokens : prompt_tokens + FOLLOWING]
        else:
            head, tail = head[-prompt_tokens:], tokenizer(second)["input_ids"][:FOLLOWING]
        if len(head) == prompt_tokens and len(tail) == FOLLOWING:
            return head, tail
    raise ValueError("not enough text in one source for that many documents: use fewer (--documents)")


def data_folder(given: Path | None) -> Path:
    """--data, KEEPKV_DATA or ../shared/data; ValueError when there is none."""
    for folder in (given, os.environ.get("KEEPKV_DATA"), REPO.parent / "shared" / "data"):
        if folder and (Path(folder) / "SOURCES.md").exists():
            return Path(folder)
    raise ValueError("no texts: give --data or KEEPKV_DATA the folder that holds SOURCES.md, bfcl/, swe_agent/ ...")


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _bfcl(folder: Path) -> Iterator[tuple[str, str]]:
    """A system prompt of tool documents, then turns of a task that uses those tools: the cold-span case."""
    answers = {a["id"]: a for a in _lines(folder / "bfcl/possible_answer/BFCL_v4_multi_turn_base.json")}
    names = {
        "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
        "TwitterAPI": "posting_api", "PostingAPI": "posting_api", "TicketAPI": "ticket_api",
        "TradingBot": "trading_bot", "TravelAPI": "travel_booking", "TravelBooking": "travel_booking",
        "VehicleControlAPI": "vehicle_control",
    }  # fmt: skip
    tasks = _lines(folder / "bfcl/BFCL_v4_multi_turn_base.json")
    for task in tasks[:: max(1, len(tasks) // 40)]:
        tools = [folder / f"bfcl/multi_turn_func_doc/{names[c]}.json" for c in task["involved_classes"]]
        system = "You call functions. These are the functions you may call:\n" + "".join(t.read_text() for t in tools)
        turns = zip(task["question"], answers[task["id"]]["ground_truth"], strict=False)
        talk = "".join(f"\nUser: {q[0]['content']}\nCalls: {json.dumps(a)}" for q, a in turns if q)
        yield system, talk


def _swe_agent(folder: Path) -> Iterator[tuple[str, str]]:
    for start in (0, 6000, 12000, 18000, 3000, 9000):
        for path in sorted((folder / "swe_agent").glob("ctf*.traj")):
            steps = json.loads(path.read_text())["history"]
            text = "\n\n".join(f"{s['role']}: {s.get('content') or ''}" for s in steps if s["role"] != "system")
            yield text[start:], ""


def _dialogues(path: Path) -> Iterator[tuple[str, str]]:
    talks = [d["messages_display"] for d in _lines(path)]
    for i in range(0, len(talks) - 3, 3):
        yield "\n\n".join(talks[i : i + 4]), ""


def _tau_airline(folder: Path) -> Iterator[tuple[str, str]]:
    return _dialogues(folder / "tau_bench/MockAirlineDomainEnv-few_shot.jsonl")


def _tau_retail(folder: Path) -> Iterator[tuple[str, str]]:
    return _dialogues(folder / "tau_bench/MockRetailDomainEnv-few_shot.jsonl")


def _joined(texts: list[str], seed: int) -> Iterator[tuple[str, str]]:
    """Shuffled texts one after the other, 7,400 characters a document, no text twice."""
    random.Random(seed).shuffle(texts)
    joined = "\n\n".join(texts)
    for start in range(0, len(joined) - 7_400, 7_400):
        yield joined[start : start + 7_400], ""


def _mt_bench(folder: Path) -> Iterator[tuple[str, str]]:
    rows = _lines(folder / "mt_bench/question.jsonl")
    return _joined([f"User: {turn}" for r in rows for turn in r["turns"]], 1)


def _ifeval(folder: Path) -> Iterator[tuple[str, str]]:
    return _joined([f"User: {r['prompt']}" for r in _lines(folder / "ifeval/input_data_first300.jsonl")], 2)


def _gsm8k(folder: Path) -> Iterator[tuple[str, str]]:
    rows = _lines(folder / "gsm8k/test_first400.jsonl")
    return _joined([f"Question: {r['question']}\nAnswer: {r['answer']}" for r in rows], 3)


def _ruler(folder: Path) -> Iterator[tuple[str, str]]:
    """Needles until the prompt is full, then questions about needles near its end and their answers."""
    for row in _lines(folder / "ruler/4096_niah_multikey_3_first200.jsonl"):
        lines = [line for line in row["input"].splitlines() if line.startswith("One of the special magic uuids")]
        asked = [lines[-5], lines[-9], lines[-13]]
        parts = [line.removeprefix("One of the special magic uuids for ").rstrip(".").split(" is: ") for line in asked]
        yield "\n".join(lines), "".join(f"\nThe special magic uuid for {a} in the text is: {b}." for a, b in parts)
