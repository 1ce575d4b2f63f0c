"""Eight tokens in three clusters on which a merge rule of somebody else's is tried before a server uses it."""

from __future__ import annotations

import torch

from keepkv_sglang.compress.rules.base import Clusters, Merged, MergeRule
from keepkv_sglang.compress.scorers.trial import trial_window
from keepkv_sglang.kernels.merge.torch_impl import Segments


def try_rule(rule: MergeRule) -> None:
    """Raises ValueError unless the rule gives a Merged of the right shapes; passes on what the rule raises."""
    for queries in (True, False) if not getattr(rule, "needs_queries", True) else (True,):
        w = trial_window(queries)
        assign = torch.tensor([[0, 0, 1, 1, 1, -1, 0, 2]] * 2)
        merged = rule(Clusters(w.k, w.v, w.lv, assign, w, Segments.from_assignment(assign, 3)))
        if not isinstance(merged, Merged):
            raise ValueError(f"it must return keepkv_sglang.policy.Merged, not {type(merged).__name__}")
        found = [tuple(t.shape) for t in merged[:3]]
        wanted = [(2, 3, 4), (2, 3, 4), (2, 3)]
        if found != wanted:
            raise ValueError(f"k, v, lv must be [H, m, D], [H, m, D], [H, m] = {wanted}, not {found}")
