"""The command ``ablate``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.guard import STORE, Json, Store, command_line, guarded


class What(StrEnum):
    """The paper's ablations."""

    losses = "losses"
    transformations = "transformations"
    layers = "layers"
    ranks = "ranks"


@guarded
def ablate(
    store: Store = STORE,
    queries: Annotated[
        Path | None, typer.Option(help="A store of test queries by other models.", show_default="none")
    ] = None,
    what: Annotated[
        list[What] | None, typer.Option(help="What to vary; may be repeated.", show_default="all")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Values of an embedding.", show_default="512, or fewer", min=1)
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Ranks of the sweep, between commas.", show_default="64 to 512")
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers of the MLPs, 1 to 7, between commas.")] = "1,2,3",
    steps: Annotated[int | None, typer.Option(help="Of every run.", min=1)] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds that a run may take.", show_default="40, unless --steps is named"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot here, as PNG.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the tables as CSV here.")] = None,
    json_: Json = False,
) -> None:
    """Train the paper's variants of loss, transformation, depth and rank; measure seen and unseen models.

    Every variant has the same recipe; its step is chosen on validation queries and reported on test queries.

    Example: latentstore ablate --store simulated.zarr --what losses --plot losses.png
    """
    from cli import render, render_ablate
    from cli.ablating import AblateOptions, parse_layers
    from cli.ablating import ablate as run_ablate
    from cli.ranks import parse_ranks

    options = AblateOptions(
        what=tuple(w.value for w in what or What),
        rank=rank,
        ranks=() if ranks is None else parse_ranks(ranks),
        layers=parse_layers(layers),
        steps=steps,
        budget=budget,
        seed=seed,
    )
    with render.steps("ablate", quiet=json_) as progress:
        ablated = run_ablate(
            store,
            options,
            queries=queries,
            out=out,
            table=csv,
            plot=plot,
            progress=progress,
            say=(lambda text: None) if json_ else render.note,
            command=command_line(),
        )
    render.emit(ablated.report.to_dict()) if json_ else render.say(render_ablate.said(ablated))


COMMANDS = (ablate,)
