"""The results schema: the one form in which evaluations, sweeps, comparisons and benchmarks are written.

A :class:`Report` says what was measured, on which data, beside which controls, with which interval,
and how to reproduce it. Reports, plots and the README read only this.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from latentstore._version import __version__
from latentstore.errors import ResultsError

SCHEMA = "latentstore.results/1"
_INTERVALS = ("false_alarm_interval", "detection_interval")
_DEEPEST = 64
"""Levels of objects and lists in a file: far more than a report has, far fewer than Python can recurse."""
CHOSEN = "method chosen on validation"
"""The setting that names the subject to headline, where one was chosen before the test queries were seen."""

Kind = Literal[
    "evaluation",
    "solve",
    "demo",
    "sweep",
    "ablation",
    "compare",
    "theory",
    "benchmark",
    "match",
    "attack",
]
Role = Literal["method", "control", "chance", "note"]


@dataclass(frozen=True)
class Figure:
    """One number with what is needed to believe it.

    Attributes
    ----------
    name : str
        What was measured: ``"mAP"``, ``"Acc"``, ``"gain"``, ``"residual"``, ``"seconds"``, ...
    value : float
        In ``unit``. mAP and Acc are fractions of 1 (``unit="fraction"``), shown as percentages.
    subject : str
        Whose figure: a method (``"analytic"``) or a control (``"raw"``, ``"PCA-whitened ½"``).
    role : {"method", "control", "chance", "note"}
    group : str
        On which queries: ``"oracle: simulated"``, ``"JPEG 30"``, ``"all attacks"``; empty when none.
    interval : tuple of float or None
        95 % interval (low, high), in the unit of the value.
    n : int or None
        How many queries (or repeats) stand behind it.
    note : str
        One plain sentence, or empty.
    axes : dict
        Where the queries stand, for tables and curves that are laid out by it: ``model`` (of the
        translations), ``strength`` (a number), ``domain`` (``"seen"``, ``"unseen"``, ``"upper"``),
        ``attack``, ``intensity`` (a number). A figure over several values of an axis lacks it.
    """

    name: str
    value: float
    subject: str = ""
    role: Role = "note"
    group: str = ""
    unit: str = ""
    interval: tuple[float, float] | None = None
    n: int | None = None
    note: str = ""
    axes: dict[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """A line of a plot: ``y`` over ``x``, one of several in ``plot``."""

    plot: str
    label: str
    x: list[float]
    y: list[float]
    x_label: str = ""
    y_label: str = ""
    x_log: bool = False
    y_log: bool = False
    role: Role = "method"
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Candidate:
    """One ranked reference of a match.

    ``thumbnail`` is a ``data:image/jpeg;base64,`` URI or empty; ``near`` holds the paths of its copies and
    near-duplicates, which stand with it; ``heat`` is a ``data:image/png;base64,`` URI of the query with the
    places that speak for this candidate.
    """

    path: str
    identity: str
    score: float
    correct: bool | None = None
    thumbnail: str = ""
    near: list[str] = field(default_factory=list)
    heat: str = ""


Decision = Literal["match", "doubtful", "no origin here"]


@dataclass(frozen=True)
class Verdict:
    """Whether a query's origin is in the collection at all, with what that decision is worth.

    Attributes
    ----------
    decision : {"match", "doubtful", "no origin here"}
    score : float
        How far the first-ranked candidate stands out: what was calibrated, not what ranks.
    p : float
        Share of pictures without an origin here that would score as high: a conformal p-value.
    false_alarm : float
        Expected share of pictures without an origin here that are called what this one is called, or
        better. For "no origin here" both rates are of the bar that it missed.
    false_alarm_interval : tuple of float
        95 %.
    detection : float or None
        Share of pictures with an origin here whose origin comes first and is called so; of ``detection_of``.
    n : int
        Pictures that the calibration rests on.
    note : str
        One plain sentence, or empty.
    """

    decision: Decision
    score: float
    p: float
    false_alarm: float
    false_alarm_interval: tuple[float, float]
    detection: float | None = None
    detection_interval: tuple[float, float] | None = None
    detection_of: str = ""
    n: int = 0
    note: str = ""


@dataclass(frozen=True)
class Match:
    """A query with its ranked candidates; ``margin`` is the top score less the runner-up's."""

    query: str
    group: str
    margin: float | None
    candidates: list[Candidate] = field(default_factory=list)
    thumbnail: str = ""
    rank: int | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Report:
    """A measurement, complete: the JSON root."""

    kind: Kind
    title: str
    summary: list[str]
    data: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    reproduce: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    version: str = __version__
    commit: str = ""
    schema: str = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return dataclasses.asdict(self)

    def write(self, path: Path) -> None:
        """Write the report as JSON.

        Raises
        ------
        ResultsError
            A value is not finite: a figure that could not be taken is to be left out.
        """
        try:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        except ValueError as exc:
            raise ResultsError(
                f"The results of {self.title!r} hold a value that JSON cannot: {exc}."
            ) from exc
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            # A file's name may hold what UTF-8 cannot: \udcff is JSON's own escape of it, too.
            partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def find(self, name: str, *, subject: str | None = None, group: str | None = None) -> list[Figure]:
        """Return the figures of that name, optionally of one subject and group."""
        return [
            f
            for f in self.figures
            if f.name == name and subject in (None, f.subject) and group in (None, f.group)
        ]


