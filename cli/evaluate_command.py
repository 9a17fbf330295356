"""The command ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import STORE, Device, Json, Store, command_line, guarded


@guarded
def evaluate(
    projection: Annotated[
        list[Path] | None,
        typer.Option(help="W to evaluate; may be repeated.", show_default="W-svd-512.safetensors"),
    ] = None,
    store: Store = STORE,
    queries: Annotated[
        list[Path] | None,
        typer.Option(help="A store of queries; may be repeated.", show_default="the store itself"),
    ] = None,
    upper: Annotated[
        bool,
        typer.Option("--upper", help="Fit the method on each unseen model, too (Table 3's upper bound)."),
    ] = False,
    efficiency: Annotated[
        bool, typer.Option("--efficiency", help="Time training, extraction and matching (Table 3).")
    ] = False,
    pictures: Annotated[
        int, typer.Option(help="Misses and finds to show in JSON and page.", min=0, max=100)
    ] = 8,
    device: Device = "auto",
    strict: Annotated[bool, typer.Option(help="Exit with 3 when the leakage check finds anything.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the figures as CSV here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    json_: Json = False,
) -> None:
    """Look for leaks, then report what a W finds of test queries, by model and strength, beside controls.

    mAP, Acc, recall, µAP and margins, with 95 % intervals over photos. A model is seen when W learned from
    translations by it. --device is that of --efficiency.

    Example: latentstore evaluate --projection W-svd-512.safetensors --store simulated.zarr --html page.html
    """
    from cli import progress, render, render_evaluate
    from cli.evaluating import EvaluateOptions
    from cli.evaluating import evaluate as run_evaluate

    options = EvaluateOptions(upper=upper, efficiency=efficiency, pictures=pictures, device=device)
    with progress.tracked("evaluate", "maps", first="looking for leaks", quiet=json_) as shown:
        evaluated = run_evaluate(
            store,
            projection or [Path("W-svd-512.safetensors")],
            options,
            queries=queries or (),
            out=out,
            table=csv,
            html=html,
            on_start=shown.on_start,
            on_map=shown.on_rows,
            command=command_line(),
        )
    written = [path for path in (out, csv, html) if path is not None]
    render.emit(evaluated.report.to_dict()) if json_ else render.say(render_evaluate.said(evaluated, written))
    if strict and evaluated.findings:
        raise typer.Exit(3)


COMMANDS = (evaluate,)
