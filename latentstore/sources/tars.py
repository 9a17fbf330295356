"""Tar shards in WebDataset's layout: members are read where they lie; nothing is unpacked.

A tar has no list of its members, so its headers are read through once in each process. What is found may be
out of date a moment later; therefore each member is read together with its own header, and only the very
header that was found before is taken.
"""

from __future__ import annotations

import json
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

from latentstore.errors import ImageError, LatentStoreError, ManifestError, UsageError
from latentstore.images import MAX_BYTES, FileFacts, hashed
from latentstore.manifest import IMAGE_SUFFIXES, named_row, suffix_of
from latentstore.schema import identity_and_role
from latentstore.sources.places import LocalFile, Place, Stat, too_large

BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_HEADERS_AT_ONCE = 1 << 16
_URL_AT_ONCE = 8 << 20
"""Over a network a request for each header would cost more than the images between them."""
_MOST_HEADER = 1 << 18
_MOST_SIDECAR = 1 << 24
_FIELDS = ("identity", "group", "role", "split", "model", "prompt", "strength")
_CAPTIONS = (".txt", ".caption")


class Member(NamedTuple):
    """An image in a tar: where its bytes are, the header that says so, and why it cannot be used."""

    offset: int
    size: int
    mtime: int
    header_crc32: int
    fault: tuple[str, str] | None


class Index(NamedTuple):
    """The images of a tar by name, in the tar's order; what sidecars say, by key; whether it seems cut."""

    members: dict[str, Member]
    sidecars: dict[str, dict[str, Any]]
    cut: bool = False


def is_compressed(name: str) -> bool:
    """Tell whether a name is that of a compressed tar."""
    return name.lower().endswith(_COMPRESSED_NAMES)


def refuse_compressed(name: str, kind: str = "compressed") -> None:
    """Say why a compressed tar cannot be used.

    Raises
    ------
    UsageError
    """
    raise UsageError(
        f"{name} is {kind}: its members cannot be read where they lie, so every image would cost unpacking "
        "all before it. Images hardly compress: unpack the archive to a plain .tar (gunzip, unxz, zstd -d)."
    )


def rows(place: Place, name: bytes) -> tuple[list[dict[str, Any]], str]:
    """Return one row an image of a tar, in the order of its members, and a warning or "".

    That order is the archive's own, the same at every listing, and reading in it runs forward through the
    file. Members that are added to the tar come behind.

    Parameters
    ----------
    place : Place
    name : bytes
        What the store calls the tar.

    Returns
    -------
    rows : list of dict
        For :func:`~latentstore.manifest.input_table`.
    note : str
        Says that the tar does not end as one does: a copy that broke off leaves whole members in front.

    Raises
    ------
    UsageError
        The tar is missing, compressed, damaged, or names a member twice.
    ManifestError
        A sidecar cannot be read.
    """
    try:
        found = index(place)
    except ImageError as exc:
        raise UsageError(f"{place.name} cannot be read: {exc}.") from exc
    out = []
    for member in found.members:
        row = named_row(name + b"/" + member.encode("utf-8", "surrogateescape"))
        said = dict(found.sidecars.get(_key(member), {}))
        caption = said.pop("caption", None)
        role = said.get("role") or identity_and_role(row["path"])[1]
        if caption and not said.get("prompt") and role == "translation":
            said["prompt"] = caption
        out.append(row | said)
    note = f"{place.name} has no end-of-archive mark: it may be cut off, and images be missing from it"
    return out, note if found.cut else ""


def read(place: Place, member: str) -> FileFacts:
    """Read and hash one member.

    Raises
    ------
    ImageError
        It is not there any more, torn, too large, or no regular file.
    """
    # A remembered index may be out of date: look once more before saying so.
    for look in (False, True):
        found = index(place, look=look).members.get(member)
        if found is None:
            continue
        if found.fault is not None:
            raise ImageError(*found.fault)
        if found.size > MAX_BYTES:
            raise too_large(found.size)
        block = place.read(found.offset - BLOCK, found.offset + found.size)
        if zlib.crc32(block[:BLOCK]) != found.header_crc32:
            continue
        if len(block) < BLOCK + found.size:
            raise ImageError("unreadable", "the tar ends inside this member")
        return hashed(block[BLOCK:], found.mtime)
    raise ImageError("missing", "the tar no longer holds this member")


def stat(place: Place, member: str) -> Stat:
    """Look at one member.

    Raises
    ------
    ImageError
        The tar is missing, or does not hold it.
    """
    found = index(place).members.get(member)
    if found is None:
        raise ImageError("missing", "the tar no longer holds this member")
    return Stat(found.size, found.mtime)


_lock = threading.Lock()
_looked: dict[Place, Stat] = {}


def forget() -> None:
    """Look at tars behind URLs once more when they are needed."""
    _looked.clear()


def index(place: Place, *, look: bool = False) -> Index:
    """Return a tar's index, from memory when the file is unchanged in size and time.

    A local file is looked at each time; one behind a URL, which costs a request, only with ``look``.
    """
    known = None if look or isinstance(place, LocalFile) else _looked.get(place)
    seen = known or place.stat()
    if not isinstance(place, LocalFile):
        _looked[place] = seen
    with _lock:  # the threads of a batch want the same tar at once: it is read through by one
        return _scanned(place, seen)


