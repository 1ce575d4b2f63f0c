"""A configuration for a trace whose lengths are divided by a factor."""

from __future__ import annotations

from dataclasses import fields

from keepkv_sglang.settings.config import KeepKVConfig

SCALED = ("window", "recent", "sinks", "interval", "min_tokens", "span_tokens", "pressure_tokens")


def scaled(config: KeepKVConfig, scale: int) -> KeepKVConfig:
    """The configuration with every length divided by `scale`; ranges are those of real tokens, so not checked."""
    names = [field.name for field in fields(config)]
    values = {name: getattr(config, name) for name in names}
    for name in SCALED:
        if values.get(name):
            values[name] = max(2 if name in ("interval", "min_tokens") else 1, round(values[name] / scale))
    result = object.__new__(KeepKVConfig)
    for name, value in values.items():
        object.__setattr__(result, name, value)
    return result
