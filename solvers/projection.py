"""The fitted map: frozen, callable on any array library, one file on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import array_api_compat
import numpy as np

from .arrays import as_like, namespace
from .errors import ProjectionFormatError, SolverUsageError, SpaceError
from .files import read_safetensors, write_safetensors
from .rank import check_rank
from .weight import TORCH_SUFFIXES, read_weight

SCORES = ("cosine", "bias")
_FORMAT = "solvers.projection"


def identity_hash(names: Sequence[str]) -> np.ndarray:
    """Hash identity names to 64 bits each (BLAKE2b), so that a projection can name them briefly."""
    digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def as_hashes(identities: Any) -> np.ndarray:
    """Return identities, given as names or as 64-bit hashes, as sorted unique hashes."""
    array = np.asarray(identities)
    if array.dtype != np.uint64:
        array = identity_hash([str(name) for name in array.ravel().tolist()])
    return np.unique(array)


@dataclass(frozen=True, eq=False)
class Projection:
    """Maps latents to rows whose inner product is the score.

    Attributes
    ----------
    query_map, reference_map
        (d, m) float32; the same array unless the method treats the two sides differently.
    center
        (d,) subtracted from both sides first, or None.
    score
        "cosine": rows are L2-normalised (zero rows stay zero). "bias": the inner product plus the
        reference bias -||r||^2 / 2, carried by one more column, so that a plain inner product is the score.
    query_center
        (d,) subtracted from queries in the place of `center`, where translations have a mean of their own.
    norm_map
        (d, k), under the cosine alone: rows are divided by their norm under this map, not by their own.
        For queries that changes no ranking.
    spectrum
        Values the method read off the data; `truncated` leaves them whole.
    method, knobs
        What fitted it.
    space_id
        The encoder space of the latents; "" when unknown.
    data_hash
        The data it was fitted on.
    used_identities
        Sorted uint64 hashes of identities used for fitting on pairs or for choosing.
    seed
        Seed of anything random, or None.
    provenance
        JSON-able record of versions, devices, dates and of the fit.
    """

    query_map: np.ndarray
    reference_map: np.ndarray
    center: np.ndarray | None = None
    score: str = "cosine"
    spectrum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    method: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    space_id: str = ""
    data_hash: str = ""
    used_identities: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    seed: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    query_center: np.ndarray | None = None
    norm_map: np.ndarray | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        same = self.reference_map is self.query_map
        query = np.asarray(self.query_map, dtype=np.float32)
        reference = query if same else np.asarray(self.reference_map, dtype=np.float32)
        center, query_center, norm_map = (
            None if part is None else np.asarray(part, dtype=np.float32)
            for part in (self.center, self.query_center, self.norm_map)
        )
        if query.ndim != 2 or query.shape != reference.shape:
            raise SolverUsageError(
                f"Both maps must have one shape (d, m); got {query.shape} and {reference.shape}. "
                "Pass the same array twice for a symmetric map."
            )
        for row in (center, query_center):
            if row is not None and row.shape != query.shape[:1]:
                raise SolverUsageError(f"A centre must have the shape {query.shape[:1]}, not {row.shape}.")
        if self.score not in SCORES:
            raise SolverUsageError(f"The score must be one of {', '.join(SCORES)}, not {self.score!r}.")
        _check_norm_map(norm_map, len(query), self.score)
        parts: dict[str, Any] = {
            "query map": query,
            "reference map": reference,
            "centre": center,
            "queries' centre": query_center,
            "norm map": norm_map,
        }
        for name, value in parts.items():
            if value is not None and not np.isfinite(value).all():
                raise SolverUsageError(f"The {name} holds values that are not finite; the fit has failed.")
        settled = {
            "query_map": query,
            "reference_map": reference,
            "center": center,
            "query_center": query_center,
            "norm_map": norm_map,
            "spectrum": np.asarray(self.spectrum, dtype=np.float64),
            "used_identities": as_hashes(np.asarray(self.used_identities, dtype=np.uint64)),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @property
    def dim(self) -> int:
        """Length of a latent."""
        return int(self.query_map.shape[0])

    @property
    def rank(self) -> int:
        """Number of columns of W."""
        return int(self.query_map.shape[1])

    @property
    def symmetric(self) -> bool:
        """Whether queries and references pass through one map."""
        return self.reference_map is self.query_map

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what decides projected rows: maps, centres, score and space."""
        if "fingerprint" not in self._cache:
            digest = hashlib.sha256(f"{self.space_id} {self.score} {self.symmetric}".encode())
            for name in ("query_map", "reference_map", "center", "query_center", "norm_map"):
                part = getattr(self, name)
                digest.update(f" {name} {None if part is None else part.shape} ".encode())
                digest.update(b"" if part is None else np.ascontiguousarray(part).data)
            self._cache["fingerprint"] = digest.hexdigest()[:16]
        return str(self._cache["fingerprint"])

    def coordinates(self, x: Any, side: str = "query") -> Any:
        """Centre and map rows, without normalisation or bias, in x's own library and device.

        Float16 rows are computed and returned in float32; float64 rows stay float64.
        """
        return self._mapped(self._centred(x, side), side)

    def _centred(self, x: Any, side: str) -> Any:
        xp = namespace(x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise SolverUsageError(
                f"This projection takes rows of {self.dim} values; got an array of shape {tuple(x.shape)}. "
                "Use latents of the encoder it was fitted on."
            )
        if side not in ("query", "reference"):
            raise SolverUsageError(f"The side must be 'query' or 'reference', not {side!r}.")
        if x.dtype != xp.float64:
            x = xp.astype(x, xp.float32, copy=False)
        name = "query_center" if side == "query" and self.query_center is not None else "center"
        return x if getattr(self, name) is None else x - self._placed(name, x)

    def _mapped(self, centred: Any, side: str) -> Any:
        name = "query_map" if side == "query" else "reference_map"
        return centred if self._is_identity(name) else centred @ self._placed(name, centred)

    def queries(self, x: Any) -> Any:
        """Project query rows; their inner product with `references` rows is the score."""
        if self.score == "cosine":
            return self._normalised(x, "query")
        rows = self.coordinates(x, "query")
        xp = namespace(rows)
        return xp.concat([rows, xp.ones_like(rows[:, :1])], axis=1)

    def references(self, x: Any) -> Any:
        """Project reference rows."""
        if self.score == "cosine":
            return self._normalised(x, "reference")
        rows = self.coordinates(x, "reference")
        xp = namespace(rows)
        return xp.concat([rows, -0.5 * xp.sum(rows * rows, axis=1, keepdims=True)], axis=1)

    __call__ = queries

    def _normalised(self, x: Any, side: str) -> Any:
        centred = self._centred(x, side)
        rows = self._mapped(centred, side)
        measured = rows if self.norm_map is None else centred @ self._placed("norm_map", centred)
        xp = namespace(rows)
        # Scaled by the largest entry first, so that tiny rows neither underflow nor turn into zero.
        peak = xp.max(xp.abs(measured), axis=1, keepdims=True)
        one = xp.ones_like(peak)
        some = peak > 0
        peak = xp.where(some, peak, one)
        norm = xp.sqrt(xp.sum((measured / peak) ** 2, axis=1, keepdims=True))
        return xp.where(some, rows / peak / xp.where(some, norm, one), xp.zeros_like(rows))

    def truncated(self, m: int) -> Projection:
        """Keep the first m columns: for methods with nested ranks, the fit of rank m."""
        check_rank(m, self.rank)
        query = np.ascontiguousarray(self.query_map[:, :m])
        reference = query if self.symmetric else np.ascontiguousarray(self.reference_map[:, :m])
        knobs = {**self.knobs, "rank": m} if "rank" in self.knobs else self.knobs
        return replace(self, query_map=query, reference_map=reference, knobs=knobs)

    def with_score(self, score: str) -> Projection:
        """Return the same maps under another score."""
        knobs = {**self.knobs, "score": score} if "score" in self.knobs else self.knobs
        return replace(self, score=score, knobs=knobs)

    def using(self, identities: Any) -> Projection:
        """Record more identities (names or hashes) as used for fitting or choosing."""
        return replace(self, used_identities=np.union1d(self.used_identities, as_hashes(identities)))

    def check_space(self, space_id: str) -> None:
        """Raise `SpaceError` unless the latents' space is this projection's; unknown ids pass."""
        if self.space_id and space_id and self.space_id != space_id:
            raise SpaceError(
                f"The projection was fitted in the space {self.space_id}, the latents are of the space "
                f"{space_id}. "
                "Encode with the encoder and settings of the projection, or solve W for these latents."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with JSON metadata, atomically."""
        tensors = {"query_map": self.query_map, "spectrum": self.spectrum}
        tensors["used_identities"] = self.used_identities
        if not self.symmetric:
            tensors["reference_map"] = self.reference_map
        for name in ("center", "query_center", "norm_map"):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)
        info = {
            name: getattr(self, name)
            for name in ("score", "method", "knobs", "space_id", "data_hash", "seed", "provenance")
        }
        text = json.dumps(info, sort_keys=True, default=_jsonable)
        write_safetensors(path, tensors, {"format": _FORMAT, "version": "1", "info": text})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a projection, or a bare torch weight (.pt, .pth, .bin) whose rows are the m outputs.

        The latter is loaded as data only, transposed to (d, m), and has the unknown space "".
        """
        if Path(path).suffix.lower() in TORCH_SUFFIXES:
            return cls.from_weight(path)
        tensors, metadata = read_safetensors(path, _FORMAT)
        try:
            info = json.loads(metadata["info"])
            query = tensors["query_map"]
            return cls(
                query,
                tensors.get("reference_map", query),
                center=tensors.get("center"),
                query_center=tensors.get("query_center"),
                norm_map=tensors.get("norm_map"),
                spectrum=tensors["spectrum"],
                used_identities=tensors["used_identities"],
                **info,
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ProjectionFormatError(
                f"{path} lacks a part of a projection ({error}). It was written by another version; solve "
                "W again."
            ) from error

    @classmethod
    def from_weight(
        cls,
        path: str | os.PathLike[str],
        *,
        dim: int | None = None,
        key: str | None = None,
        space_id: str = "",
    ) -> Self:
        """Read a weight that was trained elsewhere (see `weight.read_weight`), for latents of length `dim`.

        What it was fitted on is not known: reports cannot refuse the identities that it has seen.
        """
        found = read_weight(Path(path), dim=dim, key=key)
        facts = {"file": Path(path).name, "key": found.key, "shape": found.shape, "left_out": found.left_out}
        return cls(found.W, found.W, method="torch weight", space_id=space_id, provenance=facts)

    def _placed(self, name: str, like: Any) -> Any:
        # One copy per device and dtype: a search calls this for every block.
        if array_api_compat.is_numpy_array(like) and like.dtype == np.float32:
            return getattr(self, name)
        key = (name, type(like).__module__, str(array_api_compat.device(like)), str(like.dtype))
        if key not in self._cache:
            self._cache[key] = as_like(getattr(self, name), like)
        return self._cache[key]

    def _is_identity(self, name: str) -> bool:
        # Raw and centred controls have an identity map; skipping the d x d product is exact.
        key = ("identity", name)
        if key not in self._cache:
            W = getattr(self, name)
            square = W.shape[0] == W.shape[1] and bool((np.diagonal(W) == 1).all())
            self._cache[key] = square and int(np.count_nonzero(W)) == len(W)
        return bool(self._cache[key])


def _check_norm_map(norm_map: np.ndarray | None, dim: int, score: str) -> None:
    if norm_map is None:
        return
    if score != "cosine":
        raise SolverUsageError(
            f"A norm map divides the rows of a cosine; under the score {score!r} it has no meaning. "
            "Leave it out, or use the cosine."
        )
    if norm_map.ndim != 2 or norm_map.shape[0] != dim:
        raise SolverUsageError(f"The norm map must have {dim} rows; got the shape {norm_map.shape}.")


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)
