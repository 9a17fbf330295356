"""remove: which rows are meant, what looks nearly the same, and taking them down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from latentstore import groups
from latentstore.errors import UsageError
from latentstore.images import read_file
from latentstore.removal import Removal, find_rows, remove, with_copies
from latentstore.store import LatentStore, open_store


@dataclass(frozen=True)
class Chosen:
    """Rows to be removed, and their paths.

    Attributes
    ----------
    rows, paths : list
    near : list of str
        Paths of near-duplicates that are not among them.
    note : str
        Why near-duplicates are not known, or empty.
    """

    rows: list[int]
    paths: list[str]
    near: list[str]
    note: str


def choose(store: Path, named: list[str], identities: list[str], *, near: bool = False) -> Chosen:
    """Return the rows that are meant: paths as the store lists them, picture files, identities.

    All copies of the same content are meant, too; with ``near`` also what was grouped with them as
    near-duplicates.

    Raises
    ------
    UsageError
        A name is neither in the store nor a file, or a file's content is not in the store.
    """
    opened = open_store(open_store(store).root)
    listed = opened.inputs()["path"]
    here = set(listed.filter(pc.is_in(listed, value_set=pa.array(named, pa.string()))).to_pylist())
    rows = find_rows(opened, paths=sorted(here), identities=identities)
    contents = [_content(opened, Path(name)) for name in named if name not in here]
    rows = with_copies(opened, rows, contents)
    found, note = groups.load(opened) if rows else (None, "")
    beside: set[int] = set()
    if found is not None:
        of = found.of("group")
        wanted = {of[row] for row in rows if row in of}
        beside = {row for row, group in of.items() if group in wanted} - set(rows)
    if near:
        rows, beside = sorted({*rows, *beside}), set()

    def paths(of: list[int]) -> list[str]:
        out: list[str] = listed.take(pa.array(of, pa.int64())).to_pylist()
        return out

    return Chosen(rows, paths(rows), paths(sorted(beside)), note)


def _content(store: LatentStore, path: Path) -> str:
    """Return the hash of a picture file that some row was made from."""
    if not path.exists():
        raise UsageError(
            f"{path} is neither a path of {store.root} nor a file (looked in {Path.cwd()}); nothing was "
            "removed."
        )
    sha256 = read_file(path).sha256
    if not with_copies(store, [], [sha256]):
        raise UsageError(
            f"No row of {store.root} was made from the content of {path}; nothing was removed. If it was "
            f"re-compressed or resized since, find it: latentstore match {path} --store {store.root}."
        )
    return sha256


def run_remove(store: Path, rows: list[int], *, reason: str) -> Removal:
    """Take the rows down; with none, finish what an interrupted removal left."""
    return remove(open_store(store).root, rows, reason=reason)
