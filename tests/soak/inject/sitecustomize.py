"""Put first on PYTHONPATH by run.py: after KeepKV's plugin is loaded, errors.py and mutants.py change functions of it.

A scheduler is a process of its own, started by SGLang: this is how a test reaches into it. This file hides that of
tests/support/forked, so it runs it.
"""

import importlib.abc
import importlib.util
import os
import runpy
import sys
import traceback
from pathlib import Path


def plant() -> None:
    # here: they import the plugin's modules, which import torch
    from tests.soak.inject import errors, mutants

    errors.plant(Path(os.environ["KEEPKV_SOAK_FAULT"]))
    if name := os.environ.get("KEEPKV_SOAK_MUTANT"):
        mutants.plant(name, Path(os.environ["KEEPKV_SOAK_ARMED"]))


class Finder(importlib.abc.MetaPathFinder):
    """After keepkv_sglang.plugin is imported, its register() also plants."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "keepkv_sglang.plugin":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            register = module.register

            def both():
                register()
                try:
                    plant()
                except BaseException:  # SGLang would log it and serve without what was to be planted
                    traceback.print_exc()
                    os._exit(1)

            module.register = both

        spec.loader.exec_module = exec_module
        return spec


runpy.run_path(str(Path(__file__).parents[2] / "support" / "forked" / "sitecustomize.py"))
if os.environ.get("KEEPKV_SOAK_FAULT"):
    sys.meta_path.insert(0, Finder())
