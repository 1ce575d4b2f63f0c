"""Put first on PYTHONPATH by tests/server/test_verify.py: while the file KEEPKV_VOTES_OFF exists, attention sees one
vote for every slot.

A scheduler is a process of its own, started by SGLang: this is how a test reaches into it. The compressor goes on as
always, only the votes that it writes are not read. This file hides that of tests/support/forked, so it runs it.
"""

import importlib.abc
import importlib.util
import os
import runpy
import sys
from pathlib import Path

NAME = "keepkv_sglang.backend.common"


def unheard(before):
    """VoteLayers.before, which hands attention the log votes; 0 is one vote."""

    def call(*args, **kwargs):
        log_votes = before(*args, **kwargs)
        if log_votes is not None and os.path.exists(os.environ["KEEPKV_VOTES_OFF"]):
            log_votes = log_votes.new_zeros(log_votes.shape)
        return log_votes

    return call


class Finder(importlib.abc.MetaPathFinder):
    """Wraps it when the module is imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.VoteLayers.before = unheard(module.VoteLayers.before)

        spec.loader.exec_module = exec_module
        return spec


runpy.run_path(str(Path(__file__).parents[1] / "forked" / "sitecustomize.py"))
if os.environ.get("KEEPKV_VOTES_OFF"):
    sys.meta_path.insert(0, Finder())
