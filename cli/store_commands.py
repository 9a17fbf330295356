"""The commands that keep a store: what is it, is it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import STORE, Device, Json, Store, StoreArgument, guarded


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
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Mend the damaged shards, and only those; from their files if need be."
        ),
    ] = False,
    give_up_rows: Annotated[
        bool, typer.Option("--give-up-rows", help="Mend also where rows are lost, as their files are gone.")
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="Also find image files of another size or time than was read.")
    ] = False,
    check_sources: Annotated[
        bool, typer.Option("--check-sources", help="Also read the image files, and find other contents.")
    ] = False,
    json_: Json = False,
) -> None:
    """Check every checksum, record and manifest of a store; name what is damaged (exit 3).

    Example: latentstore verify latents.zarr --sample 16 --sources
    """
    from cli import render
    from cli.keeping import run_verify

    with render.progress("verify", "rows", quiet=json_) as (on_start, on_rows):
        found, repaired = run_verify(
            store,
            sample=sample,
            repair=repair,
            give_up_rows=give_up_rows,
            sources=sources,
            content=check_sources,
            on_start=on_start,
            on_rows=on_rows,
        )
    render.emit({**render.plain(found), "repaired": repaired}) if json_ else render.say(
        render.verified(found, store, repaired)
    )
    if found.findings:
        raise typer.Exit(3)


@guarded
def remove(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IMAGE]...", help="Paths as the store lists them, or picture files."),
    ] = None,
    identity: Annotated[list[str] | None, typer.Option(help="Remove all rows of an identity.")] = None,
    store: Store = STORE,
    reason: Annotated[str, typer.Option(help="Recorded with the rows.")] = "taken down",
    near: Annotated[
        bool, typer.Option("--near", help="Also remove what was grouped with them as near-duplicates.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json_: Json = False,
) -> None:
    """Take images down: zeros in every array, facts out of the manifest, and never encoded again.

    Copies of the same content go with them. Without any image it finishes a removal that was interrupted.
    The image files themselves are not touched.

    Example: latentstore remove cats/0007.jpg --store latents.zarr --reason "request 12"
    """
    from cli import render
    from cli.takedown import choose, run_remove

    chosen = choose(store, images or [], identity or [], near=near)
    if chosen.rows and not json_:
        render.note(render.near_left(chosen))
    if chosen.rows and not yes:
        listed = "".join(f"\n  {render.printable(p)}" for p in chosen.paths[:20])
        more = f"\n  and {len(chosen.rows) - 20:,} more" if len(chosen.rows) > 20 else ""
        render.note(
            f"{render.counted(len(chosen.rows), 'row')} of {store} will be zeroed for good:{listed}{more}"
        )
        render.confirm("Remove them?")
    done = run_remove(store, chosen.rows, reason=reason)
    told = {**render.plain(done), "near_left": chosen.near, "note": chosen.note}
    render.emit(told) if json_ else render.say(render.removed(done))


@guarded
def migrate(store: StoreArgument = STORE, json_: Json = False) -> None:
    """Bring a store of an older schema up to date; encode does so, too. Latents are not touched.

    Example: latentstore migrate latents.zarr
    """
    from cli import render
    from cli.keeping import run_migrate

    before, after = run_migrate(store)
    text = f"is of schema {after}"
    if before != after:
        text = f"was of schema {before}, and {text} now"
    render.emit({"before": before, "after": after}) if json_ else render.say(f"{store} {text}.")


@guarded
def plan(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGES]", help="A folder, tar shards, or the URL of one.", show_default="images"
        ),
    ] = None,
    store: Store = STORE,
    encoder: Annotated[str | None, typer.Option(help="As for encode.", show_default="tiny")] = None,
    manifest: Annotated[Path | None, typer.Option(help="As for encode.")] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(help="Also for so many rows; repeat it.", show_default="2M, 100M", min=1),
    ] = None,
    machines: Annotated[str, typer.Option(help="For so many machines like this one.")] = "1,4,16",
    sample: Annotated[int, typer.Option(help="Images to try at least; 0 measures nothing.", min=0)] = 32,
    image_size: Annotated[int | None, typer.Option(help="As for encode.", min=8)] = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Say what encoding will take (rows, bytes, hours) from a measured sample, before anything is written.

    encode --dry-run does the same with any of encode's options. What cannot fit on the disk is refused.

    Example: latentstore plan photos --rows 2000000 --machines 1,8
    """
    from cli import render
    from cli.planning import run_plan
    from cli.render_plan import planned

    found = run_plan(
        images,
        store,
        encoder=encoder,
        manifest=manifest,
        rows=rows,
        machines=machines,
        sample=sample,
        image_size=image_size,
        device=device,
    )
    render.emit(render.plain(found)) if json_ else render.say(planned(found))


@guarded
def duplicates(
    store: StoreArgument = STORE,
    threshold: Annotated[
        float | None,
        typer.Option(help="Least score, a cosine.", show_default="0.85 to 0.95, by the images' own scores"),
    ] = None,
    json_: Json = False,
) -> None:
    """Find near-duplicate origins (re-compressed, resized, brightened) and group them, in the store.

    evaluate and match then count a group as one origin.

    Example: latentstore duplicates latents.zarr
    """
    from cli import render
    from cli.duplicates import run_duplicates

    with render.progress("duplicates", "images", quiet=json_) as (on_start, on_rows):
        found = run_duplicates(store, threshold=threshold, on_start=on_start, on_rows=on_rows)
    render.emit(render.plain(found)) if json_ else render.say(render.near_duplicates(found))


@guarded
def moments(
    store: StoreArgument = STORE,
    parts: Annotated[int, typer.Option(help="Groups of photos with sums of their own, by hash.", min=1)] = 10,
    per_model: Annotated[
        bool, typer.Option("--per-model", help="Keep sums of each translation model, too.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Sum on so many local processes, a part each.", min=1)
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Sum on the Dask cluster at this address.")
    ] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Delete what is kept, and make nothing.")] = False,
    json_: Json = False,
) -> None:
    """Sum a store's training pairs and its gallery once, and keep the sums for every closed form.

    solve does this by itself where it pays. Stopped, it goes on where it was.

    Example: latentstore moments pairs.zarr --workers 2
    """
    from cli import render
    from cli.summing import drop_moments, kept_text, run_moments

    if drop:
        freed = drop_moments(store)
        render.emit({"freed": freed}) if json_ else render.say(f"{store}: {render.size(freed)} freed.")
        return
    with render.progress("moments", "pairs", quiet=json_) as (on_start, on_rows):
        kept = run_moments(
            store,
            parts=parts,
            models=per_model,
            workers=workers,
            scheduler=scheduler,
            on_start=on_start,
            on_rows=on_rows,
        )
    render.emit(render.plain(kept)) if json_ else render.say(kept_text(kept))


COMMANDS = (plan, info, verify, remove, migrate, duplicates, moments)
