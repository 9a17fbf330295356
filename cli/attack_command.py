"""The command ``attack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import STORE, Device, Json, Store, command_line, guarded


@guarded
def attack(
    projection: Annotated[
        list[Path] | None,
        typer.Option(help="A W; may be repeated.", show_default="the collection's own analytic map"),
    ] = None,
    store: Store = STORE,
    queries: Annotated[
        Path | None,
        typer.Option(help="The store whose test pictures are attacked.", show_default="--store"),
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            metavar="KIND[=N:N][,...]",
            help="jpeg, blur, resize, watermark, crop, flip, rotation, colour; noise, brightness, contrast, "
            "saturation; or all. Intensities follow a kind: jpeg=90:50:30.",
            show_default="the first eight, at their own intensities",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Pictures to attack, at most.", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Of which pictures, and of every attack on them.", min=0)] = 0,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Write the attacked pictures and a manifest into this new folder; measure nothing."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the figures as CSV here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot here, as PNG.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Measure how well origins are found when the queries were compressed, blurred, cropped, ...

    Translations and queries of the test split are attacked, or where there are none its originals.

    Example: latentstore attack --projection W.safetensors --attacks jpeg,blur=1:3 --plot attack.png
    """
    from cli import attack_pictures, attacking, render, render_attack

    options = attack_pictures.AttackOptions(attacks, limit, seed)
    if write is not None:
        _alone(projection=projection, out=out, csv=csv, plot=plot, html=html)
        with render.progress("attack", "pictures", quiet=json_) as (on_start, on_rows):
            written = attack_pictures.write(
                store, write, options, queries=queries, on_start=on_start, on_rows=on_rows
            )
        render.emit(render.plain(written)) if json_ else render.say(render_attack.wrote(written))
        return
    attacked = attacking.attack(
        store,
        projection or [],
        options,
        queries=queries,
        device=device,
        out=out,
        table=csv,
        plot=plot,
        html=html,
        watch=lambda label, unit: render.progress(label, unit, quiet=json_),
        command=command_line(),
    )
    render.emit(attacked.report.to_dict()) if json_ else render.say(render_attack.said(attacked))


def _alone(**named: object) -> None:
    """Refuse options that measure beside ``--write``, which only writes."""
    from latentstore.errors import UsageError

    given = [f"--{name}" for name, value in named.items() if value]
    if given:
        raise UsageError(
            f"--write only writes pictures, and {', '.join(given)} asks for a measurement. Leave "
            "one of the two out."
        )


COMMANDS = (attack,)
