"""The analytic diffusion: translations drawn in latent space by a diffusion model that is known exactly.

With a Gaussian prior N(m, Σ) on latents the ideal denoiser is linear. Noising, z_t = √ᾱ z₀ + √(1−ᾱ) ε,
and one denoising step give a translation in closed form: a true diffusion model with a known answer,
but *no text-guided network*. Whatever is measured on it is to be labelled so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from latentstore._version import __version__
from latentstore.create import create
from latentstore.encoders import row_noise
from latentstore.errors import LatentStoreError, UsageError
from latentstore.manifest import INPUT_SCHEMA, MANIFEST_SCHEMA
from latentstore.schema import OK, Layout, StoreSpec, check_space
from latentstore.shards import ShardWriter
from latentstore.store import LatentStore, exists, open_store, writing

_EIGENVALUE_FLOOR = 1e-4
_BATCH = 256


@dataclass(frozen=True)
class GaussianPrior:
    """N(mean, Σ) on latents, Σ given by its leading eigenpairs and one value for all other directions.

    Attributes
    ----------
    mean : (d,) array
    vectors : (d, r) array
        Orthonormal.
    values : (r,) array
        Eigenvalues e, scaled so that the mean over all d directions is 1, floored at 1e-4 of the largest.
    rest : float
        The eigenvalue of every direction outside ``vectors``.
    scale : float
        Mean eigenvalue of Σ before scaling: a latent is ``mean + √scale · x``.
    """

    mean: npt.NDArray[np.float64]
    vectors: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]
    rest: float
    scale: float

    @classmethod
    def from_spectrum(
        cls,
        mean: npt.NDArray[np.floating[Any]],
        values: npt.NDArray[np.floating[Any]],
        vectors: npt.NDArray[np.floating[Any]],
    ) -> GaussianPrior:
        """Scale and floor the eigenvalues of a covariance.

        Raises
        ------
        UsageError
            The covariance is zero (one image, or identical ones).
        """
        total = float(np.sum(values))
        if not total > 0:
            raise UsageError(
                "The originals do not vary (one image, or identical ones): no prior can be fitted to them. "
                "Encode at least two different images of the training split."
            )
        scale = total / len(mean)
        scaled = np.asarray(values, np.float64) / scale
        floor = _EIGENVALUE_FLOOR * float(scaled.max())
        return cls(
            mean=np.asarray(mean, np.float64),
            vectors=np.asarray(vectors, np.float64),
            values=np.maximum(scaled, floor),
            rest=floor,
            scale=scale,
        )


@dataclass(frozen=True)
class Diffusion:
    """How a translation is drawn.

    Attributes
    ----------
    alpha_bar : float
        ᾱ of the noise level, in (0, 1); less is a stronger translation.
    prompt : float
        Standard deviation of the random prompt's mean, in units of the prior's own.
    mode : {"sample", "mean"}
        A draw from p(z₀ | z_t), or Lemma 1's one-step estimate E[z₀ | z_t].
    seed : int
    """

    alpha_bar: float = 0.2
    prompt: float = 0.3
    mode: Literal["sample", "mean"] = "sample"
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.prompt) and np.isfinite(self.alpha_bar)):
            raise UsageError(
                f"--alpha-bar {self.alpha_bar} and --prompt-strength {self.prompt} must be finite."
            )
        if not 0 < self.alpha_bar < 1:
            raise UsageError(f"--alpha-bar is {self.alpha_bar}; it must lie between 0 and 1 (0.2, say).")
        if self.prompt < 0:
            raise UsageError(f"--prompt-strength is {self.prompt}; it cannot be negative.")
        if self.mode not in ("sample", "mean"):
            raise UsageError(f"--mode is {self.mode!r}; use sample or mean.")

    @property
    def name(self) -> str:
        """The ``model`` column of the rows it makes."""
        return f"analytic diffusion, alpha_bar {self.alpha_bar:g}, prompt {self.prompt:g}, {self.mode}"


def translate(
    latents: npt.NDArray[np.floating[Any]],
    prior: GaussianPrior,
    diffusion: Diffusion,
    rows: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Return one translation of each latent.

    Parameters
    ----------
    latents : (b, d) array
    prior : GaussianPrior
    diffusion : Diffusion
    rows : (b,) array
        Seed the noise, one draw a row: the same in any batch or order.

    Returns
    -------
    (b, d) float64 array

    Notes
    -----
    In the prior's eigenbasis, with eigenvalue e and prompt mean m ~ N(0, p² e):
    z_t = √ᾱ z₀ + √(1−ᾱ) ε, E[z₀ | z_t] = m + h (z_t − √ᾱ m) with h = √ᾱ e/(ᾱe + 1 − ᾱ),
    var[z₀ | z_t] = e(1 − ᾱ)/(ᾱe + 1 − ᾱ). Noise, draw and prompt are independent Gaussians, so the
    translation is one: g ~ N(a z₀, h²(1 − ᾱ) + var[z₀ | z_t] + (1 − a)² p² e), with a = √ᾱ h.
    """
    d = len(prior.mean)
    x = (np.asarray(latents, np.float64) - prior.mean) / np.sqrt(prior.scale)
    noise = np.stack([row_noise(diffusion.seed, int(r), d, stream=1) for r in rows]).astype(np.float64)
    a, deviation = _transfer(prior.values, diffusion)
    # Directions outside the eigenvectors share one eigenvalue, so they need no basis of their own.
    rest_a, rest_deviation = _transfer(np.array(prior.rest), diffusion)
    inside = (a - rest_a) * (x @ prior.vectors) + (deviation - rest_deviation) * (noise @ prior.vectors)
    out = rest_a * x + rest_deviation * noise + inside @ prior.vectors.T
    return prior.mean + np.sqrt(prior.scale) * out


