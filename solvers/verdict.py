"""Is the origin here at all: a score that can be compared between queries, calibrated without a model.

A score becomes a decision by conformal prediction (Vovk, Gammerman & Shafer, "Algorithmic Learning in a
Random World", 2005): among n pictures that are known to have no origin here, a new one of their kind scores
as high as the k-th best with a chance of k / (n + 1), whatever the distribution of scores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from scipy.special import betaincinv

from .errors import ProjectionFormatError, SolverUsageError
from .files import read_safetensors, write_safetensors
from .projection import Projection

Decision = Literal["match", "doubtful", "no origin here"]
MATCH, MATCH_AT_MOST, DOUBTFUL = 0.01, 0.05, 0.10
"""Largest p of a match; the same where too few pictures support that; largest p that is not denied."""
LEAST = 20
"""Pictures of a kind that support a match at all: 1 / (20 + 1) is below 5 %."""
_FORMAT = "solvers.verdict"
_BLOCK = 1024
_ROUNDING = 1e-9
PASSED, COMPARED, ENOUGH = 2, 20, 5
"""Runners-up that are passed over, that come next and are compared with, and the fewest that can be."""
CANDIDATES = 100
"""References that a query needs, best first: those, and some for rows that show the first one's photo."""
ALIKE, SAME = 0.95, 0.98
"""Cosines under the reference map of two references that may show one photo, and of two that do.

Of 256-pixel photos, re-saves (JPEG down to quality 10) have 0.99 and above; of a stranger's best references
some 0.2 % have 0.95 with the first, and different ones of 1,700 photos at most 0.982. Crops pass unnoticed.
"""
LEAD = 27.0
"""Taken where no lead can be measured: a copy's, as all the best references look like the first."""
_FLAT = 1e-12
"""Of the largest score: a spread that is rounding."""
_TAIL = 0.025
"""Either side of a 95 % interval."""


def verdict_map(W: Projection) -> Projection:
    """Return the map whose score can be compared between queries.

    Where W treats both sides alike that is its own cosine. Elsewhere both norms are taken under the
    reference map (a^2 / s for the analytic map): a query's own norm under V s^-1/2 grows without bound
    outside of the directions that were fitted, which changes no ranking and every threshold.
    """
    if W.symmetric:
        return W if W.score == "cosine" else replace(W, score="cosine")
    return replace(W, score="cosine", norm_map=W.reference_map)


def pair_scores(projection: Projection, queries: Any, references: Any) -> np.ndarray:
    """Score query i against reference i, (n,), in float64: the same in any company."""
    out = [np.zeros(0)]
    for at in range(0, len(queries), _BLOCK):
        q, r = (np.asarray(rows[at : at + _BLOCK], np.float64) for rows in (queries, references))
        out.append((projection.queries(q) * projection.references(r)).sum(axis=1))
    return np.concatenate(out)


def standing(first: Any, others: Any) -> np.ndarray:
    """Return how far each query's first reference stands out, (n,): score times the cube root of its lead.

    The lead is how many standard deviations it scores above the query's own next references, as scores of
    speakers are normalised by a cohort (Sturim & Reynolds, ICASSP 2005): it tells a translation, which
    agrees weakly with its origin and hardly at all with others. The score tells a copy from a picture that
    merely has near-duplicates here. On photos, powers of the score from 2 to 6 beside the lead did alike.
    The two next are passed over, so that one or two near-duplicates of the origin, known to nobody, do not
    take its lead. Where nothing is left to compare with, a fixed lead is taken: the score decides.

    Parameters
    ----------
    first : (n,) array
        Scores by a verdict map of the reference that ranked first; NaN stands out by 0.
    others : (n, k) array
        Those of the query's other best references, in any order; NaN where one does not count, as one
        that is `alike` the first. Fewer than 5 beyond the two, or equal ones, measure no lead.
    """
    s = np.nan_to_num(np.asarray(first, np.float64))
    rest = -np.sort(-np.asarray(others, np.float64), axis=1)[:, PASSED : PASSED + COMPARED]  # NaN last
    counted = ~np.isnan(rest)
    n = np.maximum(counted.sum(axis=1), 1)
    rest = np.where(counted, rest, 0.0)
    mean = rest.sum(axis=1) / n
    spread = np.sqrt((np.where(counted, rest - mean[:, None], 0.0) ** 2).sum(axis=1) / n)
    told = (n >= ENOUGH) & (spread > _FLAT * np.abs(rest).max(axis=1, initial=0.0))
    lead = np.where(told, (s - mean) / np.where(told, spread, 1.0), LEAD)
    return np.maximum(s, 0.0) * np.cbrt(np.maximum(lead, 0.0))


def alike(first: np.ndarray, others: np.ndarray, least: float = ALIKE) -> np.ndarray:
    """Return which of some references (k, m) show what the first one (m,) shows; of unit length, by one map.

    They are no company to compare it with: among its own re-saves nothing stands out.
    """
    return np.asarray(others @ first >= least)


