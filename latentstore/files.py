"""Files that are seen whole or not at all, also after a crash."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from latentstore.errors import StoreWriteError

PARTIAL = ".partial"
DERIVED = ("projections", "duplicates", "moments")
"""Folders of a store with what can be made anew from its latents."""
UNLOCKED = (*DERIVED, "index")
"""Folders that are written without the store's lock; an index is told of removed rows, and stays."""
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`StoreWriteError` that says what to do."""
    try:
        yield
    except StoreWriteError:
        raise
    except OSError as exc:
        if exc.errno in _DISK_FULL:
            advice = "The disk is full. Finished shards are kept: make room and run the same command again."
        else:
            advice = "Finished shards are kept: mend the cause and run the same command again."
        raise StoreWriteError(f"Could not write {path}: {exc.strerror or exc}. {advice}") from exc


def fsync_dir(path: Path) -> None:
    """Make renames inside a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Make every file and folder below a folder durable."""
    for path in [*root.rglob("*"), root]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that it is seen whole or not at all, also after a crash."""
    with write_errors(path), Staged() as staged:
        staged.add(path, data)
        staged.publish()


class Staged:
    """Files written beside their places, made durable together, then renamed into place.

    Leaving it with an exception drops what was not renamed.
    """

    def __init__(self) -> None:
        self._places: dict[Path, Path] = {}

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *exc: object) -> None:
        for partial in self._places:
            partial.unlink(missing_ok=True)

    def open(self, path: Path) -> BinaryIO:
        """Return a new file, unbuffered: a full disk must show at the write, not at the close."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
        self._places[partial] = path
        return partial.open("wb", buffering=0)

    def add(self, path: Path, data: bytes | memoryview) -> None:
        """Write a whole file."""
        with self.open(path) as file:
            write_all(file, data)

    @property
    def places(self) -> dict[Path, Path]:
        """Partial file → where it goes."""
        return dict(self._places)

    def sync(self) -> None:
        """Make the contents durable. One pass over all: the file system then commits them together."""
        for partial in self._places:
            fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def publish(self) -> None:
        """Make the contents durable, rename the files into place (the first one last), make that durable."""
        self.sync()
        folders = {path.parent for path in self._places.values()}
        for partial, path in reversed(self._places.items()):
            partial.replace(path)
        for folder in sorted(folders):
            fsync_dir(folder)
        self._places.clear()


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte: an unbuffered file may take fewer than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def partial_of(path: Path) -> Path:
    """Return a unique sibling name that sweeping recognises."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def sweep_partials(root: Path) -> int:
    """Delete what killed writers left behind; return how many files. Call it only under the writer's lock."""
    # Only where writers under the lock write.
    stale = [path for path in partials_below(root) if path.split(os.sep, 1)[0] not in UNLOCKED]
    for path in stale:
        (root / path).unlink(missing_ok=True)
    return len(stale)


def partials_below(root: Path) -> list[str]:
    """Return the partial files of a store, relative to it. A store has a folder a shard: no pathlib here."""
    found: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(f"{root}/{folder}" if folder else root) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.endswith(PARTIAL):
                    found.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(name)
    return found


def check_room(root: Path, needed: int) -> None:
    """Refuse before a byte is written what cannot fit.

    Parameters
    ----------
    root : Path
        Where the bytes will go (it need not exist yet).
    needed : int
        Bytes.
    """
    where = root.absolute()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if needed > free:
        raise StoreWriteError(
            f"{root} needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there. Make room, choose "
            "another disk with --store, or encode fewer images."
        )
