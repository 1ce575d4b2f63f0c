"""Put first on PYTHONPATH by run.py: after KeepKV's plugin is loaded, errors.py and mutants.py change functions of it.

A scheduler is a process of its own, started by SGLang: this is how a test reaches into it. This file hides that of
tests/support/forked, so it runs it.
"""

import os
import runpy
import traceback
from pathlib import Path


def plant() -> None:
    # here: they import the plugin's modules, which import torch
    from tests.soak.inject import errors, mutants

    errors.plant(Path(os.environ["KEEPKV_SOAK_FAULT"]))
    if name := os.environ.get("KEEPKV_SOAK_MUTANT"):
        mutants.plant(name, Path(os.environ["KEEPKV_SOAK_ARMED"]))


def plant_or_end() -> None:
    try:
        plant()
    except BaseException:  # SGLang would log it and serve without what was to be planted
        traceback.print_exc()
        os._exit(1)


support = Path(__file__).parents[2] / "support"
runpy.run_path(str(support / "forked" / "sitecustomize.py"))
if os.environ.get("KEEPKV_SOAK_FAULT"):
    runpy.run_path(str(support / "after_register.py"))["after_register"](plant_or_end)