@dataclass(frozen=True)
class Rates:
    """What a bar lets pass: each a share of pictures with its 95 % interval.

    Attributes
    ----------
    false_alarm
        Of pictures without an origin here; of the kind that passes most often.
    false_alarm_interval
        Of the share among all such pictures, given these that were calibrated on.
    detection
        Of pictures with an origin here: ranked first, and passed. None where there are none.
    """

    false_alarm: float
    false_alarm_interval: tuple[float, float]
    detection: float | None
    detection_interval: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of pictures without and with an origin here.

    The p of a score is the largest over the kinds, so that it holds for a picture of any of them.

    Attributes
    ----------
    negatives
        Kind of picture -> (n,) standings of the best reference, the pictures' own being absent. One a
        photo: only then are they as independent as n pictures.
    positives
        (k,) standings of the reference that ranked first, with the pictures' own present.
    found
        (k,) whether that reference was the right one.
    positives_of
        What kind of pictures the positives are.
    facts
        JSON-able record of how it was made.

    Raises
    ------
    SolverUsageError
        No kind, a kind of fewer than 20 pictures, or a score that is no number.
    """

    negatives: Mapping[str, np.ndarray]
    positives: np.ndarray = field(default_factory=lambda: np.zeros(0))
    found: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    positives_of: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ordered = {kind: np.sort(np.asarray(s, np.float64)) for kind, s in self.negatives.items()}
        fewest = min((len(s) for s in ordered.values()), default=0)
        if fewest < LEAST:
            raise SolverUsageError(
                f"A verdict is calibrated on {fewest} pictures; at least {LEAST} of each kind are needed. "
                "Use a larger collection."
            )
        positives, found = np.asarray(self.positives, np.float64), np.asarray(self.found, bool)
        if positives.shape != found.shape:
            raise SolverUsageError(
                f"There are {len(positives)} positive scores and {len(found)} marks of which were found."
            )
        if not all(np.isfinite(s).all() for s in (positives, *ordered.values())):
            raise SolverUsageError("A verdict cannot be calibrated on scores that are not finite.")
        object.__setattr__(self, "negatives", ordered)
        object.__setattr__(self, "positives", positives)
        object.__setattr__(self, "found", found)

    @property
    def n(self) -> int:
        """Pictures of the smallest kind."""
        return min(map(len, self.negatives.values()))

    @cached_property
    def levels(self) -> dict[str, float]:
        """Decision -> the largest p that is called so."""
        return {"match": min(max(MATCH, 1.0 / (self.n + 1)), MATCH_AT_MOST), "doubtful": DOUBTFUL}

    def p(self, scores: Any) -> np.ndarray:
        """Return the share of pictures without an origin here that score as high; 1 for what is no number."""
        s = np.asarray(scores, np.float64)
        each = [
            (1 + len(v) - np.searchsorted(v, s, side="left")) / (len(v) + 1) for v in self.negatives.values()
        ]
        return np.where(np.isnan(s), 1.0, np.max(each, axis=0))

    def decide(self, score: float) -> Decision:
        """Return what a score is called."""
        if self._passes(score, "match"):
            return "match"
        return "doubtful" if self._passes(score, "doubtful") else "no origin here"

    def bar(self, decision: Decision) -> float:
        """Return the score above which pictures are called so; for "no origin here" the one they missed."""
        level = self.levels.get(decision, DOUBTFUL)
        return max(
            float(v[len(v) - int(level * (len(v) + 1) * (1 + _ROUNDING))]) for v in self.negatives.values()
        )

    def rates(self, decision: Decision) -> Rates:
        """Return what the bar of a decision lets pass; for "no origin here" that of the bar it missed.

        With j - 1 of n negatives above the bar, the j-th decides it: the share of all pictures without an
        origin above is Beta(j, n + 1 - j), by order statistics, with mean j / (n + 1). Detection has
        Clopper and Pearson's interval (Biometrika 26, 1934).
        """
        counts = [(1 + int(self._passes(v, decision).sum()), len(v)) for v in self.negatives.values()]
        j, n = max(counts, key=lambda c: c[0] / (c[1] + 1))
        alarm = j / (n + 1)
        between = (float(betaincinv(j, n + 1 - j, _TAIL)), float(betaincinv(j, n + 1 - j, 1 - _TAIL)))
        if not len(self.positives):
            return Rates(alarm, between, None, None)
        hits = int((self.found & self._passes(self.positives, decision)).sum())
        return Rates(alarm, between, hits / len(self.found), exact_interval(hits, len(self.found)))

    @property
    def denied(self) -> float | None:
        """Share of the positives that are told "no origin here"."""
        if not len(self.positives):
            return None
        return float((~self._passes(self.positives, "doubtful")).mean())

    def _passes(self, scores: Any, decision: Decision) -> Any:
        return self.p(scores) <= self.levels.get(decision, DOUBTFUL) * (1 + _ROUNDING)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with JSON metadata, atomically.

        Raises
        ------
        SolverWriteError
        """
        tensors = {f"negatives.{i}": v for i, v in enumerate(self.negatives.values())}
        tensors |= {"positives": self.positives, "found": self.found.astype(np.uint8)}
        info = {
            "kinds": list(self.negatives),
            "positives_of": self.positives_of,
            "facts": dict(self.facts),
        }
        write_safetensors(path, tensors, {"format": _FORMAT, "version": "1", "info": json.dumps(info)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a calibration written by `save`.

        Raises
        ------
        ProjectionFormatError
        """
        tensors, metadata = read_safetensors(path, _FORMAT)
        try:
            info = json.loads(metadata["info"])
            negatives = {kind: tensors[f"negatives.{i}"] for i, kind in enumerate(info["kinds"])}
            found = tensors["found"].astype(bool)
            return cls(negatives, tensors["positives"], found, info["positives_of"], info["facts"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProjectionFormatError(
                f"{path} lacks a part of a calibration ({error}). Delete it; it is made anew."
            ) from error


def exact_interval(hits: int, n: int) -> tuple[float, float]:
    """Return Clopper and Pearson's 95 % interval of a share of which `hits` of n were seen."""
    low = float(betaincinv(hits, n - hits + 1, _TAIL)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - _TAIL)) if hits < n else 1.0
    return low, high
