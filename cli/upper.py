"""The upper bound of Table 3: W's own method fitted on the very model whose translations are asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cli import choosing, measure
from cli.collection import BLOCK, Collection, Rows
from cli.knobs import has_rank
from cli.measure import Group
from cli.ranked import Asked, rankings, used_names
from latentstore.results import Figure
from solvers.data import PairData
from solvers.errors import SolverError
from solvers.methods import METHODS
from solvers.projection import Projection, identity_hash

GROUP = "upper bound: fitted on the model that is asked"


@dataclass(frozen=True)
class _Pairs:
    """Training pairs whose origins may lie in another store."""

    own: Collection
    origins: Rows
    of: Collection
    translations: Rows


def upper_bound(
    gallery: Collection,
    stores: Sequence[Collection],
    asked: Asked,
    maps: Mapping[str, Projection],
    seen: Mapping[str, set[str]],
) -> tuple[list[Figure], list[str]]:
    """Fit each map's method, with its knobs, on each model unseen by it, and measure the fit on that model.

    Parameters
    ----------
    gallery : Collection
    stores : sequence of Collection
        Where training pairs may lie, in this order.
    asked : Asked
        The test queries.
    maps : mapping of name to Projection
    seen : mapping of name to set of str
        Models that each map learned from; without those that learn from no pairs.

    Returns
    -------
    figures, sentences
        The sentences say why there is no bound where there is none.
    """
    models = sorted(set(asked.column("named_model").tolist()))
    figures: list[Figure] = []
    said: list[str] = []
    over: dict[str, list[str]] = {}
    for name, W in maps.items():
        why = _not_fitted(name, W)
        if why:
            said.append(why)
            continue
        unseen = [model for model in models if model not in seen[name]]
        if not unseen:
            said.append(
                f"Upper bound of {name}: it learned from every model that is asked, so that W is its own "
                "upper bound."
            )
        made: dict[str, tuple[Any, Any]] = {}
        for model in unseen:
            pairs = _training_pairs(gallery, stores, model)
            n = sum(len(p.translations) for p in pairs)
            if not n:
                said.append(
                    f"Upper bound of {name} on {model}: no store here has a training pair by that model."
                )
                continue
            try:
                fitted = _fitted(gallery, pairs, W)
            except SolverError as error:
                said.append(f"Upper bound of {name} on {model}: it cannot be fitted on {n:,} pairs. {error}")
                continue
            made[model] = _measured(gallery, asked, fitted, model)
        figures += _figures(name, made)
        if made:
            over[name] = list(made)
    if len({tuple(of) for of in over.values()}) > 1:
        listed = "; ".join(f"{name}: {', '.join(of)}" for name, of in over.items())
        said.append(f"Upper bounds are means over different models ({listed}) and cannot be compared.")
    return figures, list(dict.fromkeys(said))


def _not_fitted(name: str, W: Projection) -> str:
    method = METHODS.get(W.method)
    if method is None:
        return f"Upper bound of {name}: its method is not known here, so it cannot be fitted again."
    if method.needs_torch:
        return (
            f"Upper bound of {name}: only closed forms are fitted again here. Train {W.method} on each model "
            "with solve, and evaluate what comes of it."
        )
    if not method.needs_pairs:
        return f"Upper bound of {name}: {W.method} learns from no pairs, so no model is nearer to it."
    return ""


def _training_pairs(gallery: Collection, stores: Sequence[Collection], model: str) -> list[_Pairs]:
    """Return a model's training pairs, of the first store that has any; origins from there or the gallery."""
    for of in stores:
        rows = np.flatnonzero(of.ok & (of.role == "translation") & (of.split == "train"))
        rows = rows[of.named_model[rows] == model]
        found = []
        for own in dict.fromkeys((of, gallery)):
            origins = own.origin_rows(of.identity[rows])
            if (origins >= 0).any():
                found.append(_Pairs(own, origins[origins >= 0], of, rows[origins >= 0]))
            rows = rows[origins < 0]
        if found:
            return found
    return []


def _fitted(gallery: Collection, pairs: Sequence[_Pairs], W: Projection) -> Projection:
    """Fit a map's method with its knobs."""

    def blocks() -> Iterator[tuple[Any, Any]]:
        for p in pairs:
            order = np.argsort(p.origins, kind="stable")
            for at in range(0, len(order), BLOCK):
                here = order[at : at + BLOCK]
                yield p.own.read(p.origins[here]), p.of.read(p.translations[here])

    data: PairData = replace(
        gallery.data,
        n_pairs=sum(len(p.translations) for p in pairs),
        n_origins=sum(len(np.unique(p.origins)) for p in pairs),
        pairs_source=blocks,
        origins_source=lambda: (block for p in pairs for block in p.own.blocks(np.unique(p.origins))),
        moments_source=lambda: None,  # those kept are of all models' pairs
    )
    knobs = {k: v for k, v in W.knobs.items() if k != "rank" and v is not None}
    rank = W.rank if has_rank(W.method) else None
    made, _ = next(iter(choosing.fits(data, W.method, rank, [knobs])))
    names = [name for p in pairs for name in used_names(p.of, p.translations)]
    return replace(made, space_id=gallery.store.space.id, used_identities=np.unique(identity_hash(names)))


def _measured(gallery: Collection, asked: Asked, fitted: Projection, model: str) -> tuple[Any, Any]:
    """Return the ranking of a model's queries, and the photos behind them."""
    parts = [replace(p, rows=p.rows[p.collection.named_model[p.rows] == model]) for p in asked.parts]
    own = Asked.of(gallery, parts)
    own.check(gallery, {model: fitted})
    return rankings(gallery, own, {model: fitted})[model], own.photos


def _figures(name: str, made: Mapping[str, tuple[Any, Any]]) -> list[Figure]:
    out: list[Figure] = []
    for model, (ranking, photos) in made.items():
        group = Group(f"{GROUP}, {model}", photos, {"model": model, "domain": "upper"})
        out += measure.compared(group, {name: ranking}, [name], [])[0]
    if made:
        out += _mean(name, made)
    return out


def _mean(name: str, made: Mapping[str, tuple[Any, Any]]) -> list[Figure]:
    """Return the mean over models, each of which weighs the same."""
    photos = np.concatenate([photos for _, photos in made.values()])
    models = np.repeat(np.array(list(made), object), [len(photos) for _, photos in made.values()])
    group = Group(GROUP, photos, {"domain": "upper"}, models)
    out = []
    for what, values in (
        ("mAP", np.concatenate([r.ap for r, _ in made.values()])),
        ("Acc", np.concatenate([r.hit1 for r, _ in made.values()])),
    ):
        out.append(measure.figure(what, values, name, "method", group))
    return out