@lru_cache(maxsize=32)
def _scanned(place: Place, seen: Stat) -> Index:
    if seen.size is None:
        raise UsageError(f"{place.name}: the server does not say how large it is; a tar needs that.")
    found, file = Index({}, {}), _Window(place, seen.size)
    for info, header_crc32, content in _headers(file):
        name = info.name.removeprefix("./")
        kind = suffix_of(name)
        if kind in IMAGE_SUFFIXES:
            if name in found.members:
                raise ManifestError(f"{place.name} holds {name} twice. Write the tar anew with one of them.")
            found.members[name] = Member(
                info.offset_data, info.size, round(info.mtime * 1e9), header_crc32, _fault(info, name)
            )
        elif kind in (".json", *_CAPTIONS) and info.isreg():
            said = found.sidecars.setdefault(_key(name), {})
            said |= _sidecar(f"{place.name}/{name}", kind, info.size, content)
    return found._replace(cut=file.at(file.end, BLOCK) != bytes(BLOCK))


def _key(member: str) -> str:
    """Return what a sample's files share: the name up to the first dot of its last part."""
    folder, slash, last = member.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _fault(info: tarfile.TarInfo, name: str) -> tuple[str, str] | None:
    if name.startswith("/") or ".." in name.split("/"):
        return "link_outside", "an absolute name, or .. in the name, in a tar"
    if info.issparse():
        return "unreadable", "a sparse file in a tar"
    if not info.isreg():
        return "unreadable", "not a regular file, or a link, in a tar"
    return None


def _sidecar(name: str, kind: str, size: int, content: Callable[[], bytes]) -> dict[str, Any]:
    if size > _MOST_SIDECAR:
        raise ManifestError(f"{name} has {size} bytes; a file beside an image may have {_MOST_SIDECAR}.")
    data = content()
    if len(data) < size:
        return {}  # the tar ends here, and its image cannot be complete either
    if kind in _CAPTIONS:
        return {"caption": data.decode("utf-8", "replace").strip()}
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ManifestError(f"{name} is not JSON ({type(exc).__name__}). Mend it, or leave it out.") from exc
    # A list, say of boxes, is somebody's annotation and none of ours.
    fields = {f: said[f] for f in _FIELDS if f in said} if isinstance(said, dict) else {}
    for field, value in fields.items():
        number = field == "strength" and not isinstance(value, bool)
        if value is not None and not isinstance(value, (int, float) if number else (str, int, float)):
            kind = "number" if number else "text"
            raise ManifestError(f"{name}: {field} is {value!r:.80}; it must be one {kind}.")
    return fields


def _headers(file: _Window) -> Iterator[tuple[tarfile.TarInfo, int, Callable[[], bytes]]]:
    """Yield every member with the checksum of its header and a function that reads it.

    Raises
    ------
    UsageError
        Compressed, no tar, or damaged before its end.
    """
    place, size = file.place, file.size
    start = file.at(0, 8)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            refuse_compressed(place.name, f"compressed with {kind}")
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            at, n = info.offset_data, info.size
            if tar.offset < at:
                raise tarfile.ReadError("a member of negative size")
            file.end = tar.offset
            yield info, zlib.crc32(file.at(at - BLOCK, BLOCK)), partial(file.at, at, n)
            if tar.offset >= size:
                return  # it ends here; a torn last member is a row of its own
    except (LatentStoreError, OSError, MemoryError):
        raise
    except Exception as exc:  # tarfile raises many kinds on hostile bytes
        raise UsageError(
            f"{place.name} is no tar archive, or is damaged ({exc}). Write it anew, or take it out of the "
            "list; nothing of it was used."
        ) from exc
    rest = file.at(tar.offset, BLOCK)
    if len(rest) == BLOCK and any(rest):
        raise UsageError(
            f"{place.name} is damaged at byte {tar.offset} of {size}: what stands there is no header, and "
            "the members behind it cannot be found. Write it anew, or take it out of the list."
        )


class _Window:
    """What :mod:`tarfile` reads headers from: a file by position, a window of it in memory.

    ``end`` is where the last member that was found ends.
    """

    def __init__(self, place: Place, size: int) -> None:
        self.place, self.size = place, size
        self.step = _HEADERS_AT_ONCE if isinstance(place, LocalFile) else _URL_AT_ONCE
        self.position = self.start = self.end = 0
        self.held = b""

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        if position < 0:
            raise tarfile.ReadError("a member of negative size")
        self.position = position

    def read(self, n: int) -> bytes:
        if not 0 <= n <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {n} bytes")
        out = self.at(self.position, n)
        self.position += len(out)
        return out

    def at(self, position: int, n: int) -> bytes:
        """Return up to ``n`` bytes from a position on."""
        end = min(position + n, self.size)
        if end <= position:
            return b""
        if not self.start <= position <= end <= self.start + len(self.held):
            self.start = position
            self.held = self.place.read(position, min(max(end, position + self.step), self.size))
        return self.held[position - self.start : end - self.start]
