"""One self-contained HTML file: data as compact arrays in a JSON script tag, drawn by page.js. Nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from keepkv_sglang.tools.inspect.records import Request
from keepkv_sglang.tools.inspect.row import UNKNOWN, Head, follow, steps

# As page.js reads them. Codes of `into`: FIRST + p is a token that was merged into the one at position p.
GONE, SLOT, CACHED, FIRST = range(4)
COMPRESSED, PROTECTED = 1, 2
VOTE_UNIT = 1000  # votes are thousandths of a log vote


def render(request: Request, texts: Sequence[str], model: str) -> str:
    """The page. texts: one per token of the request. ValueError where the record contradicts the answer."""
    parts = {name: (files(__package__) / f"page.{name}").read_text() for name in ("html", "css", "js")}
    script = "\n" + parts["js"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(parts["html"]).substitute(
        script_hash=f"sha256-{digest}",
        title=f"KeepKV: {escape(request.rid[:40])}",
        style=parts["css"],
        data=_script_json(data(request, texts, model)),
        script=parts["js"],
    )


def data(request: Request, texts: Sequence[str], model: str) -> dict[str, Any]:
    """What page.js draws; its first lines say what each field is."""
    heads = follow(request)
    every = [head for layer in heads for head in layer]
    rows = len(every[0].into)
    wide = rows + FIRST > np.iinfo(np.uint16).max
    codes = np.stack([_codes(head) for head in every]).astype(np.uint32 if wide else np.uint16)
    return {
        "about": _about(request, model),
        "numbers": _numbers(request),
        "texts": [*texts, *[""] * (rows - len(texts))],
        "prompt": request.prompt_tokens,
        "rows": rows,
        "layers": len(heads),
        "heads": len(heads[0]),
        "slots": [int((codes[i] == SLOT).sum()) for i in range(len(every))],
        "wide": wide,
        "into": _packed(codes),
        "votes": _packed(np.concatenate([_votes(head) for head in every])),
        "flags": _packed(_flags(request, rows)),
        "steps": steps(request),
    }


def _codes(head: Head) -> np.ndarray:
    """[tokens] of one head."""
    at = np.arange(len(head.into))
    held = head.into >= 0
    owner = np.where(held, head.token[np.where(held, head.into, 0)], 0)
    codes = np.where(owner == at, SLOT, FIRST + owner)
    codes = np.where(owner == UNKNOWN, CACHED, codes)
    return np.where(held, codes, np.where(head.into == UNKNOWN, CACHED, GONE))


def _votes(head: Head) -> np.ndarray:
    """int16 [slots whose token is known], in the order of these tokens."""
    known = np.flatnonzero(head.token != UNKNOWN)
    votes = head.log_votes[known[np.argsort(head.token[known])]]
    limit = np.iinfo(np.int16).max
    return np.clip(np.nan_to_num(votes * VOTE_UNIT, neginf=-limit).round(), -limit, limit).astype(np.int16)


def _flags(request: Request, rows: int) -> np.ndarray:
    flags = np.zeros(rows, np.uint8)
    cached = (request.anchor, request.anchor + request.answer["cached_compressed_tokens"])
    for start, end in (cached, *((event.first, event.end) for event in request.compressions)):
        flags[start:end] |= COMPRESSED
    for start, end in request.protected:
        flags[start:end] |= PROTECTED
    return flags


def _about(request: Request, model: str) -> str:
    config = request.config
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(request.time))
    budget = f"{config['budget']} slots" if isinstance(config["budget"], int) else f"{100 * config['budget']:g} %"
    return f"{model}, budget {budget}, {config['scorer']}, {config['merge']}. Request {request.rid}, {when}."


def _numbers(request: Request) -> list[tuple[str, str]]:
    """The answer's numbers, as a person reads them."""
    answer, shown = request.answer, []
    for key, name in (
        ("logical_tokens", "tokens"),
        ("slots_held", "slots held"),
        ("merged", "merged"),
        ("dropped", "dropped"),
        ("protected_tokens", "protected"),
        ("cached_compressed_tokens", "from the cache, compressed"),
        ("unpacked_tokens", "read as originals"),
        ("compressions", "compressions"),
    ):
        if answer[key] or key in ("merged", "dropped"):
            shown.append((name, f"{answer[key]:,}"))
    return shown


def _packed(array: np.ndarray) -> str:
    """Little-endian bytes, zlib, base64."""
    little = array.astype(array.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little.tobytes(), 9)).decode()


def _script_json(value: Any) -> str:
    """JSON in which no text can end the script tag or begin another one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text.encode("utf-8", "replace").decode()
