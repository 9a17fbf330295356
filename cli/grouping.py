"""The groups that queries are reported in: all, by model, by strength, by models that W has seen or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cli import measure
from cli.ablation_tables import SEEN, UNSEEN
from cli.collection import UNNAMED, Collection
from cli.measure import Group, Measured
from cli.ranked import Asked
from latentstore.results import Figure
from solvers.methods import METHODS
from solvers.metrics import Ranking
from solvers.projection import Projection, identity_hash

STRENGTHS = 20
"""Different strengths from which on they are rounded to tenths: the groups are to be read."""
Kind = Literal["all", "domain", "model", "strength", "cell"]


@dataclass(frozen=True)
class Slice:
    """Some of the queries that are asked, as a group.

    Attributes
    ----------
    kind : {"all", "domain", "model", "strength", "cell"}
        A cell is one model at one strength.
    group : Group
    chosen : (q,) bool array
        Which of all queries.
    """

    kind: Kind
    group: Group
    chosen: npt.NDArray[np.bool_]


def seen_models(W: Projection, stores: Sequence[Collection]) -> set[str] | None:
    """Return the models whose translations a map learned from; None of one that learned from none.

    A map tells them itself where it was solved here. Of any other they are the models of translations in the
    training split of these stores whose identities it names as used; none where it names none.
    """
    if W.method in METHODS and not METHODS[W.method].needs_pairs:
        return None
    if "models" in W.provenance:
        return set(W.provenance["models"])
    own = [c for c in stores if W.data_hash and c.data_hash == W.data_hash] or stores
    found: set[str] = set()
    for collection in own:
        train = collection.ok & (collection.role == "translation") & (collection.split == "train")
        rows = np.flatnonzero(train)
        used = np.isin(identity_hash(collection.identity[rows].tolist()), W.used_identities)
        found |= set(collection.named_model[rows[used]].tolist())
    return found


def seen_by_each(maps: Mapping[str, Projection], stores: Sequence[Collection]) -> dict[str, set[str]]:
    """Return the models that each map learned from; maps that learn from no pairs are left out."""
    each = {name: seen_models(W, stores) for name, W in maps.items()}
    return {name: models for name, models in each.items() if models is not None}


def seen_by_all(seen: Mapping[str, set[str]]) -> tuple[set[str] | None, list[str]]:
    """Return the models that every map learned from alike, and what is to be said where they differ.

    Where they differ (None) no query is of a seen or an unseen model: it would be so for some maps alone.
    """
    if not seen:
        return None, []
    first, *others = seen.values()
    if all(models == first for models in others):
        return first, []
    listed = "; ".join(f"{name}: {', '.join(sorted(models)) or 'none'}" for name, models in seen.items())
    said = (
        f"The projections learned from different models ({listed}), so no model is seen or unseen by all of "
        "them, and figures are not grouped by that. Evaluate each alone to have such groups."
    )
    return None, [said]


def slices(asked: Asked, seen: set[str] | None) -> list[Slice]:
    """Return the groups of queries: the whole first; none of them twice.

    Parameters
    ----------
    asked : Asked
    seen : set of str or None
        Models that were learned from; None where nothing was, or not the same by all maps, so that no model
        is seen or unseen.
    """
    models, strengths = asked.column("named_model"), asked.column("strength")
    if len(np.unique(strengths[~np.isnan(strengths)])) > STRENGTHS:
        strengths = np.round(strengths, 1)
    simulated = asked.column("source") == "simulated"
    names = list(dict.fromkeys(sorted(models.tolist())))
    domains = {m: "" if seen is None else "seen" if m in seen else "unseen" for m in names}
    domain = np.array([domains[m] for m in models], object)
    whole = np.ones(len(models), bool)

    def made(kind: Kind, name: str, chosen: npt.NDArray[np.bool_], **axes: str | float) -> Slice:
        oracle = "" if kind == "all" or not simulated[chosen].all() else "oracle: "
        full = kind != "cell"
        strata = models[chosen] if kind == "domain" else None
        return Slice(kind, Group(f"{oracle}{name}", asked.photos[chosen], axes, strata, full), chosen)

    alone = len(names) == 1
    ofall: dict[str, str | float] = {"domain": domains[names[0]]} if alone and domains[names[0]] else {}
    out = [made("all", _name(asked), whole, **ofall)]
    for kind, name in (("seen", SEEN), ("unseen", UNSEEN)):
        if not alone and (domain == kind).any():
            out.append(made("domain", name, domain == kind, domain=kind))
    placed = {m: {"model": m, **({"domain": domains[m]} if domains[m] else {})} for m in names}
    if not alone:
        out += [made("model", f"model {m}", models == m, **placed[m]) for m in names]
    levels = np.unique(strengths[~np.isnan(strengths)]).tolist()
    if len(levels) > 1:
        # Of one model a strength is a cell, too: it has that model's place in a table.
        only = placed[names[0]] if alone and names[0] != UNNAMED else {}
        out += [made("strength", f"strength {s:g}", strengths == s, strength=s, **only) for s in levels]
    if len(levels) > 1 and not alone:
        for m, s in ((m, s) for m in names for s in levels):
            cell = (models == m) & (strengths == s)
            if cell.any():
                out.append(made("cell", f"model {m}, strength {s:g}", cell, strength=s, **placed[m]))
    return out


def _name(asked: Asked) -> str:
    """Return what all queries are called together."""
    names = list(dict.fromkeys(p.group for p in asked.parts if len(p.rows)))
    return names[0] if len(names) == 1 else "all queries"


def reported(
    found: Mapping[str, Ranking],
    cut: Slice,
    methods: Sequence[str],
    control_set: Sequence[str],
    *,
    n_references: int,
) -> tuple[list[Figure], list[Measured]]:
    """Return the figures of one group, and what the maps reached on it.

    The main groups have every control beside them; the others raw, norm-weighted, the best of PCA-whitening
    and whichever is the best of all, so that the numbers can still be read.
    """
    own = {name: ranking.subset(cut.chosen) for name, ranking in found.items()}
    score = {name: cut.group.map(own[name]) for name in control_set}
    shown = measure.best_of_ladders(list(control_set), score)
    if cut.kind not in ("all", "domain"):
        shown = list(dict.fromkeys(_few(shown, score)))
    figures, measured = measure.compared(cut.group, own, methods, shown)
    return [*figures, *measure.chance(cut.group, n_references, int(cut.chosen.sum()))], measured


def _few(names: Sequence[str], score: Mapping[str, float]) -> Iterator[str]:
    yield from (n for n in names if n in ("raw", "norm-weighted"))
    rivals = [n for n in names if not n.startswith(measure.RANDOM)]
    for some in ([n for n in rivals if n.startswith("PCA")], rivals):
        if some:
            yield max(some, key=lambda n: score[n])
