"""One value of one setting: what it may be, and the message when it is not.

Values come as Python or JSON values (`Engine`, requests) and are checked strictly: a number is never its text.
The command line has only text: `number_from_text` reads it first. A message quotes a value cut to a readable length,
since a client may send a value of any length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Check = Callable[[Any], Any]
SHOWN = 60
MAX_SLOTS = 1 << 30
_NUMBER = re.compile(r"[+-]?([0-9]{1,300}(\.[0-9]{0,300})?|\.[0-9]{1,300})([eE][+-]?[0-9]{1,3})?", re.ASCII)
_WHOLE = re.compile(r"[+-]?[0-9]{1,300}", re.ASCII)


class ConfigError(ValueError):
    """A flag or request value that cannot work; the message says what to do."""


def shown(value: Any) -> str:
    """A value as it stands in a message: at most SHOWN characters, whatever a client sent."""
    if isinstance(value, int) and value.bit_length() > 180:
        return "a number of more than 54 digits"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    text = repr(value[: 2 * SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def names(values: list[str]) -> str:
    """Up to five names for a message, each cut, in quotes where it is no word; then how many more there are."""
    cut = ", ".join(name if name.isidentifier() and len(name) <= SHOWN else shown(name) for name in values[:5])
    return cut if len(values) <= 5 else f"{cut} and {len(values) - 5} more"


def number_from_text(text: str) -> Any:
    """The int or float that a command-line text spells in plain ASCII digits; any other text as it is."""
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def is_number(value: Any) -> bool:
    """True for int and float, not for bool and not for text."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def budget(value: Any) -> float | int:
    """A fraction in (0, 1] or a whole number of slots from 2 up.

    ``1`` and ``1.0`` both mean 100 %, that is no compression.
    """
    hint = "use a fraction in (0, 1], such as 0.2, or a whole number of KV slots from 2 up"
    if not is_number(value):
        raise ConfigError(f"budget {shown(value)} is not a number; {hint}")
    if not (isinstance(value, int) or math.isfinite(value)) or value <= 0:
        raise ConfigError(f"budget {shown(value)} is out of range; {hint}")
    if value <= 1:
        return float(value)
    if value > MAX_SLOTS:
        raise ConfigError(f"budget {shown(value)} is out of range; {hint} (at most {MAX_SLOTS})")
    if value != int(value):
        raise ConfigError(f"budget {shown(value)} is neither a fraction nor a whole number; {hint}")
    return int(value)


def budget_from_text(text: str) -> float | int:
    """A budget on a command line."""
    return budget(number_from_text(text))


def whole(name: str, low: int, high: int) -> Check:
    """Whole numbers from low to high."""

    def check(value: Any) -> int:
        number = isinstance(value, int) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            problem = "is out of range" if number else "is not a whole number"
            raise ConfigError(f"{name} {shown(value)} {problem}; use a whole number from {low} to {high}")
        return value

    return check


def real(name: str, low: float, high: float, what: str) -> Check:
    """Numbers from low to high; what: their meaning, for the message."""

    def check(value: Any) -> float:
        if not is_number(value) or not low <= value <= high:
            problem = "is out of range" if is_number(value) else "is not a number"
            raise ConfigError(f"{name} {shown(value)} {problem}; use {what} from {low} to {high}")
        return float(value)

    return check


def unpack(value: Any) -> float:
    """A fraction of the pool; a request says false for none of it."""
    return 0.0 if value is False else float(real("unpack", 0, 1, "false, or a fraction of the KV pool")(value))


def choice(name: str, known: tuple[str, ...]) -> Check:
    """One of a few texts."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise ConfigError(f"{name} {shown(value)} is not known; use one of {', '.join(known)}")
        return value

    return check


def text(parse: Callable[[Any], str]) -> Check:
    """A parser of another module whose ValueError becomes a ConfigError."""

    def check(value: Any) -> str:
        try:
            return parse(value)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    return check


def folder(name: str) -> Check:
    """A path, made absolute; empty: none."""

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise ConfigError(f"{name} {shown(value)} is not a path; use the name of a folder")
        return str(Path(value).expanduser().absolute()) if value else ""

    return check


def zero_or_at_least(name: str, low: int, zero_means: str) -> Check:
    """0, or a whole number from low up."""
    number = whole(name, 0, 1 << 30)

    def check(value: Any) -> int:
        if 0 < (checked := number(value)) < low:
            raise ConfigError(f"{name} {shown(value)} is too small; use 0 ({zero_means}) or at least {low}")
        return int(checked)

    return check


def flag(name: str) -> Check:
    """true or false."""

    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} {shown(value)} is not a boolean; use true or false")
        return value

    return check
