"""What a store is, said before any byte is written: layout, space, statuses, identity and split rules."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from latentstore.errors import SpaceMismatchError, StoreFormatError, UsageError

SCHEMA_VERSION = 2
OLDEST_SCHEMA = 1
"""Older stores are read as they are; the next writer brings them up to date (:mod:`latentstore.migrate`)."""
CHUNK_ROWS = 84
"""Rows of one inner chunk: a multiple of 21, the rows of one OriPID identity."""
MAX_SHARD_ROWS = 4032
LATENTS = "latents"
"""The first array, whose encoding decides the manifest; others hold other encoders' latents of its rows."""
STATUS = "status"

STATUS_NAMES: tuple[str, ...] = (
    "not_written",
    "ok",
    "unreadable",
    "too_large",
    "not_finite",
    "missing",
    "link_outside",
    "removed",
    "changed",
    "killed",
)
"""Row statuses; the index is the code in the store's ``status`` array. The order is part of the schema."""
STATUS_CODE: dict[str, int] = {name: code for code, name in enumerate(STATUS_NAMES)}
OK = STATUS_CODE["ok"]

ROLES = ("origin", "translation", "reference", "query")
SPLITS = ("train", "validation", "test")
SOURCES = ("file", "simulated", "translated")
Posterior = Literal["mean", "sample", "deterministic"]

RESERVED = (
    "manifest",
    "inputs",
    "done",
    "projections",
    "duplicates",
    "moments",
    "index",
    "lock",
    "seal",
    LATENTS,
    STATUS,
)
_ARRAY_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_ORIPID = re.compile(r"(T[0-9]{6,})(?:_([0-9]+))?")


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_json(value: Any) -> str:
    """Return JSON with one spelling per value, for hashing."""
    return _canonical.encode(value)


def identity_and_role(path: str) -> tuple[str, str]:
    """Return the identity and role that a file name says (OriPID's rule).

    ``T000123_4.jpg`` is a translation of ``T000123``; ``T000123.jpg`` and ``T000123_0.jpg`` are its
    origin. Any other file is its own identity, with role ``reference``.

    Parameters
    ----------
    path : str
        Path relative to the input folder, with ``/``.
    """
    found = _ORIPID.fullmatch(PurePosixPath(path).stem)
    if found is None:
        return path, "reference"
    return found.group(1), "origin" if int(found.group(2) or 0) == 0 else "translation"


def split_of(group: str) -> str:
    """Return ``train`` (80 %), ``validation`` (10 %) or ``test`` (10 %) by hash, so that nothing leaks.

    ``group`` is the row's identity, or the photo that several identities (tiles, crops) were cut from.
    """
    digest = hashlib.sha256(b"latentstore split 1\0" + group.encode("utf-8", "surrogatepass")).digest()
    tenth = int.from_bytes(digest[:8], "big") % 10
    return "train" if tenth < 8 else SPLITS[tenth - 7]


def status_name(array: str) -> str:
    """Return the name of the array that holds the statuses of an array's rows."""
    return STATUS if array == LATENTS else f"{array}_{STATUS}"


def check_array_name(name: str) -> None:
    """Refuse a name that no second array can have.

    Raises
    ------
    UsageError
    """
    if not _ARRAY_NAME.fullmatch(name) or name in RESERVED or name.endswith(f"_{STATUS}"):
        raise UsageError(
            f"An array of a store cannot be called {name!r}: use lower-case letters, digits, - and _ (40 at "
            f"most), and none of {', '.join(RESERVED)} nor a name that ends in _{STATUS}."
        )


@dataclass(frozen=True)
class Space:
    """Everything that decides the value of a latent, and so whether two latents may be compared.

    Attributes
    ----------
    encoder : str
        Class of the encoder (``"AutoencoderKL"``, ``"patch"``).
    weights : str
        SHA-256 of the encoder's weights and configuration (the decoder plays no part).
    image_size : int
        Side in pixels of the square image that the encoder sees.
    resize : str
        Resize filter and library.
    posterior : {"mean", "sample", "deterministic"}
    latent_shape : tuple of int
        (C, H, W); rows are flattened in that order.
    seed : int or None
        Of the per-picture noise when ``posterior`` is ``"sample"``.
    """

    encoder: str
    weights: str
    image_size: int
    latent_shape: tuple[int, int, int]
    posterior: Posterior = "deterministic"
    resize: str = "pillow-bilinear"
    seed: int | None = None

    @property
    def dim(self) -> int:
        """Length of one flattened latent."""
        return int(np.prod(self.latent_shape))

    @cached_property
    def id(self) -> str:
        """The space id: 16 hexadecimal digits of the SHA-256 over all fields."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Space:
        """Rebuild from the store's attributes."""
        fields = dict(raw)
        fields["latent_shape"] = tuple(fields["latent_shape"])
        return cls(**fields)


