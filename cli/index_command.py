"""The command index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import STORE, Json, Store, guarded


@guarded
def index(
    store: Store = STORE,
    projection: Annotated[
        Path | None,
        typer.Option(
            help="W to project by.", show_default="that of the collection's own index, else its analytic map"
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the collection's own map anew, on all of its images.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Project all images again, by the same map.")
    ] = False,
    factory: Annotated[
        str | None,
        typer.Option(help="Also make an approximate index: FAISS's factory string (IVF256,Flat; HNSW32)."),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            help="FAISS's search parameters (nprobe=16).", show_default="a sixteenth of an IVF's cells"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Keep it in this folder, for other programs. match does not look there, and removed images "
            "stay in it until this command is run again.",
            show_default="in the store",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare what is kept with its checksums (exit 3)."),
    ] = False,
    json_: Json = False,
) -> None:
    """Keep a collection's projected images, so that match searches at once; run it again after changes.

    Only new and changed images are projected. Images that are removed from the store leave it at once.

    Example: latentstore index --store latents.zarr --factory IVF256,Flat
    """
    from cli import render, render_index
    from cli.indexing import IndexOptions, check_indexes, run_index

    options = IndexOptions(projection, refit, rebuild, factory, parameters or "", out)
    if check:
        with render.progress("check", "images", quiet=json_) as (on_start, on_rows):
            found = check_indexes(store, out, on_start=on_start, on_rows=on_rows)
        render.emit(render.plain(found)) if json_ else render.say(render_index.checked(found))
        if found.findings:
            raise typer.Exit(3)
        return
    with render.progress("index", "images", quiet=json_) as (on_start, on_rows):
        made = run_index(
            store,
            options,
            on_start=on_start,
            on_rows=on_rows,
            say=(lambda text: None) if json_ else render.note,
        )
    render.emit(render.plain(made)) if json_ else render.say(render_index.indexed(made))


COMMANDS = (index,)
