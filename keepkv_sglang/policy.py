"""What a scorer or merge rule of your own is written against: examples/new_policy.py. These names stay.

A scorer is a function (Window, pool_kernel) -> scores [H, n]; a merge rule a function of Clusters that returns Merged.
"""

from keepkv_sglang.compress.rules.base import Clusters, Merged
from keepkv_sglang.compress.window import Window

__all__ = ["Clusters", "Merged", "Window"]
