"""remove: which rows are meant, and taking them down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from latentstore.errors import UsageError
from latentstore.images import read_file
from latentstore.removal import Removal, find_content, find_rows, remove
from latentstore.store import LatentStore, open_store


@dataclass(frozen=True)
class Chosen:
    """Rows to be removed, and their paths."""

    rows: list[int]
    paths: list[str]


def choose(store: Path, named: list[str], identities: list[str]) -> Chosen:
    """Return the rows that are meant: paths as the manifest spells them, picture files, identities.

    All copies of the same content are meant, too.

    Raises
    ------
    UsageError
        A name is neither in the store nor a file, or a file's content is not in the store.
    """
    opened = open_store(store)
    listed = set(opened.manifest(["path"])["path"].to_pylist())
    rows = set(find_rows(opened, paths=[n for n in named if n in listed], identities=identities))
    for name in named:
        if name not in listed:
            rows |= set(_by_content(opened, Path(name)))
    chosen = sorted(rows)
    return Chosen(chosen, opened.manifest(["path"]).take(pa.array(chosen, pa.int64()))["path"].to_pylist())


def _by_content(store: LatentStore, path: Path) -> list[int]:
    if not path.exists():
        raise UsageError(
            f"{path} is neither a path of {store.root} nor a file (looked in {Path.cwd()}); nothing was "
            "removed."
        )
    rows = find_content(store, read_file(path).sha256)
    if not rows:
        raise UsageError(
            f"No row of {store.root} was made from the content of {path}; nothing was removed. If it was "
            f"re-compressed or resized since, find it: latentstore match {path} --store {store.root}."
        )
    return rows


def run_remove(store: Path, rows: list[int], *, reason: str) -> Removal:
    """Take the rows down; with none, finish what an interrupted removal left."""
    return remove(open_store(store).root, rows, reason=reason)
