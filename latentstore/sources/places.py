"""Files by name: on this machine, or behind a URL. Each can be looked at, read whole, and read in part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from latentstore import images
from latentstore.errors import ImageError, LatentStoreError


class SourceError(LatentStoreError):
    """A source does not answer: no fault of an image, so the job stops instead of recording a bad row."""


@dataclass(frozen=True)
class Stat:
    """What is known of a file without reading it.

    Attributes
    ----------
    size : int or None
        In bytes; None where a server does not say.
    mtime : int or None
        In nanoseconds since 1970; None where there is none.
    """

    size: int | None
    mtime: int | None


class Place(Protocol):
    """One file. Every method raises ImageError for what is this file's own fault."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """What a message calls it."""
        ...

    def stat(self) -> Stat:
        """Look at the file."""
        ...

    def whole(self) -> images.FileFacts:
        """Read and hash the file, up to :data:`~latentstore.images.MAX_BYTES`."""
        ...

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` up to ``end``, or up to the end of the file."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine; with ``root``, one that may not lie outside that folder."""

    path: Path
    root: Path | None = None

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def stat(self) -> Stat:
        """Look at the file; links are followed."""
        try:
            facts = self.path.stat()
        except (OSError, ValueError) as exc:
            raise images.not_readable(exc) from exc
        return Stat(facts.st_size, facts.st_mtime_ns)

    def whole(self) -> images.FileFacts:
        """Read and hash the file."""
        return images.read_file(self.path, self.root)

    def read(self, start: int, end: int) -> bytes:
        """Return a range of the file."""
        with images.regular_file(self.path, self.root) as (fd, _):
            out = b""
            # A pread may return less than was asked for.
            while len(out) < end - start:
                piece = os.pread(fd, end - start - len(out), start + len(out))
                if not piece:
                    break
                out += piece
            return out


def too_large(size: int) -> ImageError:
    """Return the error for a file of too many bytes."""
    return ImageError("too_large", f"{size} bytes, more than {images.MAX_BYTES}")
