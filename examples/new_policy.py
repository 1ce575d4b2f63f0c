"""A scorer of your own: attention received, times how far the value lies from the span's mean value.

PYTHONPATH=examples python -m sglang.launch_server --model-path MODEL --enable-keepkv --keepkv-scorer new_policy:unusual
Installed with the entry point `unusual = "new_policy:unusual"` in the group keepkv_sglang.scorers, it has a name, which
--keepkv-request-keys scorer opens to requests. Merge rules work alike (--keepkv-merge, keepkv_sglang.merge_rules).
"""

import torch

from keepkv_sglang.policy import Window


def unusual(window: Window, pool_kernel: int) -> torch.Tensor:
    """[H, n]: higher is kept; H kv heads, n tokens. keepkv_sglang/policy.py: what else there is."""
    return window.mean_received() * (window.v - window.v.mean(dim=1, keepdim=True)).norm(dim=2)
