"""The command ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import Json, guarded


@guarded
def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Results as JSON: one or more files.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    csv: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write figures and curves as CSV here.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write every plot as PNG here.")] = None,
    merged: Annotated[Path | None, typer.Option(help="Write all results as one JSON file here.")] = None,
    json_: Json = False,
) -> None:
    """Make one page of results: tables like the paper's, plots, matches, settings, how to reproduce.

    The page needs no network and no other file, fits a phone, a desk and paper, and is below 5 MB.

    Example: latentstore report evaluation.json attacks.json --out report.html --csv tables --png plots
    """
    from cli import render, render_report

    written = render_report.write(results, out, csv=csv, png=png, merged=merged)
    render.emit(written.to_dict()) if json_ else render.say(render_report.said(written))


COMMANDS = (report,)
