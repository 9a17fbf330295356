"""What is asked for: query pictures, latents and stores, found on disk and turned into latents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import compress, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from latentstore import encoders, images
from latentstore.errors import ImageError, UsageError
from latentstore.features import SUFFIX, load_queries
from latentstore.importing import IMPORTED
from latentstore.manifest import IMAGE_SUFFIXES, files_below, list_folder
from latentstore.pictures import Pictures
from latentstore.schema import OK, check_space
from latentstore.store import LatentStore, exists, open_store

Kind = Literal["picture", "latents", "store"]
OnStart = Callable[[int, int], None]
OnRows = Callable[[int, int], None]
SEVERAL = 1 << 16
"""Rows that one file of latents may hold; a store holds more."""


@dataclass
class Asked:
    """Queries in the order in which they were named.

    Attributes
    ----------
    names : list of str
    latents : (n, d) float32 array
    unreadable : list of (name, why)
    """

    names: list[str] = field(default_factory=list)
    blocks: list[npt.NDArray[np.float32]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    _pictures: list[Callable[[], Image.Image]] = field(default_factory=list)

    @property
    def latents(self) -> npt.NDArray[np.float32]:
        """The latents of all queries."""
        return np.concatenate(self.blocks) if self.blocks else np.empty((0, 0), np.float32)

    def keep(self, good: npt.NDArray[np.bool_], why: str) -> None:
        """Count queries as unreadable where an (n,) array says that they are not good."""
        if good.all():
            return
        self.blocks = [self.latents[good]]
        self.unreadable += [(name, why) for name, kept in zip(self.names, good, strict=True) if not kept]
        self.names = list(compress(self.names, good))
        self._pictures = list(compress(self._pictures, good))
        self.require_some()

    def require_some(self) -> None:
        """Raise `UsageError` where no query can be read."""
        if not self.names:
            listed = "; ".join(f"{name}: {why}" for name, why in self.unreadable[:3])
            raise UsageError(f"None of the {len(self.unreadable)} queries can be read ({listed}).")

    def picture(self, number: int) -> Image.Image | None:
        """Return the picture of a query, or None where it has none that can be read."""
        try:
            return self._pictures[number]()
        except (ImageError, OSError):
            return None


def ask(
    queries: list[Path],
    store: LatentStore,
    *,
    device: str = "auto",
    on_start: OnStart = lambda todo, total: None,
    on_rows: OnRows = lambda rows, bad: None,
) -> Asked:
    """Turn what a user names into latents that can be compared with a store's.

    Parameters
    ----------
    queries : list of Path
        Pictures, ``.npy`` files of latents (one each, or n × d), folders of either, stores of the same space.
    store : LatentStore
        The collection that is searched.

    Raises
    ------
    UsageError
        Nothing is there, nothing can be read, or pictures for a store whose encoder is only named.
    SpaceMismatchError
        A store of another space.
    """
    named = list(_named(queries, imported=store.kind == IMPORTED))
    on_start(len(named), len(named))
    asked, encoder = Asked(), None
    for kind, group in groupby(named, key=lambda item: item[0]):
        paths = [path for _, path in group]
        if kind == "store":
            for path in paths:
                _add_store(asked, path, store)
                on_rows(1, 0)
        elif kind == "latents":
            bad = len(asked.unreadable)
            _add_latents(asked, paths, store)
            on_rows(len(paths), len(asked.unreadable) - bad)
        else:
            encoder = encoder or _encoder(store, device)
            _add_pictures(asked, paths, encoder, on_rows)
    asked.require_some()
    return asked


def _encoder(store: LatentStore, device: str) -> encoders.Encoder:
    if store.space.encoder == IMPORTED:
        encoder = store.provenance["encoder"]["named"]
        raise UsageError(
            f"{store.path} holds imported latents whose encoder is only named ({encoder}): its queries are "
            f"{SUFFIX} files of the same encoder, not pictures."
        )
    return encoders.load_for(store.space, store.provenance["encoder"], device=device)


def _named(queries: list[Path], *, imported: bool) -> Iterator[tuple[Kind, Path]]:
    """Yield what is named; below a folder pictures, or its ``.npy`` files where it has no others.

    Of imported latents ``.npy`` files come before pictures.
    """
    for query in queries:
        if exists(query):
            yield "store", query
        elif query.is_dir():
            latents = sorted(files_below(query, {SUFFIX}))
            if latents and (imported or not any(files_below(query, IMAGE_SUFFIXES))):
                for name in latents:
                    yield "latents", query / os.fsdecode(name)
                continue
            for row in list_folder(query).select(["path", "path_raw"]).to_pylist():
                raw = row["path_raw"]
                yield "picture", query / (row["path"] if raw is None else os.fsdecode(raw))
        elif query.exists():
            yield ("latents" if query.suffix.lower() == SUFFIX else "picture"), query
        else:
            raise UsageError(f"There is no query image {query} (looked in {Path.cwd()}).")


def _add_pictures(asked: Asked, files: list[Path], encoder: encoders.Encoder, on_rows: OnRows) -> None:
    """Encode picture after picture, a batch at a time."""
    for at in range(0, len(files), encoder.batch):
        some = files[at : at + encoder.batch]
        names, latents, unreadable = encode_files(some, encoder)
        asked.names += names
        asked.blocks.append(latents)
        asked.unreadable += unreadable
        asked._pictures += [lambda path=Path(name): _decoded(path) for name in names]  # type: ignore[misc]
        on_rows(len(some), len(unreadable))


def _decoded(path: Path) -> Image.Image:
    return images.decode(images.read_file(path).data)[0]


def _add_latents(asked: Asked, files: list[Path], store: LatentStore) -> None:
    for path in files:
        several = _several(path, store.space.dim)
        if several is None:
            names, latents, unreadable = load_queries([path], store.space)
        else:
            finite = np.isfinite(several).all(axis=1)
            names = [f"{path} row {i}" for i in np.flatnonzero(finite)]
            latents = several[finite]
            unreadable = [
                (f"{path} row {i}", "not_finite: it holds values that are not finite")
                for i in np.flatnonzero(~finite)
            ]
            if not len(several):
                unreadable = [(str(path), "unreadable: it holds no rows")]
        asked.names += names
        asked.blocks.append(latents)
        asked.unreadable += unreadable
        asked._pictures += [_no_picture] * len(names)


def _several(path: Path, dim: int) -> npt.NDArray[np.float32] | None:
    """Return the rows of a file that holds n × d numbers; None for any other, which is one latent or bad."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if found.ndim != 2 or found.shape[1] != dim or found.dtype.kind != "f" or len(found) > SEVERAL:
        return None
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, and told so
        return np.array(found, np.float32)


def _no_picture() -> Image.Image:
    raise ImageError("missing", "latents have no picture")


def _add_store(asked: Asked, path: Path, store: LatentStore) -> None:
    """Take a store's queries and translations, or where it has neither all of its rows."""
    other = open_store(path)
    check_space(other.space.id, store.space.id, what=f"query store {path}")
    role = np.asarray(other.manifest(["role"])["role"].to_pylist(), dtype=object)
    ok = other.status() == OK
    rows = np.flatnonzero(ok & np.isin(role, ("query", "translation")))
    if not len(rows):
        rows = np.flatnonzero(ok)
    if not len(rows):
        asked.unreadable.append((str(path), "it holds no valid row"))
        return
    pictures, paths = Pictures(other), other.manifest(["path"])["path"].to_pylist()
    asked.names += [f"{path}: {paths[row]}" for row in rows]
    asked.blocks.append(other.reader.gather(rows).astype(np.float32))
    asked._pictures += [lambda row=int(row): pictures.read(row) for row in rows]  # type: ignore[misc]


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
        if not read:
            continue
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
