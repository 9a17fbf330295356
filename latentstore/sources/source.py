"""The images of a store: how they are listed, and how each one is read."""

from __future__ import annotations

import builtins
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentstore import images
from latentstore.errors import ImageError, UsageError
from latentstore.manifest import (
    IMAGE_SUFFIXES,
    check_folder,
    files_below,
    input_table,
    is_url,
    list_manifest,
    named_row,
    no_images,
    refuse_secrets,
    suffix_of,
)
from latentstore.sources import patterns, tars, urls
from latentstore.sources.places import LocalFile, Place, SourceError, Stat

_IN_TAR = re.compile(r"\.tar(?=/.)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Where the images come from.

    Attributes
    ----------
    root : Path or str
        Folder that the listed paths are relative to; a str is the URL of one.
    manifest : Path or None
        The list, when it is not the folder's own contents.
    follow_links : bool
        Accept links that lead out of ``root``.
    patterns : tuple of str
        Names of tar shards and images below ``root``, with wildcards and braces; none means all of it.
    skip_unreachable : bool
        A URL that refuses or does not answer is a row of status ``missing``, and does not stop the job.
    notes : list of str
        What a user should know of the last listing: tars that seem to be cut off.
    """

    root: Path | str
    manifest: Path | None = None
    follow_links: bool = False
    patterns: tuple[str, ...] = ()
    skip_unreachable: bool = False
    notes: builtins.list[str] = field(default_factory=builtins.list, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        named: str | Path | Sequence[str | Path] | None,
        manifest: Path | None = None,
        *,
        follow_links: bool = False,
        skip_unreachable: bool = False,
    ) -> Source:
        """Take what a user names: a folder, a URL, tar shards, patterns; or a manifest.

        A manifest's paths are relative to the folder that is named, by default its own.

        Raises
        ------
        UsageError
            A URL with credentials, a compressed tar, or names that share no folder.
        """
        names = [] if named is None else [named] if isinstance(named, str | Path) else list(named)
        if manifest is not None:
            if len(names) > 1:
                raise UsageError(f"A manifest's paths are relative to one folder, not to {len(names)}.")
            root = _folder(names[0]) if names else manifest.parent
            return cls(root, manifest, follow_links, (), skip_unreachable)
        root, found = _shared([_split(n) for n in names]) if names else (Path("images"), ())
        return cls(root, None, follow_links, found, skip_unreachable)

    @classmethod
    def recorded(cls, origin: Mapping[str, Any]) -> Source:
        """Return the source that a store was made from, by what :meth:`describe` recorded."""
        root, manifest = str(origin["root"]), origin.get("manifest")
        return cls(
            root if is_url(root) else Path(root),
            None if manifest is None else Path(manifest),
            bool(origin.get("follow_links", False)),
            tuple(origin.get("patterns", ())),
        )

    def describe(self) -> dict[str, Any]:
        """Return what the store records of its source."""
        here = self.absolute()
        out = {
            "root": str(here.root),
            "manifest": None if here.manifest is None else str(here.manifest),
            "follow_links": self.follow_links,
        }
        return {**out, "patterns": list(self.patterns)} if self.patterns else out

    def absolute(self) -> Source:
        """Return the same source by paths that mean the same from any working folder."""
        return replace(
            self,
            root=self.root if isinstance(self.root, str) else _absolute(self.root),
            manifest=None if self.manifest is None else _absolute(self.manifest),
        )

    # --- listing ------------------------------------------------------------------------------------

    def list(self) -> pa.Table:
        """List the inputs: files sorted by name, the images of each tar in its own order.

        Raises
        ------
        UsageError
            Nothing is there, or a tar cannot be used.
        ManifestError
            The manifest, or a file beside an image in a tar, cannot be used.
        SourceError
            A URL does not answer.
        """
        if self.manifest is not None:
            return list_manifest(self.manifest)
        listed = input_table(row for name in self._files() for row in self._rows(name))
        if not listed.num_rows:
            raise no_images(self.root)
        return listed

    def check(self) -> None:
        """Find what :meth:`list` would refuse at a glance: tars are not looked into. Raises likewise."""
        if self.manifest is not None:
            list_manifest(self.manifest)
        elif not self._files():
            raise no_images(self.root)

    def _files(self) -> Sequence[bytes]:
        self.refresh()
        self.notes.clear()
        if self.patterns:
            found = {os.fsencode(n) for p in self.patterns for n in patterns.files(self.root, p)}
            return sorted(n for n in found if _is_used(os.fsdecode(n)))
        if isinstance(self.root, str):
            found = {os.fsencode(n) for n in urls.find(self.root) if _is_used(n)}
        else:
            check_folder(self.root)
            wanted = {*IMAGE_SUFFIXES, ".tar"}
            found = set(files_below(self.root, wanted, follow_links=self.follow_links))
        # Tars beside loose images are likely something else, such as a backup of them.
        pictures = [n for n in found if not patterns.is_tar(os.fsdecode(n))]
        return sorted(pictures or found)

    def _rows(self, name: bytes) -> Iterator[dict[str, Any]]:
        if patterns.is_tar(os.fsdecode(name)):
            rows, note = tars.rows(self._place(os.fsdecode(name)), name)
            if note:
                self.notes.append(note)
            yield from rows
        else:
            yield named_row(name)

    def require_some(self, inputs: pa.Table) -> None:
        """Refuse a list of which nothing is there: the folder it is relative to is likely another.

        Raises
        ------
        UsageError
        """
        if self.manifest is None or isinstance(self.root, str):
            return
        paths = inputs["path"].to_pylist()
        if not any(is_url(p) or _is_there(self.root, p) for p in paths):
            raise UsageError(
                f"None of the {len(paths)} files that {self.manifest} lists is there; its paths were taken "
                f"as relative to {self.root.absolute()} (the first: {paths[0]}). Name the folder they are "
                f"relative to: latentstore encode FOLDER --manifest {self.manifest}."
            )

    # --- reading ------------------------------------------------------------------------------------

    def load(
        self, listed: Mapping[str, Any], size: int, *, max_pixels: int = images.MAX_PIXELS
    ) -> images.Pixels:
        """Read, hash, decode and resize one listed image.

        Parameters
        ----------
        listed : mapping
            ``path`` and ``path_raw`` of :data:`~latentstore.manifest.INPUT_SCHEMA`.
        size : int
            Side of the square result, in pixels.
        max_pixels : int

        Raises
        ------
        ImageError
            With the row's ``status`` and ``reason``.
        SourceError
            A URL does not answer.
        """
        return images.picture(self.read(listed), size, max_pixels=max_pixels)

    def read(self, listed: Mapping[str, Any]) -> images.FileFacts:
        """Read and hash one listed file. Raises as :meth:`load`."""
        try:
            place, member = self._found(listed)
            return place.whole() if member is None else tars.read(place, member)
        except SourceError as exc:
            if not self.skip_unreachable:
                raise
            raise ImageError("missing", str(exc).partition(". ")[0]) from exc

    def stat(self, listed: Mapping[str, Any]) -> Stat:
        """Look at one listed file without reading it. Raises as :meth:`load`."""
        place, member = self._found(listed)
        return place.stat() if member is None else tars.stat(place, member)

    def is_remote(self, path: str) -> bool:
        """Tell whether a listed path is read over a network."""
        return is_url(path) or (isinstance(self.root, str) and not path.startswith("/"))

    def readers(self, inputs: pa.Table) -> int | None:
        """Return how many threads keep a network busy, or None where all files are on this machine."""
        remote = isinstance(self.root, str) or any(is_url(path.as_py()) for path in inputs["path"])
        return urls.READERS if remote else None

    def refresh(self) -> None:
        """Forget what was remembered of files behind URLs, so that it is asked for again."""
        tars.forget()
        if isinstance(self.root, str):
            urls.forget(self.root)

    def _found(self, listed: Mapping[str, Any]) -> tuple[Place, str | None]:
        """Return the file that holds a listed image, and its name within when that is a tar."""
        raw = listed.get("path_raw")
        name = os.fsdecode(raw) if raw is not None else str(listed["path"])
        for split in _IN_TAR.finditer(name):
            place = self._place(name[: split.end()])
            # A folder may be called x.tar, too.
            if not (isinstance(place, LocalFile) and place.path.is_dir()):
                return place, name[split.end() + 1 :]
        return self._place(name), None

    def _place(self, name: str) -> Place:
        if is_url(name):
            return urls.UrlFile(name)
        # An absolute path in a manifest is meant; a relative one stays in the folder.
        if Path(name).is_absolute():
            return LocalFile(Path(name))
        if isinstance(self.root, Path):
            return LocalFile(self.root / name, None if self.follow_links else self.root)
        if ".." in name.split("/"):
            raise ImageError("link_outside", ".. in the path leads outside the image folder")
        return urls.UrlFile(f"{self.root.rstrip('/')}/{name}")


def _absolute(path: Path) -> Path:
    """Return a path from the root on, without ``..`` unless that stands behind a link and leads elsewhere."""
    plain = Path(os.path.abspath(path))  # noqa: PTH100
    try:
        return plain if plain.samefile(path) else path.absolute()
    except OSError:  # not there (any more)
        return plain


def _is_there(root: Path, path: str) -> bool:
    """Tell whether a listed file, or a tar that may hold it, lies on this machine."""
    names = [path, *(path[: split.end()] for split in _IN_TAR.finditer(path))]
    return any(patterns.is_there(root / name) for name in names)


def _is_used(name: str) -> bool:
    return suffix_of(name) in IMAGE_SUFFIXES or patterns.is_tar(name)


def _folder(named: str | Path) -> Path | str:
    if isinstance(named, str) and is_url(named):
        refuse_secrets(named)
        return named.rstrip("/")
    return Path(named)


def _split(named: str | Path) -> tuple[Path | str, str | None]:
    """Return the folder of what a user names, and the pattern below it, or None for the whole folder."""
    text, folder = os.fspath(named), _folder(named)
    if tars.is_compressed(text):
        tars.refuse_compressed(text)
    if isinstance(folder, Path) and patterns.is_there(folder):
        tar = patterns.is_tar(text) and not folder.is_dir()
        return (folder.parent, folder.name) if tar else (folder, None)
    if not (patterns.is_pattern(text) or patterns.is_tar(text)):
        return folder, None
    root, pattern = patterns.split(text)
    return root if is_url(text) else Path(root), pattern


def _shared(named: Sequence[tuple[Path | str, str | None]]) -> tuple[Path | str, tuple[str, ...]]:
    """Return one root for several names, and the patterns relative to it."""
    if len(named) == 1:
        root, pattern = named[0]
        return root, () if pattern is None else (pattern,)
    roots = {str(root) for root, _ in named}
    if any(pattern is None for _, pattern in named) or (any(map(is_url, roots)) and len(roots) > 1):
        raise UsageError(
            f"{len(named)} sources are named ({', '.join(sorted(roots)[:3])}); a store has one. Name one "
            "folder or URL, or tar shards that lie together; a manifest joins files of several places."
        )
    if any(map(is_url, roots)):
        return named[0][0], tuple(str(pattern) for _, pattern in named)
    try:
        shared = os.path.commonpath(roots)
    except ValueError as exc:
        raise UsageError("Name the tar shards all by relative paths, or all by absolute ones.") from exc
    below = [os.path.relpath(os.path.join(root, str(p)), shared or ".") for root, p in named]  # noqa: PTH118
    return Path(shared or "."), tuple(below)
