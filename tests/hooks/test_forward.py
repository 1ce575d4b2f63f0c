"""What the attention backend is told of a forward that is about to run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from keepkv_sglang.hooks.extend import after_init_new
from tests.support.served import OFF, SYSTEM, serving, text

FIRST = [*SYSTEM, *text(1000, 160)]


def voted(server: Any, *reqs: Any, mode: ForwardMode = ForwardMode.EXTEND) -> bool:
    """Whether these rows, whose prompts are computed, would be attended to with votes."""
    lens = [1 if mode.is_decode() else req.extend_end - req.prefix_len for req in reqs]
    rows = torch.tensor([req.kv.req_pool_idx for req in reqs])
    committed = torch.tensor([req.kv.kv_committed_len for req in reqs])
    batch = SimpleNamespace(reqs=list(reqs), extend_lens=lens, seq_lens_cpu=committed)
    forward = SimpleNamespace(
        positions=torch.zeros(sum(lens), dtype=torch.int64), forward_mode=mode, req_pool_indices=rows,
        extend_seq_lens=torch.tensor(lens),
    )  # fmt: skip
    after_init_new(forward, None, batch)
    return bool(server.rt.voted)


def test_a_prefill_has_votes_where_one_of_its_rows_is_compressed():
    with serving() as server:
        server.run(FIRST)
        reqs = [
            server.admit([*FIRST, *text(9000, 4), *text(3000, 40)]),  # behind what is compressed
            server.admit(text(5000, 100)),
            server.admit(FIRST, kind=OFF),
        ]
        assert all(server.world.prefill(req) for req in reqs)
        later, fresh, off = reqs
        assert server.rt.requests.state_of(later).offset and not server.rt.requests.state_of(fresh).offset
        assert voted(server, later) and not voted(server, fresh) and not voted(server, off, fresh)
        assert voted(server, fresh, later), "all rows of a batch are attended to alike"
        assert voted(server, fresh, mode=ForwardMode.DECODE), "a graph has recorded its kernels"
        for req in reqs:
            server.world.abort(req)
