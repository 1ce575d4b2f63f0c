"""Requests as keepkv_sglang/tools/inspect reads them from a record, with chosen or random compressions."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import numpy as np

from keepkv_sglang.tools.inspect.records import Compression, Request


def compression(
    rng: np.random.Generator,
    first: int,
    end: int,
    m: int,
    *,
    start: int,
    slots: int | None = None,
    layers: int = 2,
    heads: int = 2,
    originals: bool = False,
    merged_end: int = 0,
) -> Compression:
    """Tokens [first, end) in slots from `start` on become m: which, each head chooses by chance; of the others half are
    merged into these."""
    sources = end - first if originals or slots is None else slots
    kept, assign, votes = [], [], []
    for _ in range(layers * heads):
        own = np.sort(rng.choice(sources, m, replace=False))
        joined = np.where(rng.random(sources) < 0.5, rng.integers(0, m, sources), -1)
        joined[own] = np.arange(m)
        kept.append(own)
        assign.append(joined)
        votes.append(rng.normal(0, 1, m).astype(np.float32))
    by_layer = [[part[i * heads : (i + 1) * heads] for i in range(layers)] for part in (kept, assign, votes)]
    return Compression(
        rid="r",
        sequence=0,
        start=start,
        slots=sources if slots is None else slots,
        first=first,
        end=end,
        closed=end,
        originals=originals,
        merged_end=merged_end,
        computed=end,
        kept=by_layer[0],
        assign=by_layer[1],
        log_votes=by_layer[2],
        before=np.zeros(0, np.int32),
        target=np.zeros(0, np.int32),
    )


def request(tokens: int, held: int, compressions: list[Compression], **more: Any) -> Request:
    """One whose answer says so many tokens and slots."""
    answer = {
        "logical_tokens": tokens,
        "slots_held": held,
        "cached_compressed_tokens": 0,
        "protected_tokens": 0,
        "unpacked_tokens": 0,
        "merged": 0.0,
        "dropped": 0.0,
        "compressions": len(compressions),
        **more.pop("answer", {}),
    }
    config = {"budget": 0.2, "scorer": "s", "merge": "m"}
    values = {"anchor": 0, "protected": [], "earlier": [], "prompt_tokens": tokens, "rid": "r", **more}
    return Request(
        time=0.0, tokens=list(range(tokens)), config=config, answer=answer, compressions=compressions, **values
    )


def page_data(page: str) -> dict[str, Any]:
    """The data of a page, its arrays unpacked: into [heads, rows], votes a list per head, flags [rows]."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data: dict[str, Any] = json.loads(text)
    width = np.uint32 if data["wide"] else np.uint16
    for name, kind in (("into", width), ("votes", np.int16), ("flags", np.uint8)):
        data[name] = np.frombuffer(zlib.decompress(base64.b64decode(data[name])), kind)
    data["into"] = data["into"].reshape(data["layers"] * data["heads"], data["rows"])
    data["votes"] = np.split(data["votes"], np.cumsum(data["slots"])[:-1])
    return data