def _transfer(
    e: npt.NDArray[np.float64], diffusion: Diffusion
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return (a, √s) of g ~ N(a z₀, s) for directions of eigenvalue e."""
    ab = diffusion.alpha_bar
    total = ab * e + 1 - ab
    h = np.sqrt(ab) * e / total
    a = np.sqrt(ab) * h
    s = h**2 * (1 - ab) + (1 - a) ** 2 * diffusion.prompt**2 * e
    if diffusion.mode == "sample":
        s = s + e * (1 - ab) / total
    return a, np.sqrt(s)


def simulate(
    source: LatentStore,
    out: Path,
    prior: GaussianPrior,
    diffusion: Diffusion,
    *,
    prior_id: str = "",
    per_origin: int = 1,
    on_start: Callable[[int, int], None] | None = None,
    on_rows: Callable[[int, int], None] | None = None,
) -> LatentStore:
    """Write a store of pairs: every valid origin of ``source`` with simulated translations.

    Origins and references of the source become origins here, each followed by ``per_origin``
    translations. Running it again resumes it.

    Parameters
    ----------
    source : LatentStore
    out : Path
    prior : GaussianPrior
    diffusion : Diffusion
    prior_id : str
        Names what the prior was fitted on; recorded, and compared when a run is resumed.
    per_origin : int
    on_start, on_rows : callable, optional
        Called with (rows to write, rows of the store), and with (rows, bad rows) after each batch.

    Raises
    ------
    UsageError
        ``out`` holds something else, or was made with other settings; no valid origin; a bad count.
    """
    if per_origin < 1:
        raise UsageError(f"--per-origin is {per_origin}; at least 1 translation an origin is needed.")
    rows = _origin_rows(source)
    settings = {
        "store": str(source.path.absolute()),
        "data_hash": source.data_hash(),
        "prior": prior_id,
        "per_origin": per_origin,
        **asdict(diffusion),
    }
    if exists(out):
        store = _same_run(open_store(out), source, settings)
    else:
        inputs = _inputs(source, rows, per_origin, diffusion)
        spec = StoreSpec(
            kind="simulated",
            space=source.space,
            layout=Layout.plan(inputs.num_rows, source.layout.dim, dtype=source.layout.dtype),
            provenance={
                **source.provenance,
                "latentstore": __version__,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            origin={"simulated": settings, "root": source.origin.get("root", "")},
        )
        try:
            store = create(out, spec, inputs)
        except LatentStoreError:
            # Another process may have made the same store in between: then its lock decides.
            if not exists(out):
                raise
            store = _same_run(open_store(out), source, settings)
    manifest = source.manifest().take(pa.array(rows))
    with writing(out):
        todo = store.todo()
        if on_start is not None:
            on_start(sum(len(store.layout.span(s)) for s in todo), len(store))
        for shard in todo:
            _write_shard(store, shard, source, rows, manifest, prior, diffusion, on_rows)
    return store


def _origin_rows(source: LatentStore) -> npt.NDArray[np.int64]:
    source.require_complete()
    roles = source.manifest(["role"])["role"].to_numpy(zero_copy_only=False)
    rows = np.flatnonzero((source.status() == OK) & np.isin(roles, ("origin", "reference")))
    if not len(rows):
        raise UsageError(f"{source.path} holds no valid origin or reference image to translate.")
    return rows


def _same_run(store: LatentStore, source: LatentStore, settings: dict[str, Any]) -> LatentStore:
    check_space(source.space.id, store.space.id, what=str(source.path))
    made = store.origin.get("simulated")
    if made != settings:
        changed = [k for k, v in settings.items() if not isinstance(made, dict) or made.get(k) != v]
        raise UsageError(
            f"{store.root} exists and was made with other settings ({', '.join(changed)} differ). "
            "Choose another --out, or delete it."
        )
    return store


def _inputs(
    source: LatentStore, rows: npt.NDArray[np.int64], per_origin: int, diffusion: Diffusion
) -> pa.Table:
    own = source.manifest(["path", "identity", "group", "split"]).take(pa.array(rows))
    each = 1 + per_origin
    table = own.take(pa.array(np.repeat(np.arange(len(rows)), each)))
    k = np.tile(np.arange(each), len(rows))
    n = len(k)
    columns = {
        "path": pa.array(
            p if i == 0 else f"{p}#{i}" for p, i in zip(table["path"].to_pylist(), k.tolist(), strict=True)
        ),
        "path_raw": pa.nulls(n, pa.binary()),
        "identity": table["identity"],
        "group": table["group"],
        "role": pa.array(np.where(k == 0, "origin", "translation")),
        "split": table["split"],
        "source": pa.array(np.where(k == 0, "file", "simulated")),
        "model": pa.array(np.where(k == 0, "", diffusion.name)),
        "prompt": pa.array([""] * n),
        "strength": pa.nulls(n, pa.float32()),
    }
    return pa.table(columns).select(INPUT_SCHEMA.names).cast(INPUT_SCHEMA)


def _write_shard(
    store: LatentStore,
    shard: int,
    source: LatentStore,
    rows: npt.NDArray[np.int64],
    manifest: pa.Table,
    prior: GaussianPrior,
    diffusion: Diffusion,
    on_rows: Callable[[int, int], None] | None,
) -> None:
    each = len(store) // len(rows)
    span = store.layout.span(shard)
    with ShardWriter(store.root, store.layout, shard, store.space.id) as writer:
        statuses = []
        for first in range(span.start, span.stop, _BATCH):
            here = np.arange(first, min(first + _BATCH, span.stop), dtype=np.int64)
            latents = source.reader.gather(rows[here // each]).astype(np.float64)
            moved = here % each != 0
            if moved.any():
                latents[moved] = translate(latents[moved], prior, diffusion, here[moved])
            statuses.append(writer.append(latents, np.full(len(here), OK, np.uint8)))
            if on_rows is not None:
                on_rows(len(here), int((statuses[-1] != OK).sum()))
        writer.commit(_manifest(store, span, manifest, each, np.concatenate(statuses)))


def _manifest(
    store: LatentStore, span: range, own: pa.Table, each: int, statuses: npt.NDArray[np.uint8]
) -> pa.Table:
    at = np.arange(span.start, span.stop)
    table = own.take(pa.array(at // each))
    inputs = store.inputs().slice(span.start, len(span))
    for name in INPUT_SCHEMA.names:
        if name in MANIFEST_SCHEMA.names:
            table = table.set_column(table.schema.get_field_index(name), name, inputs[name])
    table = table.set_column(0, "row", pa.array(at))
    # A simulated row has no file: what describes its origin's is not its own.
    moved = pa.array(at % each != 0)
    for name in ("bytes", "mtime", "sha256", "width", "height"):
        column = table.schema.get_field_index(name)
        own_type = table.schema.field(name).type
        table = table.set_column(column, name, pc.if_else(moved, pa.scalar(None, own_type), table[name]))
    ok = statuses == OK
    table = table.set_column(
        table.schema.get_field_index("status"), "status", pa.array(np.where(ok, "ok", "not_finite"))
    )
    reason = pa.array(np.where(ok, "", "the translation is not finite in the stored dtype"))
    return table.set_column(table.schema.get_field_index("reason"), "reason", reason).cast(MANIFEST_SCHEMA)
