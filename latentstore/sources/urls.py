"""Files behind URLs, read through fsspec: bounded, tried again, and never mistaken for a bad image."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from latentstore.errors import ImageError, MissingExtraError, UsageError
from latentstore.images import MAX_BYTES, FileFacts, hashed
from latentstore.sources.places import SourceError, Stat, too_large

WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each new attempt; after the last one the job stops."""
READERS = 16
"""Threads that read from URLs: each waits for its answer most of the time."""
_SECONDS_TO_ANSWER = 30.0
_PIECE = 1 << 20
_MTIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated")
"""What the file systems call a file's time of modification."""

T = TypeVar("T")


@dataclass(frozen=True)
class UrlFile:
    """A file behind a URL. Credentials come from fsspec's configuration and the environment, not the URL."""

    url: str

    @property
    def name(self) -> str:
        """The URL."""
        return self.url

    def stat(self) -> Stat:
        """Look at the file: one request."""
        info = _tried(self.url, lambda: _info(self.url))
        if info.get("type", "file") != "file":
            raise ImageError("unreadable", "not a regular file")
        size = info.get("size")
        return Stat(None if size is None else int(size), _mtime(info))

    def whole(self) -> FileFacts:
        """Read and hash the file; never more than :data:`~latentstore.images.MAX_BYTES`."""
        if is_web(self.url):
            return _tried(self.url, lambda: _download(self.url))
        stat = self.stat()
        if stat.size is not None and stat.size > MAX_BYTES:
            raise too_large(stat.size)
        # Bounded by the size that was checked: what grows meanwhile is a torn image, not a full memory.
        return hashed(self.read(0, MAX_BYTES if stat.size is None else stat.size), stat.mtime)

    def read(self, start: int, end: int) -> bytes:
        """Return a range of the file."""
        if end <= start:
            return b""
        return _tried(self.url, lambda: _range(self.url, start, end))


def is_web(url: str) -> bool:
    """Tell whether a web server answers for a URL: it reads, but has no list of its files."""
    return url.partition("://")[0].lower() in ("http", "https")


def find(url: str) -> list[str]:
    """Return the names of all files below a URL, relative to it; hidden folders and files are left out.

    Raises
    ------
    UsageError
        Nothing is there, or a web server was asked.
    SourceError
    """
    _refuse_web(url)

    def call() -> list[str]:
        fs, path = _open(url)
        return [_below(path, found) for found in fs.find(path)]

    names = _listed(url, call)
    return [n for n in names if not any(part.startswith(".") for part in n.split("/"))]


def forget(url: str) -> None:
    """Drop the listings that a file system remembers."""
    if not is_web(url):
        fs, path = _open(url)
        fs.invalidate_cache(path)


def glob(url: str, pattern: str) -> list[str]:
    """Return the names below a URL that match a pattern, relative to the URL. Raises as :func:`find`."""
    _refuse_web(url)

    def call() -> list[str]:
        fs, path = _open(url)
        return [_below(path, found) for found in fs.glob(f"{path.rstrip('/')}/{pattern}")]

    return _listed(url, call)


def _listed(url: str, call: Callable[[], list[str]]) -> list[str]:
    try:
        return _tried(url, call)
    except ImageError as exc:
        raise UsageError(f"{url} cannot be listed: {exc}.") from exc


def _refuse_web(url: str) -> None:
    if is_web(url):
        raise UsageError(
            f"A web server has no list of the files below {url}. Name them: latentstore encode --manifest "
            "LIST.csv with one URL a row, or tar shards by number: "
            "latentstore encode 'https://…/photos-{000..009}.tar'."
        )


def _below(root: str, found: str) -> str:
    return found[len(root.rstrip("/")) :].lstrip("/")


def _open(url: str) -> tuple[Any, str]:
    """Return (file system, path in it); fsspec keeps one file system for each protocol and configuration."""
    import fsspec
    from fsspec.config import conf

    options: dict[str, Any] = {}
    try:
        if is_web(url) and "client_kwargs" not in conf.get(url.partition("://")[0].lower(), {}):
            import aiohttp

            # Not the whole download: a large file may take as long as it likes while bytes arrive.
            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=_SECONDS_TO_ANSWER, sock_read=_SECONDS_TO_ANSWER
            )
            options["client_kwargs"] = {"timeout": timeout}
        fs, path = fsspec.url_to_fs(url, **options)
    except ImportError as exc:
        missing = getattr(exc.__cause__, "name", None) or exc.name or "the package it names"
        raise MissingExtraError(
            f"{url} is read by a package that is not installed: pip install {missing.partition('.')[0]}."
        ) from exc
    except ValueError as exc:
        raise UsageError(f"{url}: {exc}") from exc
    return fs, path


