"""Whether a query's origin is in the collection at all: calibrated on its own pictures, and kept there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cli.calibrating import Blocks, OnRows, Photos, calibrate, is_refitted, passes, references_of
from cli.collection import Collection, Rows
from cli.kept import forget
from latentstore.errors import UsageError
from latentstore.results import Curve, Role, Verdict
from latentstore.schema import LATENTS
from solvers.errors import ProjectionFormatError, SolverUsageError
from solvers.projection import Projection
from solvers.verdict import (
    ENOUGH,
    LEAST,
    MATCH,
    PASSED,
    Calibration,
    Decision,
    alike,
    standing,
    verdict_map,
)

OnStart = Callable[[int, int], None]
PLOT = "Scores with and without an origin here"
_BINS = 40
_BLOCK = 128
"""Queries that are judged at a time."""
_VERSION = 3
"""Of how a calibration is made: another one has another name."""


@dataclass(frozen=True, eq=False)
class Judge:
    """Gives verdicts.

    Attributes
    ----------
    collection : Collection
    projection : Projection
        Whose score is calibrated; not the one that ranks.
    calibration : Calibration
    """

    collection: Collection
    projection: Projection
    calibration: Calibration

    def verdicts(self, latents: npt.NDArray[np.floating[Any]], rows: Rows) -> list[Verdict]:
        """Judge whether the row that ranked first for a query stands out from the next ones.

        Parameters
        ----------
        latents : (n, d) array
        rows : (n, k) int64 array
            Ranked rows, best first; `solvers.verdict.CANDIDATES` are enough. -1 where there are no more.
        """
        spans = [slice(at, at + _BLOCK) for at in range(0, len(latents), _BLOCK)]
        scores = np.concatenate([np.zeros(0), *(self._standing(latents[s], rows[s]) for s in spans)])
        called = [self.calibration.decide(s) for s in scores.tolist()]
        worth = {decision: self._worth(decision) for decision in set(called)}
        return [
            replace(worth[decision], score=float(s), p=float(p))
            for decision, s, p in zip(called, scores, self.calibration.p(scores), strict=True)
        ]

    def _standing(self, latents: npt.NDArray[np.floating[Any]], rows: Rows) -> npt.NDArray[np.float64]:
        rows, known = np.maximum(rows, self.collection.gallery[0]), rows >= 0
        references, at = references_of(self.collection, self.projection, rows)
        queries = self.projection.queries(np.asarray(latents, np.float64))
        scores = np.stack([references[i] @ q for i, q in zip(at, queries, strict=True)])
        scores[~known] = np.nan
        # An approximate index found too few to tell: nothing is taken for granted.
        scores[known.sum(axis=1) <= PASSED + ENOUGH, 0] = np.nan
        same = np.stack([alike(references[i[0]], references[i]) for i in at])
        labels = self.collection.labels(self.collection.identity[rows.ravel()]).reshape(rows.shape)
        for names in (labels, self.collection.group[rows]):
            same |= names == names[:, :1]
        return standing(scores[:, 0], np.where(same, np.nan, scores)[:, 1:])

    def _worth(self, decision: Decision) -> Verdict:
        """Return a verdict without its score and p."""
        found = self.calibration
        rates = found.rates(decision)
        return Verdict(
            decision=decision,
            score=0.0,
            p=1.0,
            false_alarm=rates.false_alarm,
            false_alarm_interval=rates.false_alarm_interval,
            detection=rates.detection,
            detection_interval=rates.detection_interval,
            detection_of=found.positives_of,
            n=found.n,
            note=self._note(decision),
        )

    def _note(self, decision: Decision) -> str:
        found = self.calibration
        if decision == "match":
            level = found.levels["match"]
            return f"{found.n} pictures support no bar below {level:.1%}." if level > MATCH else ""
        said = []
        if (denied := found.denied) is not None:
            said.append(
                f"{denied:.0%} of {found.positives_of} whose origin is here would be told 'no origin here'."
            )
        if self.projection.method != "analytic":
            said.append(
                "Strangers that were darkened, blurred or flattened may pass the lower bar more often."
            )
        return " ".join(said)

    def curves(self) -> list[Curve]:
        """Return the distributions of scores without and with an origin here, and the two bars."""
        found = self.calibration
        scores = {f"no origin here: {kind}": v for kind, v in found.negatives.items()}
        if len(found.positives):
            scores[f"origin here: {found.positives_of}"] = found.positives
        edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), _BINS)
        shares = {label: np.histogram(v, edges)[0] / len(v) for label, v in scores.items()}
        middle, top = ((edges[1:] + edges[:-1]) / 2).tolist(), float(max(map(np.max, shares.values())))

        def line(label: str, x: list[float], y: list[float], role: Role) -> Curve:
            return Curve(PLOT, label, x, y, "score", "share of pictures", role=role)

        curves = [
            line(label, middle, share.tolist(), "control" if label.startswith("no") else "method")
            for label, share in shares.items()
        ]
        bars = {"doubtful": found.bar("doubtful"), "match": found.bar("match")}
        return [*curves, *(line(f"{name} from here", [x, x], [0.0, top], "note") for name, x in bars.items())]


def judge_for(
    collection: Collection,
    W: Projection,
    *,
    blocks: Blocks | None = None,
    on_start: OnStart | None = None,
    on_rows: OnRows | None = None,
) -> tuple[Judge | None, str]:
    """Return what judges the matches of W, calibrated now or before; or None, and why there is none.

    It is kept beside the collection's maps, and made anew when W, the latents, or what counts as one photo
    have changed. A store that cannot be written to is calibrated each time.

    Parameters
    ----------
    collection : Collection
    W : Projection
        The map that ranks.
    blocks : callable, optional
        Gives the gallery as (rows, rows projected by W), from an index; by default it is projected.
    on_start, on_rows : callable, optional
        Called with the rows of all passes, twice, and with (rows, 0) as they are done; not called where the
        calibration was kept.
    """
    path = _path(collection, W)
    kept = _load(path, W)
    if kept is not None:
        return Judge(collection, *kept), ""
    photos = Photos.of(collection, is_refitted(W))
    if len(photos.rows) < LEAST:
        where = "" if is_refitted(W) else " outside of the training split"
        return None, (
            "No verdict: it is calibrated on photos that the map was not fitted on, and the collection has "
            f"{len(photos.rows)} of them{where} ({LEAST} needed)."
        )
    if on_start is not None:
        total = len(collection.gallery) * passes(W)
        on_start(total, total)
    count = on_rows or (lambda rows, bad: None)
    try:
        V, calibration = calibrate(collection, W, photos, blocks=blocks, count=count)
    except (SolverUsageError, UsageError) as exc:
        return None, f"No verdict: {exc}"
    _keep(path, collection.data_hash, calibration, V if is_refitted(W) else None)
    return Judge(collection, V, calibration), ""


# --- the kept calibration ------------------------------------------------------------------------


def _path(collection: Collection, W: Projection) -> Path:
    folder = collection.store.root / "projections"
    if collection.store.array != LATENTS:
        folder /= collection.store.array
    near = collection.near[0]
    said = f"{_VERSION} {W.fingerprint} {W.method} {near and near.settings.get('parquet crc32')}"
    key = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
    return folder / f"verdict-{key}-{collection.data_hash}.safetensors"


def _map_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}-map.safetensors")


def _load(path: Path, W: Projection) -> tuple[Projection, Calibration] | None:
    try:
        calibration = Calibration.load(path)
        V = Projection.load(_map_path(path)) if is_refitted(W) else verdict_map(W)
    except (OSError, ProjectionFormatError):
        return None  # not there, or damaged: it is ours to make again
    return (V, calibration) if calibration.facts.get("map") == V.fingerprint else None


def _keep(path: Path, data_hash: str, calibration: Calibration, V: Projection | None) -> None:
    """Keep a calibration, with its map where that was fitted for it. Nobody asked for it: it may fail."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("verdict-*.safetensors"):
            if data_hash not in old.name:
                forget(old)
        if V is not None:
            V.save(_map_path(path))
        calibration.save(path)
