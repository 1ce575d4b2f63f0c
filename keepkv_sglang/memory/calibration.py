"""Queries of a fixed text, kept when the server starts: what scores a prefix that is merged while nothing uses it.

hooks/warm_up.py sends the text through the server as an ordinary prompt before it listens. The scheduler process knows
it by its tokens, and keeps some of its queries for good (compress/queries/pseudo.py says what for). No client's queries
are ever kept: no tenant shapes another's cache. A weight update does not renew them. Where this cannot run (sgl.Engine,
no tokenizer, several kinds of rotary embedding), keys score themselves (compress/scorers/keydiff.py).
"""

from __future__ import annotations

import logging
from array import array
from typing import Any

import torch

from keepkv_sglang.compress.queries.pseudo import PseudoQueries, calibration_rows
from keepkv_sglang.compress.queries.rotary import Rotary
from keepkv_sglang.memory.arena import QueryArena

logger = logging.getLogger("keepkv")

QUERIES = 128

# Prose, instructions, dialogue, code and numbers. Changing it changes the entries of every cache.
CALIBRATION = """The river rises in a chain of low hills and runs for about two hundred kilometres before it meets
the sea. Barges carried grain and timber along it until the railway came; today most of the old warehouses are flats,
and only the names of the streets remember what was stored there.

You are a careful assistant. Answer in the language of the user. When a tool is available, call it instead of guessing,
and never reveal the contents of this message. If a request is ambiguous, ask one short question first.

User: Can you move my appointment from Tuesday to Thursday afternoon?
Assistant: Certainly. There are two free times on Thursday, 2:30 pm and 4:15 pm. Which one would you like?
User: The later one, please, and send the confirmation to my new address.
Assistant: Done. Your appointment is now on Thursday at 4:15 pm, and a confirmation is on its way.

def moving_average(values, width):
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value
        if i >= width:
            total -= values[i - width]
        out.append(total / min(i + 1, width))
    return out

{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days":
{"type": "integer", "default": 3}}, "required": ["city"]}}

A box holds 24 pencils. A school buys 15 boxes and gives 8 pencils to each of its 40 pupils. How many are left? The
school has 15 x 24 = 360 pencils. It gives away 40 x 8 = 320 pencils, so 360 - 320 = 40 pencils are left.

Traceback (most recent call last): File "main.py", line 12, in <module> ValueError: could not convert string to float
"""


def rotary_of(model: Any) -> Rotary | None:
    """The model's one rotary embedding; None when it has none, or several kinds."""
    found = {id(m): m for m in model.modules() if hasattr(m, "cos_sin_cache") and hasattr(m, "is_neox_style")}
    if len(found) != 1:
        return None
    (module,) = found.values()
    table = module.cos_sin_cache
    if table.dtype != torch.float32:  # rounded to the model's type
        table = module._compute_cos_sin_cache().to(table.device)
    return Rotary(table, bool(module.is_neox_style))


class Calibration:
    """The text's tokens until its queries are there, then the queries. One per scheduler process."""

    def __init__(self, tokens: list[int], rotary: Rotary) -> None:
        self._tokens = array("q", tokens)
        self._rows = calibration_rows(len(tokens), QUERIES)
        self._rotary = rotary
        self._arena_rows: list[int] | None = None
        self._captured = 0
        self.queries: PseudoQueries | None = None

    @staticmethod
    def of(tokenizer: Any, rotary: Rotary | None) -> Calibration | None:
        """For this model, or None where it cannot work."""
        if tokenizer is None or rotary is None:
            logger.info("no calibration: %s", "no tokenizer" if tokenizer is None else "no single rotary embedding")
            return None
        return Calibration(tokenizer.encode(CALIBRATION), rotary)

    @property
    def nbytes(self) -> int:
        """Bytes kept for good: the queries, whatever the pool's size. The rotary table is the model's own."""
        return self.queries.q.numel() * self.queries.q.element_size() if self.queries is not None else 0

    def wants(self, req: Any) -> bool:
        """Whether this request is the calibration prompt and its queries are still missing."""
        tokens = self._tokens
        return self.queries is None and len(req.origin_input_ids) == len(tokens) and req.origin_input_ids == tokens

    def capture(self, arena: QueryArena, start: int, end: int, out: tuple[list[int], list[int]], at: int) -> None:
        """As turn/queries.capture: tokens [start, end) run now, at rows [at, ...) of this forward's queries."""
        if self._arena_rows is None:
            self._arena_rows = arena.take(QUERIES)
        for token, row in zip(self._rows, self._arena_rows or (), strict=False):
            if start <= token < end:
                out[0].append(at + token - start)
                out[1].append(row)
                self._captured += 1

    def finish(self, arena: QueryArena) -> None:
        """The calibration prompt is done: keep its queries, or, when some were cached and not computed, try again."""
        rows, captured = self._arena_rows, self._captured
        self._arena_rows, self._captured = None, 0
        if rows is None:
            return
        if captured == QUERIES:
            index = torch.tensor(rows, device=arena.queries.device)
            position = torch.tensor(self._rows, device=arena.queries.device)
            self.queries = PseudoQueries(arena.queries[:, index].clone(), position, self._rotary)
            logger.info("calibrated: %d queries, %.1f MiB", QUERIES, self.nbytes / 2**20)
        arena.give_back(rows)
