"""The commands that study a method: its ranks, and what its maps have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import STORE, Json, Store, command_line, guarded


@guarded
def sweep(
    method: Annotated[str, typer.Option(help="svd, gnull, analytic, pca; cosface with --refit.")] = "svd",
    ranks: Annotated[
        str | None,
        typer.Option(help="Ranks of W, between commas.", show_default="16, 32, ... up to the dimension"),
    ] = None,
    store: Store = STORE,
    refit: Annotated[bool, typer.Option("--refit", help="Fit every rank apart.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a CSV here, and its results JSON beside.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot here, as PNG.")] = None,
    json_: Json = False,
) -> None:
    """Measure a method at many ranks from one fit; choose the rank on validation, report on test.

    Example: latentstore sweep --method svd --ranks 64,128,256 --store simulated.zarr --plot sweep.png
    """
    from cli import render, render_sweep, sweeping

    asked = None if ranks is None else sweeping.parse_ranks(ranks)
    with render.steps(method, quiet=json_) as progress:
        swept = sweeping.sweep(
            store, method, asked, refit=refit, out=out, plot=plot, progress=progress, command=command_line()
        )
    render.emit(swept.report.to_dict()) if json_ else render.say(render_sweep.said(swept))


@guarded
def compare(
    projections: Annotated[
        list[Path] | None, typer.Argument(metavar="W", help="Two or more projections of one encoder.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="A store of pairs: fit each of its models on resampled identities, too."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="With --store: what is fitted, svd or gnull.", show_default="gnull")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="With --store: columns of the fits.", show_default="512")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="With --store: resamples of the identities.", show_default="10")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --store: of the resamples.", show_default="0", min=0)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
    json_: Json = False,
) -> None:
    """Compare maps W: cos φ of their spectra beside random matrices, and angles between their spaces.

    Example: latentstore compare W-gnull-512.safetensors W-cosface-512.safetensors
    """
    from cli import render
    from cli.comparing import RefitOptions
    from cli.comparing import compare as run_compare
    from cli.render_compare import compared

    refit = RefitOptions.of(store, method=method, rank=rank, repeats=repeats, seed=seed)
    report = run_compare(projections or [], store=store, refit=refit, out=out, command=command_line())
    render.emit(report.to_dict()) if json_ else render.say(compared(report))


COMMANDS = (sweep, compare)
