"""Tables and numbers as people read them. Pure, but for the printing."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
Columns = dict[str, Callable[[Row], Any]]


def table(columns: Columns, rows: Iterable[Row], empty: str) -> None:
    """Columns as wide as their longest cell, empty columns left out."""
    cells = [[str(column(row)) for column in columns.values()] for row in rows]
    if not cells:
        print(empty)
        return
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(columns)]
    for line in [list(columns), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def duration(seconds: float | None) -> str:
    """Seconds, minutes, hours or days, whole; - for None."""
    if seconds is None:
        return "-"
    seconds = int(seconds)
    for size, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size}{letter}"
    return f"{seconds}s"


def listed(value: Any) -> str:
    """With commas; - for nothing."""
    return ",".join(map(str, value)) or "-" if isinstance(value, list | tuple) else str(value or "-")


def size(count: Any) -> str:
    """Bytes with a unit."""
    number = float(count or 0)
    for unit in ("B", "K", "M", "G"):
        if number < 1024 or unit == "G":
            return f"{number:.0f}{unit}" if unit == "B" else f"{number:.1f}{unit}"
        number /= 1024
    return ""
