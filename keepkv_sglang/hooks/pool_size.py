"""What KeepKV holds beside the KV pool comes off the memory that SGLang sizes the pool with.

Without this, votes and arena would be taken from what --mem-fraction-static leaves free for activations.
"""

from __future__ import annotations

from typing import Any

from keepkv_sglang.memory.votes import VOTE_BYTES
from keepkv_sglang.runtime import attach, process


def after_compute_cell_size(size: int, _self: Any, kvc: Any, num_layers: int) -> int | None:
    """AFTER DefaultPoolConfigurator._compute_cell_size: a slot's bytes, with its votes in every layer."""
    config = process.configured()
    if config is None or not config.enabled:
        return None
    return size + num_layers * _heads(kvc.model_config.get_num_kv_heads) * VOTE_BYTES


def after_profile_available_bytes(available: int, self: Any, _pre_model_load_memory: Any) -> int | None:
    """AFTER KVCacheConfigurator._profile_available_bytes: what is left for slots beside the query arena, whose size is
    decided here."""
    config = process.configured()
    if config is None or not config.enabled:
        return None
    model = self.model_config
    row = self.layer_info.num_effective_layers * _heads(model.get_num_attention_heads) * model.head_dim
    row *= model.dtype.itemsize
    rt = process.current()
    rt.arena_most = attach.arena_most(available, on_gpu=self.device != "cpu")
    rows = attach.arena_rows(config, True, model.context_len, rt.arena_most // row - 1)
    return available - (rows + 1) * row


def _heads(of_rank: Any) -> int:
    # SGLang is imported where it is used: every process of a server loads its hooks.
    from sglang.srt.runtime_context import get_parallel

    return of_rank(get_parallel().attn_tp_size)
