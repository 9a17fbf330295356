"""The words and figures that account for a solve: what T was, what was measured on, what it cannot say."""

from __future__ import annotations

from typing import Any

from cli.collection import Collection, Queries
from cli.measure import Evaluation
from cli.render import counted
from latentstore.results import Curve, Figure
from solvers.methods import get

_OF_T = {
    "numerical_rank": "numerical rank of T",
    "cutoff": "cutoff for zero",
    "sigma_max": "largest singular value of T",
    "sigma_min": "smallest singular value of T",
    "n_pairs": "training pairs",
}


def solver_figures(method: str, facts: dict[str, Any]) -> list[Figure]:
    """Return W's rank as a figure, and of a method that learns from T its rank, cutoff and extreme values."""
    out = []
    learned = get(method.removeprefix("auto: ")).needs_pairs
    names = {**(_OF_T if learned else {}), "effective_rank": "rank of W"}
    for key, name in names.items():
        value = facts.get(key)
        if value is not None:
            note = f"decided by {facts['decided_by']}" if key in ("numerical_rank", "cutoff") else ""
            out.append(Figure(name, float(value), method, "note", note=note))
    return out


def solver_curves(method: str, facts: dict[str, Any], choices: list[dict[str, Any]]) -> list[Curve]:
    """Return CosFace's course of training, or validation's mAP over λ, as curves."""
    history = facts.get("history")
    if history:
        seen = [h for h in history if h["loss"] is not None]
        out = [
            Curve(
                "CosFace: loss", "loss", [h["step"] for h in seen], [h["loss"] for h in seen], "step", "loss"
            )
        ]
        judged = [h for h in history if h["map"] is not None]
        if judged:
            x, y = [h["step"] for h in judged], [100 * h["map"] for h in judged]
            out.append(Curve("CosFace: validation mAP", "mAP", x, y, "step", "validation mAP, %"))
        return out
    return _ridge_curves(method, choices)


def _ridge_curves(method: str, choices: list[dict[str, Any]]) -> list[Curve]:
    """Return validation mAP over λ, a line for each score where several were tried."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for choice in choices:
        knobs = choice["knobs"]
        if "lam" in knobs:
            label = f"{method}, {knobs['score']}" if "score" in knobs else method
            lines.setdefault(label, []).append((float(knobs["lam"]), 100 * choice["map"]))
    return [
        Curve(
            f"{method}: validation mAP by λ",
            label,
            [x for x, _ in points],
            [y for _, y in points],
            "λ (mean diagonal of Σt)" if method == "gnull" else "λ",
            "mAP, %",
            x_log=True,
        )
        for label, points in lines.items()
    ]


def summary(evaluation: Evaluation, facts: dict[str, Any], queries: Queries) -> list[str]:
    """Return the plain sentences that head a solve's report."""
    out = list(evaluation.verdicts)
    if not out:
        held = counted(len(queries.rows), "query", "queries")
        out.append(
            f"Not measured: the store has {held} in its test split (one identity in ten, by hash). W was "
            "written; measure it on attacked or translated pictures with latentstore evaluate."
        )
    if facts.get("statement"):
        out.append(str(facts["statement"]))
    return out


def describe(collection: Collection, queries: Queries, evaluation: Evaluation) -> dict[str, Any]:
    """Return what the figures were measured on."""
    store = collection.store
    return {
        "store": str(store.path),
        "encoder": store.provenance.get("encoder", {}).get("name", ""),
        "space": store.space.id,
        "dim": store.layout.dim,
        "rows": len(store),
        "gallery": len(collection.gallery),
        "references ranked": evaluation.n_references,
        "training pairs": len(collection.pairs("train")[1]),
        "test queries": len(queries.rows),
        "test photos": len(set(queries.collection.group[queries.rows].tolist())),
        "queries": queries.group,
    }


def caveats(
    collection: Collection, queries: Queries, evaluation: Evaluation, *, learned: bool = True
) -> list[str]:
    """Return what the figures can not say; ``learned`` from pairs, or from the gallery alone."""
    out = []
    measured = bool(evaluation.methods)
    if measured and queries.group.startswith("oracle"):
        out.append(
            "The queries come from the analytic diffusion, the kind of translation that the analytic map "
            "assumes: an oracle, not an accuracy on real translations."
        )
    if measured and 0 < len(collection.gallery) < 2000:
        images = counted(len(collection.gallery), "image")
        out.append(
            f"The gallery has {images}; origins are much easier to find among few than among millions."
        )
    if evaluation.n_without_origin:
        out.append(f"{_queries(evaluation.n_without_origin)} left out: no origin in the gallery.")
    if evaluation.n_copies:
        out.append(left_out_copies(evaluation.n_copies))
    if collection.near[1]:
        out.append(collection.near[1])
    n_pairs = len(collection.pairs("train")[1])
    if learned and 0 < n_pairs < collection.store.layout.dim:
        out.append(
            "There are fewer training rows than dimensions, so part of the solution is arithmetic, not "
            "learned."
        )
    if measured:
        out.append(
            "PCA-whitening and the analytic map read the gallery's covariance, without labels. PCA-whitened "
            "@k is the best of its ranks by these very queries: an advantage that a control may have."
        )
    return out


def left_out_copies(n: int) -> str:
    """Say that so many queries were left out because their origin, or nearly it, was fitted on."""
    return (
        f"{_queries(n, 'held-out')} left out: a copy or near-duplicate of {'its' if n == 1 else 'their'} "
        "origin stands in a split that was fitted or chosen on."
    )


def _queries(n: int, what: str = "") -> str:
    """Return a number of queries with the verb that agrees: ``1 held-out query was``."""
    return counted(n, f"{what} query was".strip(), f"{what} queries were".strip())
