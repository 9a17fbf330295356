"""From a file to pixels: read, hash, decode, bound, convert, resize. Every failure has a status name."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from latentstore.errors import ImageError

MAX_PIXELS = 89_478_485
"""Width times height above which an image is not decoded (Pillow's own warning level: 256 MiB of RGB)."""
MAX_BYTES = 1 << 29
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_NOT_THE_IMAGES_FAULT = {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENODEV}
"""Failures of the machine, which stop the job: a row that says \"unreadable\" would stay for ever."""
_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class Pixels:
    """A decoded image.

    Attributes
    ----------
    rgb : (size, size, 3) uint8 array
    width, height : int
        Of the file, after its EXIF orientation.
    bytes, mtime, sha256
        Of the file; ``mtime`` in nanoseconds, None where there is none (some URLs).
    note : str
        What a reader should know (``"first of 3 frames"``), or empty.
    decode_seconds : float
        That decoding and resizing took, on the clock of their thread.
    """

    rgb: npt.NDArray[np.uint8]
    width: int
    height: int
    bytes: int
    mtime: int | None
    sha256: str
    note: str = ""
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class FileFacts:
    """What is known of a file before it is decoded."""

    data: bytes
    bytes: int
    mtime: int | None
    sha256: str


def hashed(data: bytes, mtime: int | None) -> FileFacts:
    """Measure and hash the bytes of a file."""
    return FileFacts(data, len(data), mtime, hashlib.sha256(data).hexdigest())


def read_file(path: Path, root: Path | None = None) -> FileFacts:
    """Read and hash a file.

    Parameters
    ----------
    path : Path
    root : Path, optional
        When given, a path that leads outside this folder (by a symbolic link, or by ``..``) is refused.

    Raises
    ------
    ImageError
        Status ``missing``, ``link_outside``, ``too_large`` or ``unreadable``.
    """
    with regular_file(path, root) as (fd, facts):
        if facts.st_size > MAX_BYTES:
            raise ImageError("too_large", f"{facts.st_size} bytes, more than {MAX_BYTES}")
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read()
    return hashed(data, facts.st_mtime_ns)


@contextmanager
def regular_file(path: Path, root: Path | None = None) -> Iterator[tuple[int, os.stat_result]]:
    """Yield a regular file's descriptor and facts; what goes wrong inside is named as in :func:`read_file`.

    Raises
    ------
    ImageError
    """
    try:
        if root is not None and not path.resolve().is_relative_to(root.resolve()):
            raise ImageError("link_outside", "a link, or .. in the path, leads outside the image folder")
        # Non-blocking, so that a named pipe called x.jpg cannot hang the job.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise ImageError("unreadable", "not a regular file")
            yield fd, facts
        finally:
            os.close(fd)
    except ImageError:
        raise
    except (OSError, RuntimeError, ValueError) as exc:  # a loop of links; a NUL in the name
        raise not_readable(exc) from exc


def not_readable(exc: Exception) -> ImageError:
    """Return the row's error for a failure to open or read; a failure of the machine is raised as it is."""
    if isinstance(exc, FileNotFoundError):
        return ImageError("missing", "the file was listed but is not there")
    if isinstance(exc, OSError) and exc.errno in _NOT_THE_IMAGES_FAULT:
        raise exc
    return ImageError("unreadable", str(getattr(exc, "strerror", None) or exc))


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """Decode the first frame as RGB, upright.

    Alpha is dropped and EXIF orientation applied, as ``diffusers.utils.load_image`` does for the
    pictures that image-to-image pipelines are given; 16-bit greys are scaled, not clipped.

    Returns
    -------
    (image, note)

    Raises
    ------
    ImageError
        Status ``too_large`` (judged from the header, before decoding) or ``unreadable``.
    """
    if not data:
        raise ImageError("unreadable", "the file is empty")
    try:
        _allow_pillow(max_pixels)
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError("too_large", f"{width} x {height} pixels, more than {max_pixels}")
            frames = getattr(image, "n_frames", 1)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright), f"first of {frames} frames" if frames > 1 else ""
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageError("too_large", str(exc)) from exc
    except MemoryError:
        raise
    except Exception as exc:  # Pillow's decoders raise many kinds on hostile bytes; each is a bad image
        raise ImageError("unreadable", _one_line(exc)) from exc


def _allow_pillow(max_pixels: int) -> None:
    """Raise Pillow's own limit to ours, so that ``max_pixels`` alone decides."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        with _pillow_limit:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode != "F" or grey.max(initial=0) > 1 else 1.0
        if image.mode == "F" and not np.isfinite(grey).all():
            raise ImageError("unreadable", "pixels that are not finite")
        return Image.fromarray(np.clip(np.rint(grey * (255.0 / top)), 0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning about palettes
    return image.convert("RGB")


def resize(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """Return the image as a (size, size, 3) uint8 array, resized without keeping the aspect.

    Pillow's antialiased bilinear filter: what ``torchvision.transforms.Resize((256, 256))`` does to a
    Pillow image in the paper's released recipe.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def load(path: Path, size: int, *, root: Path | None = None, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Read, decode and resize one image.

    Raises
    ------
    ImageError
        With ``status`` and ``reason`` for the row. ``facts`` is set on it when the file could be read.
    """
    return picture(read_file(path, root), size, max_pixels=max_pixels)


def picture(facts: FileFacts, size: int, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode and resize an image whose bytes were read, from wherever they come.

    Raises
    ------
    ImageError
        As :func:`load`.
    """
    began = time.perf_counter()
    try:
        image, note = decode(facts.data, max_pixels=max_pixels)
        rgb = resize(image, size)
    except ImageError as exc:
        # Without the bytes: a folder of huge files must not pile up in memory.
        exc.facts = replace(facts, data=b"")
        raise
    spent = time.perf_counter() - began
    return Pixels(rgb, image.width, image.height, facts.bytes, facts.mtime, facts.sha256, note, spent)


def thumbnail(path: Path, size: int = 128, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return a small JPEG of an image for reports.

    Raises
    ------
    ImageError
    """
    image, _ = decode(read_file(path).data, max_pixels=max_pixels)
    image.thumbnail((size, size))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


def _one_line(exc: BaseException) -> str:
    text = " ".join(str(exc).split()) or type(exc).__name__
    # Pillow names the BytesIO by address, which differs from run to run.
    return "not an image" if "cannot identify image file" in text else text[:200]
