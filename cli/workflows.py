"""What the commands do, without Typer: encode, simulate, match. They return plain data; nothing prints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cli.collection import Collection
from latentstore import encoders
from latentstore.encode import EncodeSummary, Source, encode
from latentstore.errors import UsageError
from latentstore.schema import Posterior, check_space
from latentstore.simulate import Diffusion, GaussianPrior, simulate
from latentstore.store import LatentStore, exists, locate, open_store
from solvers.spectrum import fit_spectrum

Named = str | Path | Sequence[str | Path] | None
"""What a user names: a folder, a URL, a pattern, or several tar shards."""
OnStart = Callable[[int, int], None]
OnRows = Callable[[int, int], None]


def run_encode(
    folder: Named | Source,
    store: Path,
    *,
    encoder: str | None = None,
    manifest: Path | None = None,
    image_size: int | None = None,
    posterior: Posterior | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    shard_rows: int | None = None,
    codec: str | None = None,
    device: str = "auto",
    precision: encoders.Precision | None = None,
    compiled: bool | None = None,
    batch: int | None = None,
    revision: str | None = None,
    follow_links: bool = False,
    skip_unreachable: bool = False,
    max_pixels: int | None = None,
    threads: int | None = None,
    retry_bad: bool = False,
    retry_changed: bool = False,
    check_sources: bool = False,
    isolate: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    on_start: OnStart | None = None,
    on_rows: OnRows | None = None,
    on_times: Callable[[dict[str, float]], None] | None = None,
) -> EncodeSummary:
    """Encode a folder, tar shards, a URL or a manifest into a store.

    An existing store goes on with its own settings; any other that is named is refused.

    Raises
    ------
    UsageError
        Another dtype or shard size than the existing store's.
    SpaceMismatchError
        Another encoder, image size, posterior or seed than the existing store's.
    """
    source, recipe = what_to_encode(
        folder,
        store,
        encoder=encoder,
        manifest=manifest,
        image_size=image_size,
        posterior=posterior,
        seed=seed,
        dtype=dtype,
        shard_rows=shard_rows,
        codec=codec,
        device=device,
        precision=precision,
        compiled=compiled,
        batch=batch,
        revision=revision,
        follow_links=follow_links,
        skip_unreachable=skip_unreachable,
    )
    run = partial(
        encode,
        source,
        store,
        encoders.load_encoder(**recipe),
        dtype=dtype or "float16",
        shard_rows=shard_rows,
        codec=codec,
        max_pixels=max_pixels,
        threads=threads,
        retry_bad=retry_bad,
        retry_changed=retry_changed,
        check_sources=check_sources,
        isolate=isolate,
        on_start=on_start,
        on_rows=on_rows,
        on_times=on_times,
    )
    if workers is None and scheduler is None:
        summary = run()
        summary.notes += source.notes
        return summary
    import distributed  # noqa: F401 (it sets the levels of its loggers when imported)

    from latentstore.cluster import connect, describe, on_cluster

    # Its threads may speak up after the cluster is closed; what they mean is raised, in a sentence.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with connect(workers=workers, scheduler=scheduler) as client:
        summary = run(run=on_cluster(client, recipe, threads=threads))
        summary.ran_on = describe(client)
    summary.notes += source.notes
    return summary


def what_to_encode(
    folder: Named | Source,
    store: Path,
    *,
    encoder: str | None = None,
    manifest: Path | None = None,
    image_size: int | None = None,
    posterior: Posterior | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    shard_rows: int | None = None,
    codec: str | None = None,
    device: str = "auto",
    precision: encoders.Precision | None = None,
    compiled: bool | None = None,
    batch: int | None = None,
    revision: str | None = None,
    follow_links: bool = False,
    skip_unreachable: bool = False,
) -> tuple[Source, dict[str, Any]]:
    """Return the images, and the arguments of :func:`~latentstore.encoders.load_encoder`.

    What is left open comes from the store when there is one. Raises like :func:`run_encode`.
    """
    # Listed before a model is loaded, so that a wrong path is told at once.
    group, _ = locate(store)
    if isinstance(folder, Source):
        source = folder
    elif folder is None and manifest is None and exists(group):
        source = Source.recorded(open_store(group).origin)
    else:
        source = Source.of(folder, manifest, follow_links=follow_links, skip_unreachable=skip_unreachable)
    source.check()
    present = open_store(store) if exists(store) else None
    settings: dict[str, Any] = {}
    if present is None:
        name, space = encoder or encoders.DEFAULT, None
    else:
        _same_layout(present, dtype, shard_rows, codec)
        facts, space = present.provenance["encoder"], present.space
        name, revision = encoder or str(facts["name"]), revision or facts.get("revision")
        if name == facts["name"]:
            settings = encoders.recorded_settings(facts, device)
    recipe: dict[str, Any] = {
        "name": name,
        "image_size": image_size or (space.image_size if space else 256),
        "posterior": posterior or (space.posterior if space else "mean"),
        "seed": seed if seed is not None else (space.seed or 0 if space else 0),
        "device": device,
        "revision": revision,
        "precision": precision or settings.get("precision", "auto"),
        "compiled": settings.get("compiled", False) if compiled is None else compiled,
        "batch": batch or settings.get("batch"),
    }
    return source, recipe


def _same_layout(present: LatentStore, dtype: str | None, shard_rows: int | None, codec: str | None) -> None:
    layout = present.layout
    settled = (
        ("dtype", dtype, layout.dtype),
        ("shard-rows", shard_rows, layout.shard_rows),
        ("codec", codec, layout.codec),
    )
    for name, asked, has in settled:
        if asked not in (None, has):
            raise UsageError(
                f"--{name} is {asked}, but {present.path} was made with {has}; it is settled when a store is "
                f"made. Leave --{name} out to go on, or choose another --store."
            )


def run_simulate(
    store: Path,
    out: Path,
    diffusion: Diffusion,
    *,
    prior: Path | None = None,
    per_origin: int = 1,
    on_start: OnStart | None = None,
    on_rows: OnRows | None = None,
) -> LatentStore:
    """Fit the prior on a training split alone and write a store of simulated pairs.

    Parameters
    ----------
    prior : Path, optional
        The store whose training split the prior is fitted on; by default ``store`` itself.
    """
    collection = Collection.open(store)
    collection.require_gallery()
    if store.absolute() == out.absolute():
        raise UsageError(f"--store and --out are both {out}; simulated latents go into a store of their own.")
    fitted_on = collection if prior is None else Collection.open(prior)
    check_space(fitted_on.store.space.id, collection.store.space.id, what=f"--prior {fitted_on.store.path}")
    rows = fitted_on.gallery[fitted_on.split[fitted_on.gallery] == "train"]
    if len(rows) < 2:
        raise UsageError(
            f"{fitted_on.store.path} has {len(rows)} valid images in its training split (8 identities in 10, "
            "by hash); the simulator fits its prior on at least 2. Encode more images."
        )
    spectrum = fit_spectrum(_Blocks(fitted_on, rows), fitted_on.store.layout.dim, len(rows))
    return simulate(
        collection.store,
        out,
        GaussianPrior.from_spectrum(spectrum.mean, spectrum.values, spectrum.vectors),
        diffusion,
        prior_id=fitted_on.data_hash,
        per_origin=per_origin,
        on_start=on_start,
        on_rows=on_rows,
    )


class _Blocks:
    """A re-iterable over the latents of rows: fits make more than one pass."""

    def __init__(self, collection: Collection, rows: Any) -> None:
        self.collection, self.rows = collection, rows

    def __iter__(self) -> Any:
        return iter(self.collection.blocks(self.rows))
