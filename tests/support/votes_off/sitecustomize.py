"""Put first on PYTHONPATH by tests/server/test_verify.py: while the file KEEPKV_VOTES_OFF exists, attention sees one
vote for every slot.

A scheduler is a process of its own, started by SGLang: this is how a test reaches into it. The compressor goes on as
always, only the votes that it writes are not read. This file hides that of tests/support/forked, so it runs it.
"""

import dataclasses
import importlib.abc
import importlib.util
import os
import runpy
import sys
from pathlib import Path


def off():
    return os.path.exists(os.environ["KEEPKV_VOTES_OFF"])


def unheard(before):
    """VoteLayers.before, which hands attention the log votes; 0 is one vote."""

    def call(*args, **kwargs):
        log_votes = before(*args, **kwargs)
        if log_votes is not None and off():
            log_votes = log_votes.new_zeros(log_votes.shape)
        return log_votes

    return call


def unheard_cells(cells):
    """KeepKVCpuBackend._cells, which hands it those of packed spans."""

    def call(*args):
        packed = cells(*args)
        if packed is None or not off():
            return packed
        votes = [votes.new_zeros(votes.shape) for votes in packed.layers.log_votes]
        return dataclasses.replace(packed, layers=dataclasses.replace(packed.layers, log_votes=votes))

    return call


PATCHED = {
    "keepkv_sglang.backend.common": ("VoteLayers", "before", unheard),
    "keepkv_sglang.backend.cpu": ("KeepKVCpuBackend", "_cells", unheard_cells),
}


class Finder(importlib.abc.MetaPathFinder):
    """Wraps them when their modules are imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in PATCHED:
            return None
        kind, name, wrap = PATCHED.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            owner = getattr(module, kind)
            setattr(owner, name, wrap(getattr(owner, name)))

        spec.loader.exec_module = exec_module
        return spec


runpy.run_path(str(Path(__file__).parents[1] / "forked" / "sitecustomize.py"))
if os.environ.get("KEEPKV_VOTES_OFF"):
    sys.meta_path.insert(0, Finder())