def _info(url: str) -> dict[str, Any]:
    fs, path = _open(url)
    try:
        info: dict[str, Any] = fs.info(path)
    except FileNotFoundError as exc:
        # For web servers fsspec calls every failure "not found"; the failure itself is its cause.
        if isinstance(exc.__cause__, Exception):
            raise exc.__cause__ from None
        raise
    return info


def _download(url: str) -> FileFacts:
    """Read a file from a web server: one request, no more bytes than are allowed, whatever it announces."""
    with _stream(url, {}) as body:
        announced = int(body.r.headers.get("Content-Length", 0))
        if announced > MAX_BYTES:
            raise too_large(announced)
        return hashed(_at_most(body, MAX_BYTES), _mtime(body.r.headers))


def _range(url: str, start: int, end: int) -> bytes:
    if not is_web(url):
        fs, path = _open(url)
        data: bytes = fs.cat_file(path, start=start, end=end)
        return data
    with _stream(url, {"Range": f"bytes={start}-{end - 1}"}) as body:
        if body.r.status != 206:
            raise SourceError(
                f"{url}: the server sends only whole files (it ignores ranges), and a tar shard is read by "
                "ranges. Copy the shards here, or serve them from an object store or another web server."
            )
        return _at_most(body, end - start)


def _stream(url: str, headers: dict[str, str]) -> Any:
    fs, path = _open(url)
    headers = {**fs.kwargs.get("headers", {}), **headers}
    # With block_size 0 a stream; any size given saves the question for it.
    return fs.open(path, block_size=0, size=1, headers=headers)


def _at_most(body: Any, limit: int) -> bytes:
    pieces, left = [], limit
    while piece := body.read(min(_PIECE, left + 1)):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise too_large(limit - left)
    return b"".join(pieces)


def _tried(url: str, call: Callable[[], T]) -> T:
    """Call; try again after failures that may pass; tell the file's fault from the network's.

    Raises
    ------
    ImageError
        The file is not there, or is none.
    SourceError
        The server refuses, or does not answer after every attempt.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except (ImageError, SourceError, UsageError, MissingExtraError):
            raise
        except Exception as exc:  # each file system raises errors of its own library
            code = _http_status(exc)
            if isinstance(exc, FileNotFoundError) or code in (404, 410):
                raise ImageError("missing", "the file was listed but is not there") from exc
            if isinstance(exc, IsADirectoryError):
                raise ImageError("unreadable", "not a regular file") from exc
            if isinstance(exc, PermissionError) or code in (401, 403, 407):
                raise _refused(url, exc) from exc
            if type(exc).__module__ == "builtins" and not isinstance(exc, OSError | EOFError):
                raise  # a fault of ours, not of the network
            if wait is None:
                raise _silent(url, exc) from exc
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _http_status(exc: Exception) -> int | None:
    """Return the HTTP status of an error, by the names that the file systems' libraries give it."""
    code = getattr(exc, "status", None) or getattr(exc, "code", None)
    return code if isinstance(code, int) else None


def _refused(url: str, exc: Exception) -> SourceError:
    return SourceError(
        f"{url}: access is refused ({_named(exc)}). Finished shards are kept. Give fsspec the credentials "
        "(the environment variables of the service, or ~/.config/fsspec) and run the same command again; or "
        "record what cannot be had as missing rows with --skip-unreachable."
    )


def _silent(url: str, exc: Exception) -> SourceError:
    return SourceError(
        f"{url} cannot be read after {len(WAITS) + 1} attempts ({_named(exc)}). Finished shards are kept: "
        "run the same command again when the server answers, or record what cannot be had as missing rows "
        "with --skip-unreachable."
    )


def _named(exc: Exception) -> str:
    """Return what failed, without the library's text: it may hold a signed URL that a server led to."""
    code = _http_status(exc)
    if code is not None:
        return f"HTTP {code}"
    return getattr(exc, "strerror", None) or type(exc).__name__


def _mtime(info: Mapping[str, Any]) -> int | None:
    """Return the time of modification in nanoseconds, in whichever form a file system gives it."""
    value = next((info[name] for name in _MTIMES if info.get(name)), None)
    try:
        if isinstance(value, str):
            value = parsedate_to_datetime(value) if "," in value else datetime.fromisoformat(value)
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        return round(float(value) * 1e9) if value is not None else None
    except (TypeError, ValueError):
        return None
