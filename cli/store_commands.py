"""The commands that keep a store: what is it, is it whole."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.guard import STORE, Json, StoreArgument, guarded


@guarded
def info(store: StoreArgument = STORE, json_: Json = False) -> None:
    """Say what a store is: rows, statuses, space, how it was made, how complete it is.

    Example: latentstore info latents.zarr
    """
    from cli import render
    from cli.keeping import describe_store

    facts = describe_store(store)
    render.emit(facts) if json_ else render.say(render.facts(facts))


@guarded
def verify(
    store: StoreArgument = STORE,
    sample: Annotated[int, typer.Option(help="Encode so many rows again and compare.", min=0)] = 0,
    repair: Annotated[bool, typer.Option(help="Make the damaged shards, and only those, anew.")] = False,
    json_: Json = False,
) -> None:
    """Check every checksum, record and manifest of a store; name what is damaged (exit 3).

    Example: latentstore verify latents.zarr --sample 16
    """
    from cli import render
    from cli.keeping import run_verify

    with render.progress("verify", "rows", quiet=json_) as (on_start, on_rows):
        found, repaired = run_verify(store, sample=sample, repair=repair, on_start=on_start, on_rows=on_rows)
    render.emit({**render.plain(found), "repaired": repaired}) if json_ else render.say(
        render.verified(found, store, repaired)
    )
    if found.damages:
        raise typer.Exit(3)


COMMANDS = (info, verify)
