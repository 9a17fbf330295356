"""The command that takes what was published elsewhere: latents, or a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.guard import STORE, Json, Store, guarded
from cli.options import Dtype, PosteriorOption

_OF_FEATURES = (
    "encoder_name",
    "image_size",
    "posterior",
    "manifest",
    "dtype",
    "shard_rows",
    "codec",
    "follow_links",
    "threads",
    "retry_bad",
    "retry_changed",
    "strict",
)
_OF_A_WEIGHT = ("out", "key")


def _import(
    published: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|WEIGHT",
            help="A folder of .npy files, one an image (T000000_1.npy); or a weight (.pth, .safetensors).",
        ),
    ],
    store: Store = STORE,
    out: Annotated[
        Path | None,
        typer.Option(help="Where a weight goes, as a projection.", show_default="W-imported.safetensors"),
    ] = None,
    encoder_name: Annotated[
        str | None, typer.Option(help="The encoder of the features. Latents of other spaces are refused.")
    ] = None,
    space_of: Annotated[
        Path | None,
        typer.Option(help="A store: what is imported belongs to its very space (encoder, size, posterior)."),
    ] = None,
    latent_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Of one latent.", show_default="4,32,32")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels that was encoded.", show_default="256", min=1)
    ] = None,
    posterior: Annotated[
        PosteriorOption | None,
        typer.Option(
            help="What of the VAE's posterior was kept; the paper drew once.", show_default="sample"
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="CSV or Parquet list of the files: path, and identity, role, group, split, model, prompt, "
            "strength. Without it file names tell identity and role."
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of a new store.", show_default="float16")] = None,
    shard_rows: Annotated[int | None, typer.Option(help="Rows of a shard, a multiple of 84.")] = None,
    codec: Annotated[str | None, typer.Option(help="As for encode.", show_default="none")] = None,
    follow_links: Annotated[bool, typer.Option(help="Accept links that lead out of the folder.")] = False,
    threads: Annotated[int | None, typer.Option(help="That read.", show_default="one a core", min=1)] = None,
    retry_bad: Annotated[bool, typer.Option("--retry-bad", help="Read files of bad rows again.")] = False,
    retry_changed: Annotated[
        bool, typer.Option("--retry-changed", help="Read files again that were changed since.")
    ] = False,
    key: Annotated[str | None, typer.Option(help="The tensor of a weight's file that holds several.")] = None,
    strict: Annotated[bool, typer.Option(help="Exit with 3 when any row is not ok.")] = False,
    json_: Json = False,
) -> None:
    """Take latents that others published into a store, or the weight that they trained as a projection.

    Nothing is unpickled. A file that cannot be used becomes a row with its reason. Run again, it goes on.

    Example: latentstore import features --store sd2.zarr --encoder-name stabilityai/stable-diffusion-2

    Example: latentstore import weight.pth --out W.safetensors --space-of sd2.zarr
    """
    from cli import importing, render
    from cli.progress import tracked
    from latentstore.errors import UsageError

    given = {name: value for name, value in locals().items() if value not in (None, False)}
    shape = None if latent_shape is None else importing.parse_shape(latent_shape)
    weight = importing.is_weight(published)
    for name in _OF_FEATURES if weight else _OF_A_WEIGHT:
        if name in given:
            kinds = ("a folder of features", "a weight")
            raise UsageError(
                f"--{name.replace('_', '-')} is for {kinds[not weight]}, and {published} is {kinds[weight]}. "
                "Leave it out."
            )
    if weight:
        path = out or Path("W-imported.safetensors")
        notes: list[str] = []
        W = importing.run_import_weight(
            published, path, space_of=space_of, latent_shape=shape, key=key, on_note=notes.append
        )
        facts = {"projection": str(path), "dim": W.dim, "rank": W.rank, "space_id": W.space_id}
        said_of_it = "\n".join([importing.imported_weight(W, path), *(f"  {note}" for note in notes)])
        render.emit({**facts, **W.provenance, "notes": notes}) if json_ else render.say(said_of_it)
        return
    kept: Any = posterior and posterior.value
    said = importing.Said(encoder_name, space_of, shape, image_size, kept)
    with tracked("import", "rows", first="listing", quiet=json_) as shown:
        summary = importing.run_import(
            published,
            store,
            said,
            manifest=manifest,
            dtype=dtype and dtype.value,
            shard_rows=shard_rows,
            codec=codec,
            follow_links=follow_links,
            threads=threads,
            retry_bad=retry_bad,
            retry_changed=retry_changed,
            on_start=shown.on_start,
            on_rows=shown.on_rows,
            on_times=shown.on_times,
        )
    render.emit(summary.__dict__) if json_ else render.say(importing.imported(summary))
    if strict and summary.counts.get("ok", 0) != summary.rows:
        raise typer.Exit(3)
    if render.none_usable(summary):
        raise typer.Exit(1)


_import.__name__ = "import"  # the command's name, which no function can be defined under
COMMANDS = (guarded(_import),)