def check_space(found: str, expected: str, *, what: str) -> None:
    """Refuse to let latents of two spaces meet.

    Raises
    ------
    SpaceMismatchError
        The two ids differ.
    """
    if found != expected:
        raise SpaceMismatchError(
            f"{what} belongs to space {found}, the store to space {expected}: their encoder weights, image "
            "size, resize filter or posterior differ, so their latents cannot be compared. Encode again "
            "with the store's encoder, or choose the store that belongs to it."
        )


@dataclass(frozen=True)
class Layout:
    """Where rows lie on disk. Without a codec shards are plain rows: row ``r`` starts at a computable byte.

    Attributes
    ----------
    rows, dim : int
        Shape of ``latents``.
    dtype : str
        ``"float16"`` or ``"float32"``, little-endian.
    shard_rows : int
        Rows of one shard file, a multiple of 84; a function of the first ``rows``, never of timing.
    codec : str or None
        See :mod:`latentstore.codecs`; sizes below are then those of plain rows.
    """

    rows: int
    dim: int
    shard_rows: int
    dtype: str = "float16"
    codec: str | None = None

    @classmethod
    def plan(
        cls,
        rows: int,
        dim: int,
        *,
        dtype: str = "float16",
        shard_rows: int | None = None,
        codec: str | None = None,
    ) -> Layout:
        """Choose the shard size: ``min(4032, 84·⌈rows / 2688⌉)`` unless given.

        Raises
        ------
        UsageError
            ``shard_rows`` is not a positive multiple of 84, or ``dtype`` is not a float the store keeps.
        """
        if dtype not in ("float16", "float32"):
            raise UsageError(f"The store keeps float16 or float32, not {dtype!r}.")
        if shard_rows is None:
            shard_rows = min(MAX_SHARD_ROWS, CHUNK_ROWS * max(1, -(-rows // (32 * CHUNK_ROWS))))
        if shard_rows < CHUNK_ROWS or shard_rows % CHUNK_ROWS:
            raise UsageError(
                f"--shard-rows is {shard_rows}; it must be a positive multiple of {CHUNK_ROWS} "
                f"(for example {max(1, round(shard_rows / CHUNK_ROWS)) * CHUNK_ROWS})."
            )
        return cls(rows=rows, dim=dim, shard_rows=shard_rows, dtype=dtype, codec=codec)

    @property
    def n_shards(self) -> int:
        """How many shard files the rows need."""
        return -(-self.rows // self.shard_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one latent."""
        return self.dim * np.dtype(self.dtype).itemsize

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks of a full shard (also the entries of every shard's index)."""
        return self.shard_rows // CHUNK_ROWS

    def span(self, shard: int) -> range:
        """Return the rows of a shard."""
        return range(shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows))

    def shard_bytes(self, shard: int) -> int:
        """Return the size in bytes of a complete shard file: whole chunks, index, crc32c."""
        chunks = -(-len(self.span(shard)) // CHUNK_ROWS)
        return chunks * CHUNK_ROWS * self.row_bytes + index_bytes(self.chunks_per_shard)

    @property
    def total_bytes(self) -> int:
        """Bytes of all latent shards."""
        if not self.n_shards:
            return 0
        return (self.n_shards - 1) * self.shard_bytes(0) + self.shard_bytes(self.n_shards - 1)


def index_bytes(chunks_per_shard: int) -> int:
    """Return the size of a shard's index: 16 bytes a chunk and a crc32c."""
    return 16 * chunks_per_shard + 4


@dataclass(frozen=True)
class StoreSpec:
    """A store described, not yet created.

    Attributes
    ----------
    kind : {"images", "simulated", "imported"}
        Whether rows were encoded from pixels, drawn by the analytic diffusion, or read as latents.
    space : Space
    layout : Layout
    provenance : dict
        Device, dtypes, package versions, date: recorded, never compared.
    origin : dict
        How the rows were listed or drawn (input folder or manifest; simulator settings).
    """

    kind: Literal["images", "simulated", "imported"]
    space: Space
    layout: Layout
    provenance: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)


def read_attributes(raw: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the store's own attributes, checked for the schema version.

    Raises
    ------
    StoreFormatError
        No latentstore attributes, or of another schema version.
    """
    attrs = raw.get("latentstore")
    if not isinstance(attrs, Mapping) or "schema" not in attrs:
        raise StoreFormatError(f"{path} is a Zarr group, but not a latentstore store.")
    if attrs["schema"] not in range(OLDEST_SCHEMA, SCHEMA_VERSION + 1):
        raise StoreFormatError(
            f"{path} has store schema {attrs['schema']}, this version reads {OLDEST_SCHEMA} to "
            f"{SCHEMA_VERSION}: use the version of latentstore that wrote it, or encode again."
        )
    return dict(attrs)
