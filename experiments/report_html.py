"""Markup that is safe by construction, and numbers as people read them."""

import html
import math
from collections.abc import Iterable, Mapping
from typing import Any

MISSING = "\N{EN DASH}"


class Html(str):
    """Text that is markup already; every other text is escaped on its way into a page."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | float | bool | None) -> Html:
    """An element; `class_` is the attribute class, `data_v` data-v; True is an attribute alone, None and False none."""
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    return Html(f"<{' '.join(parts)}>{joined(children)}</{name}>")


def joined(children: Iterable[str]) -> Html:
    """Children one after the other, with all escaped that is not markup."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def description(facts: Mapping[str, str], class_: str) -> Html:
    """Facts and their names, as a description list."""
    return tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items()), class_=class_)


def percent(value: float | None) -> str:
    """A fraction in percent; a dash for what is undefined."""
    return MISSING if value is None or math.isnan(value) else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def seconds(value: float) -> str:
    """A time in the two largest units that matter."""
    if value < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {rest} s"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(values: Iterable[Any], limit: int = 8) -> str:
    """Values in a row, cut where there are many."""
    names = [str(value) for value in values]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
