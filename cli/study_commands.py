"""The commands that study a method: its ranks, and what its maps have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import STORE, Device, Json, Store, command_line, guarded
from cli.options import Accumulator, Score


@guarded
def sweep(
    method: Annotated[
        str, typer.Option(help="Any with a rank (svd, gnull, analytic, pca, plda); cosface with --refit.")
    ] = "svd",
    ranks: Annotated[
        str | None,
        typer.Option(help="Ranks of W, between commas.", show_default="16, 32, ... and the largest there is"),
    ] = None,
    store: Store = STORE,
    lam: Annotated[
        float | None,
        typer.Option(help="Ridge λ of methods that have one.", show_default="chosen for each rank"),
    ] = None,
    score: Annotated[
        Score | None, typer.Option(help="cosine, or bias.", show_default="chosen for each rank")
    ] = None,
    alpha_bar: Annotated[
        str | None,
        typer.Option(metavar="A[,A...]", help="analytic: noise level that is assumed.", show_default="0.1"),
    ] = None,
    exponent: Annotated[
        float | None, typer.Option(help="pca: of the whitening.", show_default="0.25")
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit every rank apart.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a CSV here, and its results JSON beside.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot here, as PNG.")] = None,
    json_: Json = False,
) -> None:
    """Measure a method at many ranks from one fit; choose the rank on validation, report on test.

    Example: latentstore sweep --method svd --ranks 64,128,256 --store simulated.zarr --plot sweep.png
    """
    from cli import knobs, render, render_sweep, sweeping
    from cli.ranks import parse_ranks

    asked = None if ranks is None else parse_ranks(ranks)
    named = {
        "lam": lam,
        "score": score and score.value,
        "alpha_bar": None if alpha_bar is None else knobs.parse_levels(alpha_bar),
        "exponent": exponent,
    }
    with render.steps(method, quiet=json_) as progress:
        swept = sweeping.sweep(
            store,
            method,
            asked,
            knobs={name: value for name, value in named.items() if value is not None},
            refit=refit,
            out=out,
            plot=plot,
            progress=progress,
            command=command_line(),
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
        str | None,
        typer.Option(
            help="With --store: what is fitted, any closed form that learns from pairs.", show_default="gnull"
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="With --store: columns of the fits.", show_default="512")
    ] = None,
    lam: Annotated[
        float | None, typer.Option(help="With --store: ridge λ of the fits.", show_default="the method's own")
    ] = None,
    accumulator: Annotated[
        Accumulator | None,
        typer.Option(help="With --store, svd: what T is factored by.", show_default="auto"),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="With --store: resamples of the identities.", show_default="10")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --store: of the resamples.", show_default="0", min=0)
    ] = None,
    jackknife: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --store: instead of resamples, leave out each of N parts once."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the spectra here, as PNG.")] = None,
    json_: Json = False,
) -> None:
    """Compare maps W: cos φ of their spectra beside random matrices, and angles between their spaces.

    Example: latentstore compare W-gnull-512.safetensors W-cosface-512.safetensors

    Example: latentstore compare --store pairs.zarr --method gnull --jackknife 10 --plot spectra.png
    """
    from cli import progress, render
    from cli.comparing import compare as run_compare
    from cli.refitting import RefitOptions
    from cli.render_compare import compared

    refit = RefitOptions.of(
        store,
        knobs={"lam": lam, "accumulator": accumulator and accumulator.value},
        method=method,
        rank=rank,
        repeats=repeats,
        seed=seed,
        jackknife=jackknife,
    )
    with progress.tracked("compare", "fits", quiet=json_ or store is None) as shown:
        report = run_compare(
            projections or [],
            store=store,
            refit=refit,
            out=out,
            plot=plot,
            command=command_line(),
            on_start=shown.on_start,
            on_fit=shown.on_rows,
        )
    render.emit(report.to_dict()) if json_ else render.say(compared(report))


@guarded
def theory(
    store: Annotated[
        Path | None, typer.Option(help="A store of pairs; without, planted pairs alone are checked.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="With --store: columns of W.", show_default="half of the dimensions, at most 512"),
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(help="A local diffusers pipeline (unet, vae, scheduler).", show_default="a small UNet"),
    ] = None,
    vae: Annotated[
        list[str] | None, typer.Option(help="Twice, for Table 4: a local folder or a hub name.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Pictures for Lemma 1 and Table 4.", show_default="colour fields")
    ] = None,
    image_size: Annotated[int, typer.Option(help="With --pipeline or --vae: pixels.", min=8)] = 256,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
    json_: Json = False,
) -> None:
    """Check the paper's lemmas and theorems in numbers, each beside a control and where it fails.

    Example: latentstore theory --store simulated.zarr --out theory.json
    """
    from cli import progress, render
    from cli.render_theory import checked
    from cli.theory import TheoryOptions, check

    options = TheoryOptions(rank, pipeline, tuple(vae or ()), images, image_size, device, seed)
    with progress.tracked("theory", "parts", quiet=json_) as shown:
        report = check(
            store, options, out=out, on_start=shown.on_start, on_check=shown.on_rows, command=command_line()
        )
    render.emit(report.to_dict()) if json_ else render.say(checked(report))


COMMANDS = (sweep, compare, theory)
