"""Reading JSON strictly: exact types, no key too many or too few, no number that a float cannot hold.

Each reader takes a value and the place where it stands, and returns the value or raises ValueError with one line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Reader = Callable[[Any, str], T]

_LONGEST = 10_000  # characters of a text
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LARGEST_COUNT = 2**63 - 1
_LARGEST_EXACT = 2**53
_SHOWN = 40  # characters of a wrong value in a message


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: no JSON, NaN or infinity, a number that overflows, a key twice, nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def layout(value: Any, indent: str = "", width: int = 120) -> str:
    """JSON text of a value: what fits a line or holds single values only on one line, the rest indented."""
    line = json.dumps(value, allow_nan=False, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + len(line) <= width:
        return line
    if not any(isinstance(part, dict | list) for part in (value.values() if isinstance(value, dict) else value)):
        return line
    inner = indent + " "
    parts = (
        [f"{json.dumps(key)}: {layout(part, inner, width)}" for key, part in value.items()]
        if isinstance(value, dict)
        else [layout(part, inner, width) for part in value]
    )
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + ",".join(f"\n{inner}{part}" for part in parts) + f"\n{indent}{closing}"


def fields(readers: dict[str, Reader[Any]]) -> Reader[dict[str, Any]]:
    """Reads an object with exactly the keys of `readers`, each by its reader."""

    def read(value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(value, place, "an object")
        for words, keys in (("missing", readers.keys() - value.keys()), ("unknown", value.keys() - readers.keys())):
            if keys:
                raise ValueError(f"{place}: {words} key {sorted(keys)[0]!r}; expected {', '.join(readers)}")
        return {key: reader(value[key], f"{place}.{key}" if place else key) for key, reader in readers.items()}

    return read


def items(reader: Reader[T], shortest: int = 0) -> Reader[tuple[T, ...]]:
    """Reads a list of at least `shortest` entries."""

    def read(value: Any, place: str) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) < shortest:
            raise _wrong(value, place, "a list" + (f" of at least {shortest} entries" if shortest else ""))
        return tuple(reader(part, f"{place}[{position}]") for position, part in enumerate(value))

    return read


def nullable(reader: Reader[T]) -> Reader[T | None]:
    """Reads null as None, everything else by the reader."""
    return lambda value, place: None if value is None else reader(value, place)


def choice(*allowed: Any) -> Reader[Any]:
    """Reads one of the allowed values, of the very type."""

    def read(value: Any, place: str) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise _wrong(value, place, " or ".join(json.dumps(one) for one in allowed))
        return value

    return read


def text(value: Any, place: str) -> str:
    """Reads a text of printable characters: what is shown to people must not steer their terminal."""
    if not isinstance(value, str):
        raise _wrong(value, place, "a text")
    if not value.isprintable() or len(value) > _LONGEST:
        raise _wrong(value, place, f"a text of at most {_LONGEST} printable characters")
    return value


def digest(value: Any, place: str) -> str:
    """Reads "sha256:" and 64 hexadecimal digits."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _wrong(value, place, '"sha256:" and 64 hexadecimal digits')
    return value


def count(least: int = 0) -> Reader[int]:
    """Reads an integer from `least` to 2^63 - 1."""

    def read(value: Any, place: str) -> int:
        if type(value) is not int or not least <= value <= _LARGEST_COUNT:
            raise _wrong(value, place, f"an integer >= {least}")
        return value

    return read


def number(value: Any, place: str) -> float:
    """Reads a number; an integer only where a float holds it exactly."""
    if type(value) is int and abs(value) <= _LARGEST_EXACT:
        return float(value)
    if type(value) is not float:
        raise _wrong(value, place, "a number")
    return value


def bound(value: Any, place: str) -> float:
    """Reads a number >= 0, or "inf"."""
    if value == "inf":
        return math.inf
    found = number(value, place)
    if not found >= 0:
        raise _wrong(value, place, 'a number >= 0 or "inf"')
    return found


def positive(value: Any, place: str) -> float:
    """Reads a finite number > 0."""
    found = number(value, place)
    if not found > 0:
        raise _wrong(value, place, "a number > 0")
    return found


def lower_bound(value: Any, place: str) -> float:
    """Reads a number, or "-inf"."""
    return -math.inf if value == "-inf" else number(value, place)


def plain(value: float) -> float | str:
    """A number as JSON holds it: "inf" and "-inf" as texts."""
    return str(value) if math.isinf(value) else value


def _wrong(value: Any, place: str, expected: str) -> ValueError:
    try:
        shown = json.dumps(value)
    except ValueError:  # an integer of thousands of digits
        shown = "a number too large to be written"
    return ValueError(f"{place}: expected {expected}, got {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}")


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(literal: str) -> float:
    if not math.isfinite(found := float(literal)):
        raise ValueError(f"{literal[:_SHOWN]} is too large a number")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return found
