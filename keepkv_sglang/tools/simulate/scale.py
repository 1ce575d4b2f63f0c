"""A configuration for a trace whose lengths are divided by a factor."""

from __future__ import annotations

from dataclasses import fields

from keepkv_sglang.settings.config import OPTIONS, KeepKVConfig


def scaled(config: KeepKVConfig, scale: int) -> KeepKVConfig:
    """The configuration with every length divided by `scale`; ranges are those of real tokens, so not checked."""
    result = object.__new__(KeepKVConfig)
    for name in (field.name for field in fields(config)):
        value, least = getattr(config, name), OPTIONS[name].scaled
        object.__setattr__(result, name, max(least, round(value / scale)) if least and value else value)
    return result
