"""For a sitecustomize.py: something runs in a server's process right behind keepkv_sglang.plugin's register().

Standard library only: it is run before anything else is imported, by path (runpy.run_path).
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable


class Finder(importlib.abc.MetaPathFinder):
    """Finds keepkv_sglang.plugin once, and extends its register()."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then

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
                self.then()

            module.register = both

        spec.loader.exec_module = exec_module
        return spec


def after_register(then: Callable[[], None]) -> None:
    sys.meta_path.insert(0, Finder(then))
