"""What the page shows, for other programs: figures and curves as CSV, plots as PNG."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from latentstore.files import write_atomic
from latentstore.report import text
from latentstore.results import Report

AXES = ("model", "strength", "domain", "attack", "intensity")
FIGURE_COLUMNS = (
    *("name", "value", "unit", "low", "high", "n", "subject", "role", "group"),
    *(*AXES, "other axes", "note"),
)
CURVE_COLUMNS = (*("plot", "label", "role", "x", "y", "low", "high", "x_label", "y_label", "x_log", "y_log"),)
PNG_WIDTH = 560.0
_FORMULA = tuple("=+-@＝＋－＠\t\r\n")
"""How a formula may begin; spreadsheets take the wide forms, too."""
_SPLIT = re.compile(r"(?<=[;,|\t\n])([ \u00a0]*)(?=[=+\-@＝＋－＠])")
"""Where one may begin when a spreadsheet splits the file at another separator than its commas."""


def figure_rows(report: Report) -> Iterator[list[Any]]:
    """Yield one row a figure, of :data:`FIGURE_COLUMNS`: numbers in full, an empty cell for nothing."""
    for f in report.figures:
        low, high = f.interval or ("", "")
        rest = {name: value for name, value in f.axes.items() if name not in AXES}
        known = [f.axes.get(name, "") for name in AXES]
        other = json.dumps(rest) if rest else ""
        count = "" if f.n is None else f.n
        yield [f.name, f.value, f.unit, low, high, count, f.subject, f.role, f.group, *known, other, f.note]


def curve_rows(report: Report) -> Iterator[list[Any]]:
    """Yield one row a point, of :data:`CURVE_COLUMNS`."""
    for c in report.curves:
        low = c.low if c.low is not None else [""] * len(c.x)
        high = c.high if c.high is not None else [""] * len(c.x)
        for point in zip(c.x, c.y, low, high, strict=False):
            yield [c.plot, c.label, c.role, *point, c.x_label, c.y_label, c.x_log, c.y_log]


def defused(cell: object) -> object:
    """Return a cell that no spreadsheet runs as a formula; a number stays what it is.

    Text that begins with ``=``, ``+``, ``-``, ``@`` or white space of a kind gets an apostrophe before it, as
    OWASP's page on CSV injection advises, and so does what begins like it behind a separator inside the text.
    What would not print is spelled out as on the page.
    """
    if not isinstance(cell, str):
        return cell
    cleaned = _SPLIT.sub(r"\1'", text.clean(cell))
    risky = cell.lstrip(" \u00a0").startswith(_FORMULA)
    return f"'{cleaned}" if risky else cleaned


def csv_files(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write each report's figures and curves as ``NN-KIND-figures.csv`` and ``NN-KIND-curves.csv``.

    Returns
    -------
    list of Path
        Of the files written; a report without curves has no file of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, report in _named(reports):
        for what, columns, rows in (
            ("figures", FIGURE_COLUMNS, figure_rows(report)),
            ("curves", CURVE_COLUMNS, curve_rows(report)),
        ):
            file = io.StringIO(newline="")
            writer = csv.writer(file)
            writer.writerow(columns)
            held = [[defused(cell) for cell in row] for row in rows]
            writer.writerows(held)
            if held:
                written.append(folder / f"{stem}-{what}.csv")
                write_atomic(written[-1], file.getvalue().encode())
    return written


def png_files(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write every plot of the page as ``NN-KIND-NNN-PLOT.png``, drawn by the same code on white.

    Returns
    -------
    list of Path
        Of the files written.
    """
    from latentstore.report import cards, curves, plots, svg
    from latentstore.report.part import panels

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def save(canvas: Any, stem: str, name: str) -> None:
        written.append(folder / f"{stem}-{len(written) + 1:03d}-{_slug(name)}.png")
        raw = io.BytesIO()
        canvas.patch.set_alpha(1.0)  # on the page the ground shows through
        white = plots.PAPER["ground"]
        canvas.savefig(raw, format="png", dpi=144, facecolor=white, metadata={"Software": None})
        write_atomic(written[-1], raw.getvalue())

    for stem, report in _named(reports):
        name = cards.retrieval_name(report)
        with svg.drawing(stem):
            for group, rows in panels(report, limit=46).items():
                if rows:
                    title = f"{name}: {group or 'all queries'}"
                    drawn = plots.draw_dots(rows, plots.PAPER, width=PNG_WIDTH, title=title)
                    save(drawn, stem, group or "all")
            for plot in curves.plots_of(report):
                canvas = curves.draw(plot, plots.PAPER, width=PNG_WIDTH, named=True)
                if canvas is not None:
                    save(canvas, stem, plot.title)
    return written


def _named(reports: Sequence[Report]) -> Iterator[tuple[str, Report]]:
    """Yield each report in the page's order with the start of its files' names."""
    from latentstore.report.page import in_order

    for number, report in enumerate(in_order(reports), start=1):
        yield f"{number:02d}-{_slug(report.kind)}", report


def _slug(name: str) -> str:
    """Return the name as part of a file's: letters, digits and hyphens, at most forty of them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "plot"