def stamp() -> dict[str, Any]:
    """Return ``created``, ``machine`` and ``commit`` for a new :class:`Report`."""
    machine = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "commit": _commit(),
    }


def _commit() -> str:
    """Return the commit of the source tree this runs from, or an empty string."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        out = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return out.stdout.strip()


def load(path: Path) -> Report:
    """Read a results file.

    Raises
    ------
    ResultsError
        The file is not JSON, or not of schema ``latentstore.results/1``.
    """
    try:
        raw = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ResultsError(f"{path} is not a readable results file ({exc}).") from exc
    return from_dict(raw)


def parsed(text: str) -> Any:
    """Return what JSON text holds, every number of it finite as a float and nothing nested without end.

    Raises
    ------
    ValueError
        The text is not JSON, or holds what :meth:`Report.write` never writes.
    """
    deep = f"it nests deeper than {_DEEPEST} levels"
    try:
        root = json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)
    except RecursionError as exc:
        raise ValueError(deep) from exc
    level = [root]
    for _ in range(_DEEPEST):
        held = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [item for items in held for item in items]
    if level:
        raise ValueError(deep)
    return root


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"it holds {word}, which is not a finite number")
    return value


def _whole(word: str) -> int:
    if not math.isfinite(float(word)):
        raise ValueError(f"it holds {word[:20]}…, a number too large for any figure")
    return int(word)


def from_dict(raw: Mapping[str, Any]) -> Report:
    """Build a :class:`Report` from plain JSON types; the inverse of :meth:`Report.to_dict`.

    Raises
    ------
    ResultsError
        Another schema, a missing field or an unknown one.
    """
    if not isinstance(raw, Mapping):
        raise ResultsError(f"results are a {type(raw).__name__}, not an object of schema {SCHEMA!r}.")
    if raw.get("schema") != SCHEMA:
        raise ResultsError(f"results schema is {raw.get('schema')!r}, this version reads {SCHEMA!r}.")
    fields = dict(raw)
    try:
        fields["figures"] = [
            Figure(**{**f, "interval": tuple(f["interval"]) if f.get("interval") else None})
            for f in fields.get("figures", [])
        ]
        fields["curves"] = _each(Curve, fields.get("curves", []))
        fields["matches"] = [
            Match(
                **{
                    **m,
                    "candidates": _each(Candidate, m.get("candidates", [])),
                    "verdict": _verdict(m.get("verdict")),
                }
            )
            for m in fields.get("matches", [])
        ]
        return Report(**fields)
    except TypeError as exc:
        raise ResultsError(f"results file does not fit schema {SCHEMA}: {exc}.") from exc


def _verdict(raw: Mapping[str, Any] | None) -> Verdict | None:
    if raw is None:
        return None
    pairs = {name: raw.get(name) and tuple(raw[name]) for name in _INTERVALS}
    return Verdict(**{**raw, **pairs})


def _each(cls: type[Any], rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [cls(**row) for row in rows]
