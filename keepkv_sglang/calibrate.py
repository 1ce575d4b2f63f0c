"""Queries of a fixed text, kept when the server starts: what scores a prefix that is merged while nothing uses it.

SGLang runs `warm_up` before it listens: the text goes through the server as an ordinary prompt, and the scheduler
process, which knows it by its tokens, keeps some of its queries for good (scoring/pseudo.py says what for). No client's
queries are ever kept: no tenant shapes another's cache. A weight update does not renew them. Where this cannot run
(sgl.Engine, no tokenizer, several kinds of rotary embedding), keys score themselves (scoring/keydiff.py).
"""

from __future__ import annotations

import logging
from array import array
from typing import Any

import torch

from keepkv_sglang.scoring.pseudo import CALIBRATION, PseudoQueries, calibration_rows
from keepkv_sglang.scoring.rotary import Rotary
from keepkv_sglang.votes import QueryArena

logger = logging.getLogger("keepkv")

WARMUP = "keepkv"  # name in SGLang's --warmups
QUERIES = 128


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
        """As schedule.capture: tokens [start, end) run now, at rows [at, ...) of this forward's queries."""
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


async def warm_up(_disaggregation_mode: str, tokenizer_manager: Any) -> None:
    """Sends the text through the server, then empties the cache. A failure only means that keys score themselves."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if tokenizer_manager.tokenizer is None:
        return
    args = tokenizer_manager.server_args
    sampling = {"max_new_tokens": 1, "temperature": 0, "custom_params": {"keepkv": {"enabled": False}}}
    try:
        for rank in range(args.dp_size):
            request = GenerateReqInput(
                input_ids=tokenizer_manager.tokenizer.encode(CALIBRATION),
                sampling_params=dict(sampling),
                routed_dp_rank=rank if args.dp_size > 1 else None,
            )
            await tokenizer_manager.generate_request(request, None).__anext__()
        if args.tokenizer_worker_num == 1:  # with several, another may be serving already
            await tokenizer_manager.flush_cache(timeout_s=10)
    except Exception as error:  # a pool or context smaller than the text
        logger.warning("KeepKV's calibration failed, prefixes under pressure are scored by their keys: %s", error)
