"""The map of a collection that has no pairs: analytic, made once and kept in the store."""

from __future__ import annotations

from cli.collection import Collection
from cli.solving import SolveOptions, fit
from latentstore.errors import StoreWriteError
from latentstore.schema import LATENTS
from solvers.errors import ProjectionFormatError
from solvers.projection import Projection


def own_projection(collection: Collection) -> tuple[Projection, str, bool]:
    """Return the collection's analytic map, kept in the store; made anew when its latents have changed.

    Returns
    -------
    projection, path, made
    """
    rank = min(512, collection.store.layout.dim)
    folder = collection.store.root / "projections"
    if collection.store.array != LATENTS:
        folder /= collection.store.array
    path = folder / f"analytic-{rank}-{collection.data_hash}.safetensors"
    if path.exists():
        try:
            return Projection.load(path), str(path), False
        except ProjectionFormatError:
            pass  # damaged: it is ours to make again
    W, _, _ = fit(collection, SolveOptions(method="analytic", rank=rank))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("analytic-*.safetensors"):
            old.unlink(missing_ok=True)
        W.save(path)
    except OSError as exc:
        raise StoreWriteError(
            f"The collection's analytic map could not be kept at {path}: {exc.strerror or exc}. Make room or "
            "permission there, or make a map elsewhere with solve --method analytic and name it with "
            "--projection."
        ) from exc
    return W, str(path), True
