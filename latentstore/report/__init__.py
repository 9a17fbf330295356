"""HTML reports: one self-contained page from one or more :class:`~latentstore.results.Report`.

>>> from pathlib import Path
>>> from latentstore import results
>>> from latentstore.report import write_html
>>> write_html(results.load(Path("results.json")), Path("report.html"))  # doctest: +SKIP

Importing this package is cheap; matplotlib and Jinja2 are imported by the first :func:`render`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentstore.results import Report

__all__ = ["render", "write_csv", "write_html", "write_png"]


def render(reports: Report | Sequence[Report]) -> str:
    """Return one or more reports as one HTML page that needs no network, no script and no other file.

    Parameters
    ----------
    reports : Report or sequence of Report
        What was measured. Every string in it is treated as hostile.

    Returns
    -------
    str
        The page; the same reports give the same page.
    """
    from latentstore.report.page import render_page

    return render_page(_each(reports)).html


def write_html(reports: Report | Sequence[Report], path: Path) -> int:
    """Write :func:`render`'s page to ``path`` as UTF-8; return how many pictures it had no room for."""
    from latentstore.files import write_atomic
    from latentstore.report.page import render_page

    page = render_page(_each(reports))
    write_atomic(path, page.html.encode())
    return page.pictures_left_out


def write_csv(reports: Report | Sequence[Report], folder: Path) -> list[Path]:
    """Write the figures and the curves of each report as CSV; see :mod:`latentstore.report.exports`."""
    from latentstore.report.exports import csv_files

    return csv_files(_each(reports), folder)


def write_png(reports: Report | Sequence[Report], folder: Path) -> list[Path]:
    """Write every plot of the page as PNG, on white; see :mod:`latentstore.report.exports`."""
    from latentstore.report.exports import png_files

    return png_files(_each(reports), folder)


def _each(reports: Report | Sequence[Report]) -> list[Report]:
    return list(reports) if isinstance(reports, Sequence) else [reports]
