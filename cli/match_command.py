"""The command match."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import STORE, Device, Json, Store, command_line, guarded
from cli.options import BackendOption


@guarded
def match(
    queries: Annotated[
        list[Path],
        typer.Argument(metavar="QUERY...", help="Pictures, .npy latents, folders of them, or stores."),
    ],
    store: Store = STORE,
    projection: Annotated[
        Path | None, typer.Option(help="W to match with.", show_default="the collection's analytic map")
    ] = None,
    top: Annotated[int, typer.Option(help="Origins to show for each query.")] = 5,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with pictures and heat maps here.", dir_okay=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
    verdict: Annotated[
        bool, typer.Option("--verdict/--no-verdict", help="Say whether the origin is here at all.")
    ] = True,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Search by the index's approximate part.")
    ] = False,
    backend: Annotated[BackendOption, typer.Option(help="What searches, exactly.")] = BackendOption.auto,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Rank the collection's images as origins of suspicious pictures.

    Each query gets a verdict: match, doubtful, or no origin here, with its false-alarm and detection rates
    on this collection. The first search calibrates it, which takes a moment, and keeps it.

    Example: latentstore match suspicious.jpg --store latents.zarr --html why.html
    """
    from cli import render
    from cli.matching import MatchOptions, run_match
    from cli.progress import phases
    from cli.render_match import matched

    options = MatchOptions(projection, top, backend.value, device, verdict, approximate)
    with phases(quiet=json_) as begin:
        found = run_match(queries, store, options, html=html, out=out, phases=begin, command=command_line())
    if json_:
        render.emit(render.plain(found))
    else:
        render.say(matched(found))
        for path in (html, out):
            if path is not None:
                render.say(f"Written: {path}")
    if found.unreadable:
        raise typer.Exit(1)


COMMANDS = (match,)
