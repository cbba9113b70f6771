"""Values of annotation files, as tools write them: numbers as text, nulls, ids of either type.

Every reader of boxes, and the evaluation, takes its values through here, so that a file means the same
to all of them.
"""

import math
from typing import Any

Id = int | str
Box = tuple[float, float, float, float]


def parse_id(value: Any) -> Id:
    """An id for comparison: 7, 7.0 and "7" are the same id, "im7" is another.

    Raises:
        ValueError: ``value`` is neither a number nor a text.
    """
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text) if text.removeprefix("-").isdecimal() else text
    if isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer():
        return int(value)
    raise ValueError(f"found the id {value!r}, expected a whole number or a text")


def parse_number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def parse_class(value: Any) -> int:
    """The number of a class, also written as 3.0 or "3.0".

    Raises:
        ValueError: ``value`` is no whole number.
    """
    number = parse_number(value)
    if number is None or not number.is_integer():
        raise ValueError(f"found the class {value!r}, expected a whole number")
    return int(number)


def parse_box(value: Any, meaning: str) -> Box:
    """Four numbers; not-a-number and infinity stay not-a-number, for the caller to leave the box out.

    ``meaning`` says in errors what the numbers are, such as "x, y, width, height".

    Raises:
        ValueError: ``value`` is not a list of four numbers.
    """
    numbers = list(value) if isinstance(value, list | tuple) else []
    try:
        x, y, third, fourth = (float(number) for number in numbers)
    except (TypeError, ValueError):
        raise ValueError(f"bbox is {str(value)[:80]}, expected 4 numbers ({meaning})") from None
    box = (x, y, third, fourth)
    return box if all(map(math.isfinite, box)) else (math.nan, math.nan, math.nan, math.nan)


def parse_flag(value: Any) -> bool:
    """``iscrowd``: 0 and 1, as a number, a truth value or text; null is 0.

    Raises:
        ValueError: ``value`` is something else.
    """
    if value is None:
        return False
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    number = float(value) if isinstance(value, bool) else parse_number(value)
    if number is None:
        raise ValueError(f"iscrowd is {value!r}, expected 0 or 1")
    return number != 0


def parse_size(entry: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) in pixels; None where the entry gives none (both missing or null).

    Raises:
        ValueError: only one is given, or one is no positive number.
    """
    width, height = entry.get("width"), entry.get("height")
    if width is None and height is None:
        return None
    sides = parse_number(width), parse_number(height)
    if any(side is None or side < 1 for side in sides):
        raise ValueError(
            f"width is {width!r} and height is {height!r}, expected the size of the image in pixels"
        )
    return int(sides[0] or 0), int(sides[1] or 0)
