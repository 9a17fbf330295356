"""Choosing among projections on validation data, and the controls that stand beside every W."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .data import PairData
from .errors import SolverUsageError
from .gallery_maps import Centred, Identity, Pca, RandomSubspace
from .metrics import Ranking
from .projection import Projection
from .rank import check_rank
from .weighted import NormWeighted


def choose(
    candidates: Sequence[Projection], evaluate: Callable[[Projection], Ranking]
) -> tuple[int, list[dict[str, Any]]]:
    """Return the index of the candidate with the best validation mAP, and the table of all.

    The earlier of equals wins, so put the simpler first. Whatever identities `evaluate` reads have been
    used for choosing: record them with `Projection.using` before reporting.
    """
    if not candidates:
        raise SolverUsageError("There are 0 candidates to choose from; at least 1 is needed.")
    table: list[dict[str, Any]] = []
    for candidate in candidates:
        ranking = evaluate(candidate)
        row: dict[str, Any] = {
            "method": candidate.method,
            "knobs": dict(candidate.knobs),
            "rank": candidate.rank,
        }
        table.append({**row, "map": ranking.map, "acc": ranking.acc, "ties": ranking.ties})
    scores = [row["map"] for row in table]
    if any(score != score for score in scores):
        raise SolverUsageError(
            f"Validation has no query with a positive, so none of the {len(scores)} candidates can be "
            "judged. "
            "Hold out more identities."
        )
    return scores.index(max(scores)), table


def controls(data: PairData, rank: int, *, seed: int = 0) -> dict[str, Projection]:
    """Fit what must stand beside each W: raw, centred, norm-weighted, PCA-whitened (both), a random subspace.

    One spectrum of the gallery serves all. The whitenings come at the given rank and, where the gallery
    spans more, over its full span: the best of them counts.
    """
    check_rank(rank, data.dim)
    raw = Identity().fit(data).projection()
    found = {
        "raw": raw,
        "centred": replace(raw, center=data.gallery_spectrum.mean, method=Centred.name),
        "norm-weighted": NormWeighted().fit(data).projection(),
    }
    span = data.gallery_spectrum.rank
    for exponent, sign in ((0.25, "¼"), (0.5, "½")):
        full = Pca(None, exponent).fit(data).projection()
        if rank < span:
            small = replace(full.truncated(rank), knobs={"rank": rank, "exponent": exponent})
            found[f"PCA-whitened {sign}"] = small
        else:
            found[f"PCA-whitened {sign}"] = full
        found[f"PCA-whitened {sign}, all"] = full
    found["random subspace"] = RandomSubspace(rank, seed).fit(data).projection()
    return found
