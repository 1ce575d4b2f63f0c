"""One option is one field: its parser, help, unit, and who may set it stand beside its default (config.py).

Flags, request keys, refusals, the simulator's scaling and docs/flags.md are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from keepkv_sglang.settings.bounds import Bound
from keepkv_sglang.settings.values import Check


@dataclass(frozen=True)
class Option:
    """parse: checks and normalises a value. help: one or two sentences. unit: of the number.

    server: no request may choose it for its neighbours. bound: how far a request may move away from the server's value
    (bounds.py); None: anywhere. scaled: the number is a length of text, and the simulator divides it together with all
    others, down to this least value; 0: it is not. by_token: it marks tokens of a span's key instead of being part of
    all of it. shapes: False where it says nothing about what a span's slots hold. choices: all values, where these are
    a few words. on_gpu: the default of a server on a GPU, where that is another.
    """

    parse: Check
    help: str
    unit: str = ""
    server: bool = False
    bound: Bound | None = None
    scaled: int = 0
    by_token: bool = False
    shapes: bool = True
    choices: tuple[str, ...] = ()
    on_gpu: Any = None


def option(default: Any, **about: Any) -> Any:
    """A dataclass field that carries an Option."""
    return field(default=default, metadata={"option": Option(**about)})


def options_of(config: type) -> dict[str, Option]:
    """Field name -> its Option, in the order of the fields."""
    return {item.name: item.metadata["option"] for item in fields(config)}
