"""`evict`: keep the kept token, drop the rest (H2O, SnapKV, and every method without merging)."""

from __future__ import annotations

from keepkv_sglang.compress.rules.base import Clusters, Merged


def evict(c: Clusters) -> Merged:
    """Never called with more than one member per cluster: compress/layer.py does no matching for `evict`."""
    raise AssertionError("evict merges nothing; its clusters have one member, which is copied")
