"""What the commands do, without Typer: encode, simulate, match. They return plain data; nothing prints."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cli.collection import BLOCK, Collection
from cli.solving import SolveOptions, fit, load_projection
from latentstore import encoders, images, search
from latentstore.encode import EncodeSummary, Source, encode
from latentstore.errors import ImageError, StoreWriteError, UsageError
from latentstore.features import SUFFIX, load_queries
from latentstore.importing import IMPORTED
from latentstore.manifest import files_below, list_folder
from latentstore.results import Candidate, Match
from latentstore.schema import LATENTS, Posterior, check_space
from latentstore.simulate import Diffusion, GaussianPrior, simulate
from latentstore.store import LatentStore, exists, locate, open_store
from solvers.errors import ProjectionFormatError
from solvers.projection import Projection
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


@dataclass(frozen=True)
class MatchResult:
    """Matches of every readable query, the queries that could not be read, and the map that was used."""

    matches: list[Match]
    unreadable: list[tuple[str, str]]
    projection: str
    method: str
    made: bool
    backend: str
    note: str = ""


def run_match(
    queries: list[Path],
    store: Path,
    *,
    projection: Path | None = None,
    top: int = 5,
    backend: search.Backend = "auto",
    device: str = "auto",
) -> MatchResult:
    """Rank the collection's images for query pictures (files or folders).

    Without a projection the collection's analytic map is made, kept in the store, and used again.
    """
    files = _query_files(queries, exists(store) and open_store(store).kind == IMPORTED)
    if top < 1:
        raise UsageError(f"--top is {top}; at least 1 is needed.")
    chosen = search.select_backend(backend)
    given = None if projection is None else load_projection(projection)
    collection = Collection.open(store)
    collection.require_gallery()
    if given is not None:
        given.check_space(collection.store.space.id)
    present = collection.store
    if present.kind == IMPORTED and all(path.suffix.lower() == SUFFIX for path in files):
        names, latents, unreadable = load_queries(files, present.space)
    elif present.space.encoder == IMPORTED:
        named = present.provenance["encoder"]["named"]
        raise UsageError(
            f"{store} holds imported latents whose encoder is only named ({named}): its "
            f"queries are {SUFFIX} files of the same encoder, not pictures."
        )
    else:
        encoder = encoders.load_for(present.space, present.provenance["encoder"], device=device)
        names, latents, unreadable = encode_files(files, encoder)
    if not names:
        listed = "; ".join(f"{n}: {why}" for n, why in unreadable[:3])
        raise UsageError(f"None of the {len(files)} queries can be read ({listed}).")
    W, name, made = (given, str(projection), False) if given is not None else own_projection(collection)
    scores, rows = search.top_k(
        np.asarray(W.queries(latents)),
        (
            (
                collection.gallery[at : at + BLOCK],
                np.asarray(W.references(collection.read(collection.gallery[at : at + BLOCK]))),
            )
            for at in range(0, len(collection.gallery), BLOCK)
        ),
        max(top, 10) + _hidden(collection, max(top, 10)),
        backend=backend,
    )
    matches = [
        Match(
            query=name_,
            group="",
            margin=_margin(s, collection.labels(collection.identity[found])),
            candidates=_origins(collection, s, found)[:top],
        )
        for name_, s, found in zip(names, scores, rows, strict=True)
    ]
    return MatchResult(matches, unreadable, name, W.method, made, chosen, collection.near[1])


def _hidden(collection: Collection, top: int) -> int:
    """Return how many rows at most the copies and near-duplicates of ``top`` origins can take up."""
    sizes = sorted((len(rows) for row, rows in collection.twins.items() if row == rows[0]), reverse=True)
    return sum(sizes[:top]) - len(sizes[:top])


def _origins(collection: Collection, scores: Any, rows: Any) -> list[Candidate]:
    """Return ranked rows as candidates, each origin once: its best row, with the others' paths."""
    found: list[Candidate] = []
    seen: set[int] = set()
    for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
        if row not in seen:
            others = [r for r in collection.twins.get(row, np.empty(0, np.int64)).tolist() if r != row]
            seen |= {row, *others}
            path, identity = str(collection.path[row]), str(collection.identity[row])
            found.append(Candidate(path, identity, score, near=[str(p) for p in collection.path[others]]))
    return found


def _margin(scores: Any, labels: Any) -> float | None:
    """Return the top score less the best of another origin, or None when no other is near the top."""
    others = np.flatnonzero(labels != labels[0])
    return float(scores[0] - scores[others[0]]) if len(others) else None


def own_projection(collection: Collection) -> tuple[Projection, str, bool]:
    """Return the collection's analytic map, kept in the store; made anew when its latents have changed.

    Returns
    -------
    projection, path, made
    """
    rank = min(512, collection.store.layout.dim)
    folder = collection.store.root / "projections"
    if collection.store.array != LATENTS:
        folder /= collection.store.array
    path = folder / f"analytic-{rank}-{collection.data_hash}.safetensors"
    if path.exists():
        try:
            return Projection.load(path), str(path), False
        except ProjectionFormatError:
            pass  # damaged: it is ours to make again
    W, _, _ = fit(collection, SolveOptions(method="analytic", rank=rank))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("analytic-*.safetensors"):
            old.unlink(missing_ok=True)
        W.save(path)
    except OSError as exc:
        raise StoreWriteError(
            f"The collection's analytic map could not be kept at {path}: {exc.strerror or exc}. Make room or "
            "permission there, or make a map elsewhere with solve --method analytic and name it with "
            "--projection."
        ) from exc
    return W, str(path), True


def encode_files(
    files: list[Path], encoder: encoders.Encoder
) -> tuple[list[str], Any, list[tuple[str, str]]]:
    """Encode pictures that are in no store.

    Returns
    -------
    names, latents, unreadable
        ``latents`` is (n, dim) float32; ``unreadable`` holds (name, why).
    """
    names: list[str] = []
    blocks: list[Any] = []
    unreadable: list[tuple[str, str]] = []
    size = encoder.space.image_size
    for at in range(0, len(files), encoder.batch):
        pixels = encoders.blank_batch(encoder)
        read: list[str] = []
        for path in files[at : at + encoder.batch]:
            try:
                pixels[len(read)] = images.load(path, size).rgb
                read.append(str(path))
            except ImageError as exc:
                unreadable.append((str(path), f"{exc.status}: {exc.reason}"))
        latents = encoder.encode(pixels, np.full(encoder.batch, -1))[: len(read)]
        finite = [bool(np.isfinite(row).all()) for row in latents]
        unreadable += [
            (n, "not_finite: its latent is not finite") for n, f in zip(read, finite, strict=True) if not f
        ]
        names += [n for n, f in zip(read, finite, strict=True) if f]
        blocks.append(latents[np.array(finite, bool)])
    return (
        names,
        np.concatenate(blocks) if blocks else np.empty((0, encoder.space.dim), np.float32),
        unreadable,
    )


def _query_files(queries: list[Path], imported: bool) -> list[Path]:
    """Return the files, and those below the folders: of imported latents ``.npy`` files before pictures."""
    files: list[Path] = []
    for query in queries:
        latents = sorted(files_below(query, {SUFFIX})) if imported and query.is_dir() else []
        if latents:
            files += [query / os.fsdecode(name) for name in latents]
        elif query.is_dir():
            for row in list_folder(query).select(["path", "path_raw"]).to_pylist():
                raw = row["path_raw"]
                files.append(query / (row["path"] if raw is None else os.fsdecode(raw)))
        elif query.exists():
            files.append(query)
        else:
            raise UsageError(f"There is no query image {query} (looked in {Path.cwd()}).")
    return files
