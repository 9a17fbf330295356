"""The latents of attacked pictures: made in threads ahead of the encoder, kept in a temporary file."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from cli.collection import Collection, Rows
from latentstore import images
from latentstore.attacks import Attack
from latentstore.encoders import Encoder, blank_batch
from latentstore.errors import ImageError
from latentstore.pictures import Pictures
from latentstore.schema import Layout
from latentstore.sources.places import SourceError

T = TypeVar("T")
R = TypeVar("R")
Rgb = npt.NDArray[np.uint8]
THREADS = 8
"""That read and attack, at most: each holds a picture in all its attacked versions."""


class Latents:
    """Latents by attack and query, in the store's dtype, in a file that vanishes with this object.

    A picture is decoded once and attacked in every way, but the queries of one attack are ranked together:
    the file turns the one order into the other, so that memory holds one attack's latents at a time.

    Parameters
    ----------
    n_attacks, n : int
        Attacks, and queries.
    layout : Layout
        Of the store of the pictures.
    """

    def __init__(self, n_attacks: int, n: int, layout: Layout) -> None:
        self.n, self.dim, self.dtype = n, layout.dim, np.dtype(layout.dtype)
        self._file = tempfile.TemporaryFile(prefix="latentstore-attack-")  # noqa: SIM115
        self._file.truncate(n_attacks * n * self._row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    @property
    def _row(self) -> int:
        return self.dim * self.dtype.itemsize

    def put(self, attack: int, query: int, latent: npt.NDArray[np.floating[Any]]) -> None:
        """Keep one (dim,) latent."""
        self._file.seek((attack * self.n + query) * self._row)
        self._file.write(latent.tobytes())

    def read(self, attack: int, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.floating[Any]]:
        """Return the latents of one attack, of those queries that are kept."""
        self._file.seek(attack * self.n * self._row)
        held = np.frombuffer(self._file.read(self.n * self._row), self.dtype)
        return held.reshape(self.n, self.dim)[kept]


def encode_attacked(
    collection: Collection,
    rows: Rows,
    attacks: Sequence[Attack],
    encoder: Encoder,
    seed: int,
    latents: Latents,
    *,
    on_start: Callable[[int, int], None],
    on_rows: Callable[[int, int], None],
) -> dict[int, str]:
    """Attack the pictures of rows in every way, encode them as the store was, and keep the latents.

    Parameters
    ----------
    collection : Collection
    rows : (n,) array
    attacks : sequence of Attack
    encoder : Encoder
        The store's.
    seed : int
        Together with its row it seeds the attacks of a picture, whatever the others are.
    latents : Latents
    on_start, on_rows : callable
        Told how many attacked pictures there will be, and then how many are done and how many of them lost.

    Returns
    -------
    dict
        Place among the rows → why there are no latents of it.
    """
    lost: dict[int, str] = {}

    def encode(batch: Sequence[tuple[int, int, Rgb]]) -> None:
        pixels = blank_batch(encoder)
        pixels[: len(batch)] = [rgb for _, _, rgb in batch]
        with np.errstate(over="ignore"):
            made = encoder.encode(pixels, np.full(encoder.batch, -1)).astype(latents.dtype)
        for (at, query, _), latent in zip(batch, made, strict=False):
            if np.isfinite(latent).all():
                latents.put(at, query, latent)
            else:
                lost[query] = f"not_finite: its latent under {attacks[at].name} is not finite"
        on_rows(len(batch), 0)

    on_start(len(rows) * len(attacks), len(rows) * len(attacks))
    work = partial(_attacked, Pictures(collection.store), attacks, encoder.space.image_size, seed)
    batch: list[tuple[int, int, Rgb]] = []
    for query, made in enumerate(_ahead(work, rows.tolist())):
        if isinstance(made, str):
            lost[query] = made
            on_rows(len(attacks), len(attacks))
            continue
        batch += [(at, query, rgb) for at, rgb in enumerate(made)]
        while len(batch) >= encoder.batch:
            encode(batch[: encoder.batch])
            batch = batch[encoder.batch :]
    if batch:
        encode(batch)
    return lost


def _attacked(pictures: Pictures, attacks: Sequence[Attack], size: int, seed: int, row: int) -> Rgb | str:
    """Return the (attacks, size, size, 3) versions of a row's picture, or why there are none."""
    try:
        image = pictures.read(row)
    except ImageError as exc:
        return f"{exc.status}: {exc.reason}"
    except SourceError as exc:
        return str(exc)
    return np.stack([images.resize(attack(image, (seed, row)), size) for attack in attacks])


def _ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield what is made of each item, in order, some of the next ones being made in threads."""
    threads = min(THREADS, os.cpu_count() or 1)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="attack") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Stopped half-way, nobody waits for the rest.
            for future in waiting:
                future.cancel()
