"""Writes the page of results and what goes with it, and says what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentstore.errors import UsageError

PAGE_BYTES = 5_000_000


@dataclass(frozen=True)
class Written:
    """What was written, and how much of the page had no room."""

    page: Path
    kinds: list[str]
    page_bytes: int
    pictures_left_out: int
    csv: list[Path] = field(default_factory=list)
    png: list[Path] = field(default_factory=list)
    merged: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {
            "page": str(self.page),
            "reports": self.kinds,
            "page_bytes": self.page_bytes,
            "pictures_left_out": self.pictures_left_out,
            "csv": [str(p) for p in self.csv],
            "png": [str(p) for p in self.png],
            "merged": None if self.merged is None else str(self.merged),
        }


def write(
    results: Sequence[Path], out: Path, *, csv: Path | None, png: Path | None, merged: Path | None
) -> Written:
    """Write the page, and where they are asked for the tables, the plots and the merged results.

    Raises
    ------
    UsageError
        A file or folder cannot be written where it is to go, or would replace one of the results.
    ResultsError
        A file does not hold results.
    """
    from latentstore.files import write_atomic
    from latentstore.report import reading, write_csv, write_html, write_png
    from latentstore.report.page import in_order

    given = list(dict.fromkeys(p.resolve() for p in results))
    _check(given, [("--out", out), ("--merged", merged)], [("--csv", csv), ("--png", png)])
    reports = [r for path in given for r in reading.read(path)]
    left_out = write_html(reports, out)
    if merged is not None:
        write_atomic(merged, reading.merged(reports))
    return Written(
        page=out,
        kinds=[r.kind for r in in_order(reports)],
        page_bytes=out.stat().st_size,
        pictures_left_out=left_out,
        csv=[] if csv is None else write_csv(reports, csv),
        png=[] if png is None else write_png(reports, png),
        merged=merged,
    )


Options = Sequence[tuple[str, Path | None]]


def _check(given: Sequence[Path], files: Options, folders: Options) -> None:
    named = [(option, path.resolve()) for option, path in files if path is not None]
    if len({path for _, path in named}) < len(named):
        raise UsageError(
            f"{' and '.join(option for option, _ in named)} are both {named[0][1]}. Name two files."
        )
    for option, path in files:
        if path is None:
            continue
        if path.resolve() in given:
            raise UsageError(f"{option} is {path}, which is one of the results to read. Name another file.")
        if path.is_dir():
            raise UsageError(f"{option} is {path}, which is a folder. Name a file.")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{option} is {path}, but there is no folder {path.parent}. Make it first.")
    for option, path in folders:
        if path is not None and path.exists() and not path.is_dir():
            raise UsageError(f"{option} is {path}, which is a file. Name a folder.")


def said(written: Written) -> str:
    """Return what was written, a line each, and what the page had no room for."""
    from cli.render import printable

    n = len(written.kinds)
    size = f"{written.page_bytes / 1e6:.2f} MB"
    lines = [f"{printable(str(written.page))}: {n} {'report' if n == 1 else 'reports'}, {size}"]
    for files, what in ((written.csv, "tables as CSV"), (written.png, "plots as PNG")):
        if files:
            lines.append(f"{printable(str(files[0].parent))}: {len(files)} {what}")
    if written.merged is not None:
        lines.append(f"{printable(str(written.merged))}: all results as JSON")
    if written.pictures_left_out:
        n = written.pictures_left_out
        were = "picture was" if n == 1 else "pictures were"
        lines.append(f"{n:,} {were} left out to keep the page below 5 MB; the results have them.")
    if written.page_bytes > PAGE_BYTES:
        lines.append("Its tables and words alone are above 5 MB: fewer results make a smaller page.")
    return "\n".join(lines)
