"""From reports to the page: their order, what stands above them, how large it may grow, then the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from latentstore.report import text
from latentstore.report.gallery import PICTURE_BYTES, PLOT_BYTES, Budget
from latentstore.report.part import KINDS, part
from latentstore.results import Report

PAGE_BYTES = 5_000_000
_ROOM = 10_000  # for the sentences on what was left out


@dataclass(frozen=True)
class Page:
    """A page and how many pictures were left out of it."""

    html: str
    pictures_left_out: int


def render_page(reports: Sequence[Report]) -> Page:
    """Return the whole page, below 5 MB unless its tables and words alone are more.

    Where all of it would be more, pictures make room first, then the numbers below plots, then plots.

    Parameters
    ----------
    reports : sequence of Report
        At least one; on the page in the order of their kinds, those of one kind in the order given.
    """
    ordered = in_order(reports)
    pictures, plots, numbers = PICTURE_BYTES, PLOT_BYTES, True
    while True:
        budget = Budget(pictures, plots=plots, numbers=numbers)
        page = _render(ordered, budget)
        over = len(page.html.encode()) + _ROOM - PAGE_BYTES
        if over <= _ROOM:
            return page
        if budget.taken:
            pictures = max(0, budget.taken - over)
        elif numbers:
            numbers = False
        elif budget.plots_taken:
            plots = max(0, budget.plots_taken - over)
        else:
            return page


def in_order(reports: Sequence[Report]) -> list[Report]:
    """Return the reports in the order of their kinds, an unknown kind last."""
    kinds = list(KINDS)
    return sorted(reports, key=lambda r: kinds.index(r.kind) if r.kind in kinds else len(kinds))


def _render(reports: Sequence[Report], budget: Budget) -> Page:
    alone = len(reports) == 1
    parts = [part(r, "" if alone else f"r{i}-", budget) for i, r in enumerate(reports, start=1)]
    html = (
        _environment()
        .get_template("page.html")
        .render(
            parts=parts,
            alone=alone,
            title=reports[0].title if alone else _title(reports),
            heading=_title(reports),
            apart="" if alone else _apart(reports),
            pictures_left_out=budget.left_out,
            version=reports[0].version,
        )
    )
    return Page(html, budget.left_out)


def _environment() -> Environment:
    """Return Jinja2 with escaping on for every template, and every value cleaned on its way out."""
    return Environment(
        loader=PackageLoader("latentstore.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda v: v if isinstance(v, Markup) else text.clean(v),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _title(reports: Sequence[Report]) -> str:
    return f"{len(reports)} reports on finding origins"


def _apart(reports: Sequence[Report]) -> str:
    """Return what must be said of reports that are not of one space of latents, or nothing."""
    spaces = {str(r.data.get("space") or r.data.get("space_id") or "") for r in reports} - {""}
    if len(spaces) < 2:
        return ""
    return (
        f"These reports are of {len(spaces)} different encoders, or settings of one: figures of different "
        "encoders do not compare."
    )
