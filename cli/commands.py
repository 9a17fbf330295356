"""The commands: parse, call one function, render. Heavy packages are imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.guard import STORE, Device, Json, Store, command_line, guarded
from cli.options import Dtype, Mode, PosteriorOption, PrecisionOption
from cli.solve_command import solve


@guarded
def encode(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGES]",
            help="A folder, tar shards (a .tar, 'shards/*.tar', 'photos-{000..009}.tar'), or the URL of one.",
            show_default="images",
        ),
    ] = None,
    store: Store = STORE,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="tiny, patch (linear, no torch: 0.5 ms an image), a local diffusers folder, or a hub name.",
            show_default="tiny",
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="CSV or Parquet list: path, and identity, role, group, split, model, prompt, strength."
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels that the encoder sees.", show_default="256", min=8)
    ] = None,
    posterior: Annotated[PosteriorOption | None, typer.Option(help="Of a VAE.", show_default="mean")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the posterior's sample, drawn per picture.", show_default="0", min=0),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of a new store.", show_default="float16")] = None,
    shard_rows: Annotated[int | None, typer.Option(help="Rows of a shard, a multiple of 84.")] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="Compress a new store: zstd, blosc, or bitround:K (K bits of the mantissa; lossy).",
            show_default="none: rows are read in place",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub repository.")] = None,
    device: Device = "auto",
    precision: Annotated[
        PrecisionOption | None,
        typer.Option(help="Of the encoder: fp32 on a CPU, bf16 on a GPU that has it.", show_default="auto"),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the encoder first.", show_default="no"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images encoded at once.", show_default="by device", min=1)
    ] = None,
    follow_links: Annotated[bool, typer.Option(help="Accept links that lead out of the folder.")] = False,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Larger images are recorded, not decoded.", min=1, show_default="89478485, or the store's"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="That read and decode.", show_default="one a core", min=1)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Encode in so many local processes.", min=1, show_default="in this one")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Encode on the Dask cluster at this address.")] = None,
    retry_bad: Annotated[bool, typer.Option(help="Make shards with bad rows anew.")] = False,
    retry_changed: Annotated[
        bool, typer.Option("--retry-changed", help="Make shards anew that hold files changed since.")
    ] = False,
    check_sources: Annotated[
        bool,
        typer.Option("--check-sources", help="Read committed files to find changes, not only size and time."),
    ] = False,
    skip_unreachable: Annotated[
        bool,
        typer.Option("--skip-unreachable", help="Record URLs that do not answer as missing, and go on."),
    ] = False,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Decode in processes apart: slower; a crash costs one row.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, from a sample, and write nothing.")
    ] = False,
    strict: Annotated[bool, typer.Option(help="Exit with 3 when any row is not ok.")] = False,
    json_: Json = False,
) -> None:
    """Encode every image once into a store of latents; run it again to resume or to append new files.

    Tar shards are read in WebDataset's layout, without unpacking; URLs by fsspec (s3://, gs://, https://).

    Example: latentstore encode photos --store latents.zarr
    """
    from cli import render
    from cli.planning import run_plan
    from cli.progress import tracked
    from cli.render_plan import planned
    from cli.workflows import run_encode

    options: dict[str, Any] = {
        "encoder": encoder,
        "manifest": manifest,
        "image_size": image_size,
        "posterior": posterior and posterior.value,
        "seed": seed,
        "dtype": dtype and dtype.value,
        "shard_rows": shard_rows,
        "codec": codec,
        "device": device,
        "precision": precision and precision.value,
        "compiled": compiled,
        "batch": batch,
        "revision": revision,
        "follow_links": follow_links,
        "max_pixels": max_pixels,
        "threads": threads,
        "skip_unreachable": skip_unreachable,
    }
    if dry_run:
        found = run_plan(images, store, **options)
        render.emit(render.plain(found)) if json_ else render.say(planned(found))
        return
    with tracked("encode", "images", first="loading the encoder, listing", quiet=json_) as shown:
        summary = run_encode(
            images,
            store,
            **options,
            retry_bad=retry_bad,
            retry_changed=retry_changed,
            check_sources=check_sources,
            isolate=isolate,
            workers=workers,
            scheduler=scheduler,
            on_start=shown.on_start,
            on_rows=shown.on_rows,
            on_times=shown.on_times,
        )
    relative_to = None if manifest is None else Path(images[0]) if images else manifest.absolute().parent
    render.emit(summary.__dict__) if json_ else render.say(render.encode_summary(summary, relative_to))
    if strict and summary.counts.get("ok", 0) != summary.rows:
        raise typer.Exit(3)
    if render.none_usable(summary):
        raise typer.Exit(1)


@guarded
def simulate(
    store: Store = STORE,
    out: Annotated[Path, typer.Option(help="The new store of pairs.")] = Path("simulated.zarr"),
    alpha_bar: Annotated[float, typer.Option(help="Noise level ᾱ; less is a stronger translation.")] = 0.2,
    prompt_strength: Annotated[float, typer.Option(help="How far a prompt moves the prior's mean.")] = 0.3,
    mode: Annotated[Mode, typer.Option(help="A draw, or Lemma 1's one-step mean.")] = Mode.sample,
    per_origin: Annotated[int, typer.Option(help="Translations of each origin.")] = 1,
    prior: Annotated[
        Path | None,
        typer.Option(help="Store whose training split the prior is fitted on.", show_default="--store"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, drawn per row.", min=0)] = 0,
    json_: Json = False,
) -> None:
    """Draw translations of every origin by the analytic diffusion, into a store of pairs of its own.

    The prior is fitted on the training split alone. It is a diffusion model with a known answer, not a
    text-guided network: figures on it are an oracle's.

    Example: latentstore simulate --store latents.zarr --out simulated.zarr
    """
    from cli import render
    from cli.workflows import run_simulate
    from latentstore.simulate import Diffusion

    diffusion = Diffusion(alpha_bar, prompt_strength, mode.value, seed)
    with render.progress("simulate", "rows", quiet=json_) as (on_start, on_rows):
        made = run_simulate(
            store, out, diffusion, prior=prior, per_origin=per_origin, on_start=on_start, on_rows=on_rows
        )
    facts: dict[str, Any] = {
        "store": str(out),
        "rows": len(made),
        "model": diffusion.name,
        "counts": made.counts(),
    }
    counted = ", ".join(f"{n:,} {status}" for status, n in facts["counts"].items())
    render.emit(facts) if json_ else render.say(
        f"{out}: {len(made):,} rows ({counted}), {len(made) // (1 + per_origin):,} origins with {per_origin} "
        f"simulated translation{'s' * (per_origin > 1)} each ({diffusion.name})"
    )


@guarded
def demo(
    images: Annotated[
        Path | None, typer.Option(help="Your own folder.", show_default="photographs of scikit-image")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    rank: Annotated[int, typer.Option(help="Columns of W.")] = 512,
    limit: Annotated[int, typer.Option(help="Use at most so many images.")] = 3000,
    image_size: Annotated[int, typer.Option(help="Side in pixels that the encoder sees.")] = 256,
    budget: Annotated[float, typer.Option(help="Seconds of CosFace training.")] = 40.0,
    translated: Annotated[
        int, typer.Option(help="Test pictures to translate by each of the package's models.", min=0)
    ] = 30,
    json_: Json = False,
) -> None:
    """Run the whole way on real photographs and write a page that shows how well origins are found.

    Example: latentstore demo --images photos --out demo
    """
    from cli import render
    from cli.demo import DemoOptions, run_demo

    options = DemoOptions(
        images=images,
        out=out,
        rank=rank,
        limit=limit,
        image_size=image_size,
        budget=budget,
        translated=translated,
    )
    result = run_demo(options, say=(lambda text: None) if json_ else render.say, command=command_line())
    if json_:
        render.emit(result.report.to_dict())
    else:
        render.say(render.demonstrated(result))


COMMANDS = (demo, encode, simulate, solve)
