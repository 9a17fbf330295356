"""Results from files: one report a file or several, every field of the type that the schema gives it."""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from latentstore.errors import ResultsError
from latentstore.results import Report, from_dict, parsed

SCHEMA = "latentstore.reports/1"
"""Of several results in one file; each of them is of :data:`latentstore.results.SCHEMA`."""


def merged(reports: Sequence[Report]) -> bytes:
    """Return the reports as one JSON object, ``{"schema": ..., "reports": [...]}``, in the page's order.

    Raises
    ------
    ResultsError
        A value is not finite.
    """
    from latentstore.report.page import in_order

    root = {"schema": SCHEMA, "reports": [r.to_dict() for r in in_order(reports)]}
    try:
        text = json.dumps(root, indent=1, allow_nan=False)  # escaped: a name may hold what UTF-8 cannot
    except ValueError as exc:
        raise ResultsError(f"These results hold a value that JSON cannot: {exc}.") from exc
    return text.encode() + b"\n"


def read(path: Path) -> list[Report]:
    """Return the reports of a results file, or of a file that :func:`merged` made.

    Raises
    ------
    ResultsError
        The file is not JSON, of neither schema, or a field is not of its type.
    """
    try:
        raw = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        beside = path.with_suffix(".results.json")  # a table's or a map's own
        instead = str(beside) if beside != path and beside.is_file() else "a file that --out or --json wrote"
        raise ResultsError(f"{path} is not a readable results file ({why}). Give {instead}.") from exc
    held = raw.get("reports") if isinstance(raw, dict) and raw.get("schema") == SCHEMA else [raw]
    if not isinstance(held, list) or not held:
        raise ResultsError(f"{path} is of schema {SCHEMA!r} and holds no reports.")
    try:
        reports = [from_dict(one) for one in held]
    except (ResultsError, ValueError, AttributeError) as exc:
        raise ResultsError(f"{path} does not hold results: {exc}") from exc
    for report in reports:
        if wrong := misfit(report, Report, "report"):
            raise ResultsError(f"{path} does not hold results: {wrong}. Have the command write it again.")
    return reports


def misfit(value: Any, hint: Any, where: str) -> str:
    """Return what does not fit a type hint, as ``"figures[3].value is 'a', not a number"``, or nothing.

    JSON has one kind of number: it fits ``float`` and ``int`` alike. A bool fits neither.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return ""
    if origin is Literal:
        return "" if value in args else _said(value, where, "one of " + ", ".join(map(repr, args)))
    if origin in (Union, types.UnionType):
        return "" if any(not misfit(value, arm, where) for arm in args) else _said(value, where, str(hint))
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, hint):
            return _said(value, where, hint.__name__)
        hints = get_type_hints(hint)
        inner = ((getattr(value, f.name), hints[f.name], f"{where}.{f.name}") for f in fields(hint))
        return next(filter(None, (misfit(*one) for one in inner)), "")
    if origin is list or (origin is tuple and isinstance(value, tuple)):
        if not isinstance(value, origin) or (origin is tuple and len(value) != len(args)):
            return _said(value, where, str(hint))
        each = args if origin is tuple else args * len(value)
        inner = ((v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, each, strict=True)))
        return next(filter(None, (misfit(*one) for one in inner)), "")
    if origin is dict:
        if not isinstance(value, dict):
            return _said(value, where, "an object")
        inner = ((v, args[1], f"{where}[{k!r}]") for k, v in value.items())
        return next(filter(None, (misfit(*one) for one in inner)), "")
    if hint in (float, int):
        number = isinstance(value, float | int) and not isinstance(value, bool)
        return "" if number else _said(value, where, "a number")
    plain = get_origin(hint) or hint
    return "" if isinstance(value, plain) else _said(value, where, getattr(plain, "__name__", str(plain)))


def _said(value: Any, where: str, wanted: str) -> str:
    shown = repr(value)
    return f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}, not {wanted}"
