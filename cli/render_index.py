"""A kept index in the terminal: what it holds, what changed, and what its approximate part is worth."""

from __future__ import annotations

from typing import Any

from cli.indexing import Checked, Indexed
from cli.render import counted, percent, printable, size


def indexed(made: Indexed) -> str:
    """Return what an index holds and what was done."""
    own = "the collection's own" if made.map["own"] else printable(str(made.map["source"]))
    lines = [
        f"{made.folder}: {counted(made.images, 'image')} of {made.width} numbers, {size(made.bytes)}",
        f"  W: {made.map['method']}, {own}",
        f"  {made.added:,} projected, {made.removed:,} taken out, {made.kept:,} left ({made.seconds:.1f} s)",
    ]
    if made.approximate is not None:
        lines.append(_approximate(made.approximate))
    return "\n".join([*lines, *(f"Note: {note}" for note in made.notes)])


def _approximate(part: dict[str, Any]) -> str:
    named = part["factory"] + (f" ({part['parameters']})" if part["parameters"] else "")
    recall = part["recall"]
    if recall is None:
        return f"  approximate: {named}; its recall was not measured"
    times = recall["exact_seconds"] / recall["seconds"]
    speed = f"{times:.1f} times as fast as" if times >= 1 else f"{1 / times:.1f} times slower than"
    asked = f"{counted(recall['n'], 'query', 'queries')} ({recall['of']})"
    first, ten = percent(recall["at_1"]), percent(recall["at_10"])
    return (
        f"  approximate: {named}, {size(part['bytes'])}; against exact search it finds\n"
        f"    {first} % of the first and {ten} % of the first ten, for {asked},\n"
        f"    in {_time(recall['seconds'])} a query, {speed} exact search ({_time(recall['exact_seconds'])})"
    )


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.2g} µs"


def checked(found: Checked) -> str:
    """Return what a check of the kept indexes found."""
    number, images = counted(len(found.indexes), "index", "indexes"), counted(found.images, "image")
    lines = [f"{found.store}: {number}, {images} checked"]
    for folder, findings in found.indexes.items():
        lines += [f"  DAMAGED {folder}: {text}" for text in findings]
    return "\n".join(lines if found.findings else [*lines, "  whole"])
