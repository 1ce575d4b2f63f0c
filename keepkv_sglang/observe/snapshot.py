"""The numbers of one scheduler process, for /server_info."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from keepkv_sglang.runtime.compressor import scratch_bytes
from keepkv_sglang.runtime.counters import Counters
from keepkv_sglang.runtime.originals import Originals
from keepkv_sglang.runtime.process import Runtime
from keepkv_sglang.turn.limits import Skips


def memory(rt: Runtime) -> dict[str, float]:
    """Bytes beside the KV pool.

    Persistent and growing with it: votes, offsets, cells. Persistent and fixed: calibration. Scratch: arena, merging.
    """
    keys = rt.kv_pool.get_key_buffer(rt.first_layer)
    pool16 = 2 * 2 * keys.numel() * rt.kv_pool.layer_num
    calibration = rt.calibration.nbytes if rt.calibration is not None else 0
    slot_tokens = rt.slot_tokens.nbytes if rt.slot_tokens is not None else 0
    cells = rt.cells.nbytes if rt.cells is not None else 0
    offsets = rt.offsets.numel() * rt.offsets.element_size()
    return {
        "votes_bytes": rt.votes.nbytes,
        "offsets_bytes": offsets,
        "slot_tokens_bytes": slot_tokens,
        "cells_bytes": cells,
        "calibration_bytes": calibration,
        "persistent_share_of_16_bit_pool": (rt.votes.nbytes + offsets + slot_tokens + cells) / pool16,
        "staging_bytes": rt.originals.staging.nbytes if rt.originals is not None and rt.originals.staging else 0,
        "originals_bytes": rt.originals.store.nbytes if rt.originals is not None else 0,
        "arena_bytes": rt.arena.nbytes,
        "arena_rows": rt.arena.rows,
        "arena_free_rows": rt.arena.free_rows,
        "arena_peak_rows": rt.arena.peak_rows,
        "merge_scratch_bytes": scratch_bytes(rt.arena.queries.device),
    }


def originals(store: Originals) -> dict[str, Any]:
    """What the host memory for originals holds."""
    return {
        "codec": store.store.layout.codec,
        "blocks": store.store.blocks,
        "free_blocks": store.store.free_blocks,
        "tokens": store.tokens,
        "bytes_per_token": store.store.nbytes / (store.store.blocks * store.store.block_tokens),
        "unpacked_slots": store.unpacked_slots,
    }


def _skipped_share(counters: Counters) -> float:
    """Of the compressions that were due, those that found no room."""
    skipped = sum(getattr(counters, field.name) for field in fields(Skips))
    return skipped / max(1, skipped + counters.compressions)


def snapshot(rt: Runtime) -> dict[str, Any]:
    """Configuration, counters, memory, and the pool's accounting."""
    configurations, spans = rt.requests.configurations, rt.tree.spans
    return {
        "config": asdict(rt.config),
        "counters": {**asdict(rt.counters), "refused_configurations": configurations.refused},
        "skipped_share": _skipped_share(rt.counters),
        "configurations": len(configurations),
        "memory": memory(rt),
        "entries": len(spans),
        "entry_slots": spans.evictable_slots + spans.protected_slots,
        "total_slots": int(rt.allocator.size),
        "available_slots": int(rt.allocator.available_size()),
        "evictable_slots": int(rt.tree.evictable_size()),
        "protected_slots": int(rt.tree.protected_size()),
        "active_rows": rt.active_rows,
        **({"originals": originals(rt.originals)} if rt.originals is not None else {}),
    }
