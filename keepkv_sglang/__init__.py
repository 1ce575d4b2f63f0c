"""KeepKV for SGLang. Importing this package changes nothing; SGLang calls `plugin.register` at start-up."""

from importlib import metadata

try:
    __version__ = metadata.version("keepkv-sglang")
except metadata.PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+uninstalled"
