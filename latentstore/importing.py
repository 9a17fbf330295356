"""Published latents into a store like an encoded one: the same rows, statuses, commits and resuming."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentstore import images
from latentstore._version import __version__
from latentstore.create import create
from latentstore.encode import EncodeSummary, Job, check_source, settle_links
from latentstore.encoders.base import Latents, Pictures
from latentstore.errors import EncoderError, ImageError, LatentStoreError, UsageError
from latentstore.features import PUBLISHED_SHAPE, Feature, Features
from latentstore.manifest import new_inputs
from latentstore.migrate import migrate
from latentstore.removal import finish
from latentstore.retries import bad_rows, committed_changes, rows_again
from latentstore.schema import LATENTS, Layout, Posterior, Space, StoreSpec, check_space
from latentstore.shards import ShardWriter
from latentstore.store import LatentStore, exists, locate, open_store, settle, writing
from latentstore.tasks import Batch, OnRows, OnTimes, ShardOutcome, ShardTask

IMPORTED: Final = "imported"
"""The kind of an imported store, and the encoder of its space where that is only named."""
_TRIED = 16
"""Files that are read before a store is made: when none of them will do, the folder is likely another."""


@dataclass
class Origin:
    """Which latents these are: what stands in the encoder's place.

    Attributes
    ----------
    space : Space
    facts : dict
        For the provenance.
    said : str
        By what they are known to be of that space; recorded.
    batch : int
        Rows that are written at once.
    """

    space: Space
    facts: dict[str, Any]
    said: str
    batch: int = 84

    @classmethod
    def named(
        cls,
        encoder: str,
        *,
        latent_shape: tuple[int, int, int] = PUBLISHED_SHAPE,
        image_size: int = 256,
        posterior: Posterior = "sample",
    ) -> Origin:
        """Take the user's word for the encoder.

        Its weights cannot be hashed, so the space is that of imports which were given this name and these
        settings, and never one that was encoded here.

        Parameters
        ----------
        encoder : str
        latent_shape : (C, H, W)
        image_size : int
            Side in pixels of the pictures that were encoded.
        posterior : {"sample", "mean", "deterministic"}
            The paper's latents were drawn once from the VAE's posterior.

        Raises
        ------
        UsageError
            The name is empty, or the shape is none.
        """
        if not encoder.strip():
            raise UsageError("--encoder-name is empty; name the encoder that the features come from.")
        if len(latent_shape) != 3 or min(latent_shape) < 1:
            raise UsageError(f"The latents' shape is {latent_shape}; three positive numbers are needed.")
        space = Space(
            encoder=IMPORTED,
            weights=f"not known, named {encoder.strip()}",
            image_size=image_size,
            latent_shape=latent_shape,
            posterior=posterior,
            resize="not known",
        )
        return cls(space, {"name": IMPORTED, "named": encoder.strip()}, "named by the user")

    @classmethod
    def of_store(cls, store: LatentStore) -> Origin:
        """Take the user's word that these are latents of a store's own space."""
        said = f"said to be that of {store.path.absolute()}"
        return cls(store.space, dict(store.provenance.get("encoder", {})), said)

    def encode(self, images: Pictures, rows: npt.NDArray[np.int64]) -> Latents:
        """Refuse pictures: only latents that were made elsewhere are at hand."""
        raise EncoderError(f"Latents of {self.facts.get('name')!r} are imported here, not computed.")


def import_features(
    source: Features,
    path: Path,
    origin: Origin,
    *,
    dtype: str = "float16",
    shard_rows: int | None = None,
    codec: str | None = None,
    threads: int | None = None,
    retry_bad: bool = False,
    retry_changed: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_rows: OnRows | None = None,
    on_times: OnTimes | None = None,
) -> EncodeSummary:
    """Read every listed latent that is not in the store yet; new files are appended behind the others.

    Statuses, splits, commits, resuming and appending are :func:`~latentstore.encode.encode`'s.

    Parameters
    ----------
    source : Features
    path : Path
        The store.
    origin : Origin
    dtype : {"float16", "float32"}
        Of a new store.
    shard_rows, codec : optional
        Of a new store.
    threads : int, optional
        That read; by default one a core.
    retry_bad, retry_changed : bool
        Read bad rows again, or files that hold another content now; other rows stay as they are.
    on_start, on_rows, on_times : callable, optional
        As for encoding.

    Returns
    -------
    EncodeSummary

    Raises
    ------
    UsageError
        No latent can be read; or a store of another kind, or of another folder, lies at the path.
    SpaceMismatchError
        The store belongs to another space.
    """
    began = time.perf_counter()
    listed = source.list()
    _open_or_create(source, path, origin, listed, {"dtype": dtype, "shard_rows": shard_rows, "codec": codec})
    summary = EncodeSummary(store=str(path))
    with writing(path):
        migrate(path)
        store = settle(open_store(path))
        finish(path)
        links = settle_links(store, source)
        # Before the list grows: a last shard that has more places than rows is not committed any more.
        rows, changes = committed_changes(store, links, retry_changed, content=False)
        rows += bad_rows(store) if retry_bad else []
        summary.add_changes(changes)
        new = new_inputs(listed, store.inputs())
        if new.num_rows:
            store = store.extend(new)
            summary.appended = new.num_rows if len(store) > new.num_rows else 0
        again = rows_again(store, rows)
        todo = sorted({*store.todo(), *again})
        job = Job(store, todo, store.inputs(), links, origin, images.MAX_PIXELS, on_rows, on_times)
        job = replace(job, again=again)
        if on_start is not None:
            on_start(sum(map(job.missing_rows, todo)), len(store))
        for outcome in _run(job, threads or os.cpu_count() or 1):
            summary.add(outcome)
    summary.rows = len(store)
    summary.counts = store.counts()
    summary.seconds["total"] = time.perf_counter() - began
    return summary


def _open_or_create(
    source: Features, path: Path, origin: Origin, listed: pa.Table, layout: dict[str, Any]
) -> LatentStore:
    """Create the store and commit the list, or open the one that is there, if it is this import's."""
    if locate(path)[1] != LATENTS:
        raise UsageError(
            f"{path} names an array of a store; features are imported into a store of their own."
        )
    if not exists(path):
        _require_latents(source, listed)
        spec = StoreSpec(
            kind=IMPORTED,
            space=origin.space,
            layout=Layout.plan(listed.num_rows, origin.space.dim, **layout),
            provenance={
                "encoder": origin.facts,
                "space": origin.said,
                "latentstore": __version__,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            origin=source.describe(),
        )
        try:
            return create(path, spec, listed)
        except LatentStoreError:
            # Another process may have made the same store in between: then its lock decides.
            if not exists(path):
                raise
    store = open_store(path)
    if store.kind != IMPORTED:
        raise UsageError(
            f"{path} was not imported ({store.kind}); imported latents go into a store of their own. Choose "
            "another --store."
        )
    check_space(origin.space.id, store.space.id, what="The import")
    check_source(store, source)
    return store


def _require_latents(source: Features, listed: pa.Table) -> None:
    """Refuse a list of which no file that is tried holds a latent: another folder or shape is meant."""
    at = sorted(set(np.linspace(0, listed.num_rows - 1, _TRIED).astype(int).tolist()))
    rows = listed.take(pa.array(at)).to_pylist()
    why = []
    for row in rows:
        try:
            source.load(row)
        except ImageError as exc:
            why.append(f"{row['path']}: {exc.reason}")
        else:
            return
    raise UsageError(
        f"None of {len(rows)} files of {listed.num_rows} that were tried holds a latent of shape "
        f"{source.latent_shape} (in {source.root}; {why[0]}). Name their shape with --latent-shape C,H,W, or "
        "the folder that they lie in."
    )


def _run(job: Job, threads: int) -> Iterator[ShardOutcome]:
    """Make the shards one after another."""
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        task = _ImportTask(job.source, job.encoder, pool, job.max_pixels, job.on_rows, job.on_times)
        try:
            for shard in job.todo:
                yield task.run(job.store, shard, job.inputs_of(shard))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _ImportTask(ShardTask):
    """Makes one shard at a time of latents that are read, where its base computes them."""

    def _begin(self, batch: Batch, row: int) -> Callable[[], Latents]:
        latents = np.zeros((len(batch), self.encoder.space.dim), np.float32)
        for i, item in enumerate(batch):
            if isinstance(item, Feature):
                latents[i] = item.latent
        return lambda: latents

    def _write(
        self,
        batch: Batch,
        latents: Callable[[], Latents],
        inputs: list[dict[str, Any]],
        start_row: int,
        first: int,
        writer: ShardWriter,
    ) -> list[dict[str, Any]]:
        rows = super()._write(batch, latents, inputs, start_row, first, writer)
        dtype = np.dtype(writer.layout.dtype)
        most = np.finfo(dtype).max
        beyond = f"a number is beyond {dtype}, whose largest is {most:g}: import with --dtype float32"
        for row, item in zip(rows, batch, strict=True):
            if isinstance(item, Feature) and row["status"] == "not_finite":
                row["reason"] = beyond
        return [row | {"width": None, "height": None} for row in rows]
