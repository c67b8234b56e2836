"""What a word on the command line means, by the type of the setting that it is for."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from vlm_jax.errors import UsageError

BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_value(text: str, present: Any, path: str, *, field_type: type | None = None) -> Any:
    """Reads `text` as a value for the field at `path`, according to what stands there now.

    bool: true/false, yes/no, 1/0. int: also 1e3 and 10_000, or none. float: or none. str: the text itself (None, with a
    capital, unsets it). list and tuple: a Python literal, or words between commas. An unset field: a Python literal
    if `text` is one, else the text.
    """
    kind = field_type if field_type not in (None, type(None)) else type(present)

    def wrong(expected: str) -> UsageError:
        return UsageError(f"{path} expects {expected}, got {text!r} (now {present!r})")

    if issubclass(kind, bool):
        if (flag := BOOLS.get(text.lower())) is None:
            raise wrong("true or false")
        return flag
    if text == "None" or (text == "none" and not issubclass(kind, str)):
        if issubclass(kind, int | float | str | type(None)):
            return None
        raise wrong("a list, and cannot be unset")
    if issubclass(kind, str):
        return text
    if issubclass(kind, int):
        if (whole := _whole_number(text)) is None:
            raise wrong("a whole number")
        return whole
    if issubclass(kind, float):
        if (number := _number(text)) is None:
            raise wrong("a number")
        return number
    if issubclass(kind, list | tuple):
        items = _items(text, present, wrong)
        return items if issubclass(kind, list) else tuple(items)
    if present is None:
        return _literal(text)
    raise UsageError(f"{path} is of type {kind.__name__} and cannot be set on the command line: change the config file")


def _whole_number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    # Bounded, so that 1e999999999 is a wrong value and not a number with a billion digits.
    whole = number.is_finite() and abs(number.adjusted()) <= 30 and number == number.to_integral_value()
    return int(number) if whole else None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _literal(text: str) -> Any:
    """A Python literal if `text` is one; true, false and 1e3 (an integer) too; else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "." not in text and (whole := _whole_number(text)) is not None:
        return whole
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _items(text: str, present: Sequence[Any], wrong: Any) -> list[Any]:
    kinds = {type(item) for item in present}
    nested = any(isinstance(item, list | tuple) for item in present)
    bracketed = text.strip()[:1] in ("(", "[")
    if bracketed or nested:
        expected = "a list such as [('vision/.*', 0.1), ('.*', 1.0)]" if nested else "a list such as 1,2 or [1, 2]"
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise wrong(expected) from None
        if not isinstance(value, list | tuple):
            raise wrong(expected)
        items = list(value)
        # A list of numbers stays one; where the present items are mixed or absent, anything goes.
        if kinds == {float}:
            items = [float(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in items]
        if len(kinds) == 1 and not nested and any(type(item) not in kinds for item in items):
            raise wrong(f"a list of {kinds.pop().__name__}")
        return items
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    words = words[:-1] if words and words[-1] == "" else words
    kind = kinds.pop() if len(kinds) == 1 else type(None)
    items = [READERS.get(kind, _literal)(word) for word in words]
    if kind in READERS and None in items:
        raise wrong(f"a list of {kind.__name__}")
    return items


# How a word is read as each type; None: it cannot be.
READERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: _whole_number,
    float: _number,
    bool: lambda word: BOOLS.get(word.lower()),
}
