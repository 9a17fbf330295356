"""The command ``translate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.guard import Device, Json, guarded
from cli.options import SplitOption

if TYPE_CHECKING:
    from cli.translating import Translated
    from cli.translation_plan import Originals


@guarded
def translate(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGES]",
            help="A folder of originals, tar shards, or the URL of one.",
            show_default="images",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A diffusers pipeline: a folder or a hub name (NAME=FOLDER calls it NAME), or a or b, which "
            "come with the package and are small. May be repeated."
        ),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Instead of IMAGES: translate the originals of this store.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="A list of the originals, as encode takes it; also with their prompts."),
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(help="Above 0, 1 at most. May be repeated.", show_default="0.9, as the paper trains"),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="May be repeated.", show_default="the column prompt of the originals' manifest"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="CSV or Parquet list of each image's own: path or identity, and prompt."),
    ] = None,
    per_origin: Annotated[
        int | None,
        typer.Option(
            help="Translations of an image by each model at each strength.",
            min=1,
            show_default="one under each of its prompts",
        ),
    ] = None,
    split: Annotated[
        SplitOption, typer.Option(help="Translate only images of this split.")
    ] = SplitOption.all,
    limit: Annotated[
        int | None,
        typer.Option(help="Images to translate, at most; drawn by the seed.", min=1, show_default="all"),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Of the whole schedule; a strength runs that part of them.", min=1)
    ] = 20,
    guidance: Annotated[
        float, typer.Option(help="Of classifier-free guidance; 1 turns it off, and halves the work.")
    ] = 7.5,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side in pixels of what is translated.", min=8, show_default="the model's own"),
    ] = None,
    quality: Annotated[int, typer.Option(help="Of the JPEG files.", min=1, max=100)] = 90,
    batch: Annotated[int, typer.Option(help="Pictures translated at once.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", min=0)] = 0,
    revision: Annotated[str | None, typer.Option(help="Of hub repositories.")] = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder of the translations.")] = Path("translations"),
    json_: Json = False,
) -> None:
    """Translate images by text-guided diffusion models; run it again to go on, or to add to it.

    The folder's manifest.csv lists originals and translations, with the originals' identities and splits, so
    that encode --manifest puts both into one store of pairs.

    Example: latentstore translate photos --model ./sd2 --strength 0.5 --strength 0.9 --prompt "a painting"
    """
    from cli import render
    from cli.progress import tracked
    from cli.translating import TranslateOptions
    from cli.translating import translate as run_translate

    options = TranslateOptions(
        models=tuple(model or ()),
        strengths=tuple(strength or (0.9,)),
        prompt=tuple(prompt or ()),
        prompts=prompts,
        per_origin=per_origin,
        split=None if split is SplitOption.all else split.value,
        steps=steps,
        guidance=guidance,
        limit=limit,
        image_size=image_size,
        quality=quality,
        batch=batch,
        seed=seed,
        device=device,
        revision=revision,
    )
    originals = _originals(images, store, manifest)
    with tracked("translate", "images", first="loading the model", quiet=json_) as shown:
        done = run_translate(originals, out, options, on_start=shown.on_start, on_rows=shown.on_rows)
    render.emit(render.plain(done)) if json_ else render.say(_said(done))
    if not done.translations:
        raise typer.Exit(1)


def _originals(images: list[str] | None, store: Path | None, manifest: Path | None) -> Originals:
    from cli.translation_plan import Originals
    from latentstore.errors import UsageError
    from latentstore.sources import Source

    if store is None:
        return Originals.of_source(Source.of(images, manifest))
    if images or manifest is not None:
        other = f"--manifest {manifest}" if manifest is not None else " ".join(images or ())
        raise UsageError(f"{other} and --store {store} both name originals. Leave one of the two out.")
    return Originals.of_store(store)


def _said(done: Translated) -> str:
    """Return what was done, and how it becomes a store of pairs."""
    from cli.render import counted

    listed = counted(done.translations, "translation")
    lines = [f"{done.out}: {listed}, listed with their originals in {done.manifest}"]
    rate = f", {done.made / done.seconds:,.1f} images/s" if done.made and done.seconds else ""
    steps = ", ".join(f"{n} at {strength}" for strength, n in done.steps.items())
    lines.append(
        f"  of {counted(done.originals, 'original')} by {', '.join(done.models)}; steps run: {steps}"
    )
    if done.made:
        lines.append(f"  made {done.made:,} now in {done.seconds:.1f} s{rate}")
    if done.kept:
        lines.append(f"  {done.kept:,} were there already")
    lines.append(f"  next: latentstore encode --manifest {done.manifest} --store pairs.zarr")
    return "\n".join([*lines, *_notes(done)])


def _notes(done: Translated) -> list[str]:
    from cli.render import counted

    notes = []
    if done.n_bad:
        more = f"; and {done.n_bad - 3:,} more" if done.n_bad > 3 else ""
        named = "; ".join(f"{path}: {why}" for path, why in done.bad[:3])
        notes.append(f"{counted(done.n_bad, 'original')} could not be used: {named}{more}.")
    if done.unprompted:
        notes.append(f"{counted(done.unprompted, 'original')} without a prompt left out.")
    if done.strangers:
        notes.append(f"{counted(done.strangers, 'row')} of the prompts' file name no original.")
    if done.cut:
        notes.append(f"{counted(done.cut, 'prompt')} longer than the model reads: the rest was not read.")
    if done.gone:
        notes.append(f"{counted(done.gone, 'translation')} of originals that are gone, not listed.")
    return [f"Note: {note}" for note in notes]


COMMANDS = (translate,)
