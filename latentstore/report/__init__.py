"""HTML reports: one self-contained page from a :class:`~latentstore.results.Report`.

>>> from pathlib import Path
>>> from latentstore import results
>>> from latentstore.report import write_html
>>> write_html(results.load(Path("results.json")), Path("report.html"))  # doctest: +SKIP

Importing this package is cheap; matplotlib and Jinja2 are imported by the first :func:`render`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentstore.results import Report

__all__ = ["render", "write_html"]


def render(report: Report) -> str:
    """Return the report as one HTML page that needs no network, no script and no other file.

    Parameters
    ----------
    report : Report
        What was measured. Every string in it is treated as hostile.

    Returns
    -------
    str
        The page; the same report gives the same page.
    """
    from latentstore.report.page import render_page

    return render_page(report)


def write_html(report: Report, path: Path) -> None:
    """Write :func:`render`'s page to ``path`` as UTF-8."""
    path.write_text(render(report), encoding="utf-8", newline="\n")
