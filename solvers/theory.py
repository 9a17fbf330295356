"""Theorems 1 and 2 in numbers, on pairs at hand and on planted ones, and the slips of their print.

Rows are samples: T (n x d) has the row E(g) - E(o) of each pair, and W is (d x m). Theorem 1 says that some W
has T W = 0; Theorem 2, that a W fitted on one model's pairs has it for another model's. Neither is a claim
about one number alone: any W makes T W small if it is small itself, so everything is relative to what the
origins vary through the same W, and stands beside subspaces that know nothing of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from .data import PairData
from .errors import SolverUsageError
from .gallery_maps import random_orthonormal
from .methods import build

LOWEST_COS_PHI = 0.991808
"""The lowest cos φ in the paper's Table 1 (Kolors)."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Origins and translations, row by row.

    Attributes
    ----------
    origins, translations
        (n, d) arrays of one dtype; the dtype says what rounding the rows carry.
    identities
        (n,) labels of the origins.
    """

    origins: np.ndarray
    translations: np.ndarray
    identities: np.ndarray

    def __len__(self) -> int:
        return len(self.origins)


@dataclass(frozen=True, eq=False)
class World:
    """Pairs of two models over one collection, each split into fitted and held-out identities.

    Attributes
    ----------
    fitted, held_out
        Pairs of the first model; W is fitted on the former.
    other_fitted, other_held_out
        Pairs of the second model, of Theorem 2.
    mean
        (d,) mean of the collection.
    """

    fitted: Pairs
    held_out: Pairs
    other_fitted: Pairs
    other_held_out: Pairs
    mean: np.ndarray

    @property
    def dim(self) -> int:
        """Length of a latent."""
        return len(self.mean)


@dataclass(frozen=True, eq=False)
class NamedMap:
    """A (d, m) map, or None for W = I, with the pairs that it was fitted on (a control's: the first model's).

    ``knows`` tells a map that was fitted on right pairs from a control.
    """

    name: str
    W: np.ndarray | None
    own: Pairs
    knows: bool


@dataclass(frozen=True)
class LastStep:
    """How far the last step of Theorem 2's proof holds for two maps.

    Attributes
    ----------
    left_inverse
        ``||K W2 - I||_F`` of K, the pseudo-inverse: 0 says that W2 has a left inverse.
    missed
        ``||U3 W2 - W2 M|| / ||U3 W2||`` of the best M: the step claims 0.
    chance
        What independent random subspaces of these sizes give: ``sqrt(1 - m / d)``.
    spectra
        ``||S1 - a S2|| / ||S1||`` of the best a, which the proof takes as 0: the sine of Observation 1's φ.
    """

    left_inverse: float
    missed: float
    chance: float
    spectra: float


@dataclass(frozen=True)
class Slip:
    """A statement of the paper with the number that it implies and the number that is found."""

    where: str
    what: str
    printed: float
    found: float
    sentence: str


def residual(W: np.ndarray | None, pairs: Pairs, mean: np.ndarray) -> float:
    """Return ||T W||_F / ||(O - mean) W||_F in float64, with t = g - o formed first.

    0 says that translation is invisible through W, 1 that it moves latents as much as they vary. W is
    (d, m), or None for the identity. NaN where there are no pairs, or nothing varies through W.
    """
    above = below = 0.0
    for at in range(0, len(pairs), 1024):
        o = pairs.origins[at : at + 1024].astype(np.float64)
        t = pairs.translations[at : at + 1024].astype(np.float64) - o
        for x, is_difference in ((t, True), (o - mean, False)):
            seen = x if W is None else x @ W
            energy = float(np.einsum("ij,ij->", seen, seen))
            above, below = above + energy * is_difference, below + energy * (not is_difference)
    return math.sqrt(above / below) if below else math.nan


def mismatched(pairs: Pairs, seed: int) -> Pairs | None:
    """Pair every origin with a translation of another identity, or return None where that cannot be."""
    codes = np.unique(pairs.identities, return_inverse=True)[1]
    counts = np.bincount(codes)
    shift = int(counts.max(initial=0))
    if not len(pairs) or 2 * shift > len(pairs):
        return None
    # Identities in random order, each in one run: a shift by the longest run leaves none with itself.
    place = np.random.default_rng(seed).permutation(len(counts))
    order = np.argsort(place[codes], kind="stable")
    partner = np.empty_like(order)
    partner[order] = np.roll(order, shift)
    return replace(pairs, translations=pairs.translations[partner])


def maps(world: World, rank: int, seed: int = 0) -> Iterator[NamedMap]:
    """Fit W by Lemma 2 and by the generalised form, and yield them beside what they must beat.

    These are ``svd`` and ``gnull``; ``svd, fitted on the second model`` (where it has pairs); ``svd, fitted
    on wrong pairs`` (where there are two identities); ``random subspace``, ``untrained W`` (Gaussian entries)
    and ``all directions (m = d)``.

    Raises
    ------
    NoPairsError, SolverUsageError
        No pairs, a rank out of range, or translations that equal their origins.
    """
    d, first = world.dim, world.fitted
    yield NamedMap("svd", _fit("svd", first, rank), first, True)
    yield NamedMap("gnull", _fit("gnull", first, rank), first, True)
    if len(world.other_fitted):
        other = world.other_fitted
        yield NamedMap("svd, fitted on the second model", _fit("svd", other, rank), other, True)
    wrong = mismatched(first, seed)
    if wrong is not None:
        yield NamedMap("svd, fitted on wrong pairs", _fit("svd", wrong, rank), wrong, False)
    yield NamedMap("random subspace", random_orthonormal(d, rank, seed), first, False)
    yield NamedMap("untrained W", np.random.default_rng([seed, 1]).standard_normal((d, rank)), first, False)
    yield NamedMap("all directions (m = d)", None, first, False)


def _fit(method: str, pairs: Pairs, rank: int) -> np.ndarray:
    own = np.unique(pairs.identities, return_index=True)[1]
    data = PairData.from_arrays(pairs.origins, pairs.translations, origins=pairs.origins[own])
    return np.asarray(build(method, rank=rank).fit(data).query_map)


def last_step(W1: np.ndarray, W2: np.ndarray) -> LastStep:
    """Check the last step of Theorem 2's proof: U3 W2 = W2 M for some M, because W2 has a left inverse.

    With W_i = U_i S_i V_i^T and U3 = U1 U2^T, U3 W2 = U1 S2 V2^T: its columns span those of W1. An M exists
    if and only if W1's columns lie in the span of W2's, which (with T2 W2 = 0) is the claim itself. A left
    inverse K gives M = K U3 W2 only where W2 K = I as well, for m = d.

    Parameters
    ----------
    W1, W2
        (d, m) of full column rank; where one has more columns, its first ones are taken.

    Raises
    ------
    SolverUsageError
        Maps of latents of different lengths, or not of full column rank.
    """
    if W1.shape[0] != W2.shape[0]:
        raise SolverUsageError(
            f"Theorem 2 is about two maps of one space; got maps of {W1.shape[0]} and {W2.shape[0]} values. "
            "Fit both on latents of one encoder."
        )
    m = min(W1.shape[1], W2.shape[1])
    U1, s1, _ = scipy.linalg.svd(W1[:, :m], full_matrices=False)
    U2, s2, V2t = scipy.linalg.svd(W2[:, :m], full_matrices=False)
    for s in (s1, s2):
        if not s[-1] > len(U1) * np.finfo(np.float64).eps * s[0]:
            raise SolverUsageError(
                f"A map of {m} columns has numerical rank below {m} (singular values from {s[0]:.3g} to "
                f"{s[-1]:.3g}); the step assumes full column rank. Choose a smaller rank."
            )
    turned = (U1 * s2) @ V2t
    missed = turned - U2 @ (U2.T @ turned)
    K = (V2t.T / s2) @ U2.T
    a = float(s1 @ s2 / (s2 @ s2))
    return LastStep(
        left_inverse=float(np.linalg.norm(K @ W2[:, :m] - np.eye(m))),
        missed=float(np.linalg.norm(missed) / np.linalg.norm(turned)),
        chance=math.sqrt(1.0 - m / len(U1)),
        spectra=float(np.linalg.norm(s1 - a * s2) / np.linalg.norm(s1)),
    )


def planted(*, dim: int = 64, moved: int = 16, n: int = 300, shared: bool = True, seed: int = 0) -> World:
    """Draw a world in which each model moves latents within a known random subspace, and nowhere else.

    Origins are Gaussian, away from zero; float64, so that a null space is exact up to arithmetic.

    Parameters
    ----------
    dim, n
        d, and the fitted pairs of each model; half as many are held out.
    moved
        Dimensions of the subspace: the null space of T has dim - moved. ``moved = dim`` plants none.
    shared
        Whether both models move within the same subspace, which Theorem 2 needs.
    """
    rng = np.random.default_rng(seed)
    bases = [np.linalg.qr(rng.standard_normal((dim, dim)))[0][:, :moved] for _ in range(2)]
    if shared:
        bases[1] = bases[0]
    held = n // 2
    origins = 3.0 + rng.standard_normal((n + held, dim))
    identities = np.arange(n + held)

    def halves(basis: np.ndarray) -> tuple[Pairs, Pairs]:
        translations = origins + rng.standard_normal((n + held, moved)) @ basis.T
        kept = (slice(0, n), slice(n, None))
        fitted, held_out = (Pairs(origins[k], translations[k], identities[k]) for k in kept)
        return fitted, held_out

    first, second = (halves(basis) for basis in bases)
    return World(*first, *second, mean=origins.mean(axis=0))


def slips(seed: int = 0) -> list[Slip]:
    """Return what the paper's proofs get wrong, each with a small matrix that shows it."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((20, 12)) @ rng.standard_normal((12, 50))
    nulls = scipy.linalg.null_space(A).shape[1]
    wide = rng.standard_normal((20, 50))
    inverse_gap = float(np.linalg.norm(np.linalg.pinv(wide) @ wide - np.eye(50)))
    T = rng.standard_normal((32, 8)) @ rng.standard_normal((8, 32))
    X = scipy.linalg.null_space(T.T)
    e = np.eye(4)
    step = last_step(e[:, :2], e[:, 2:])
    square = last_step(np.linalg.qr(rng.standard_normal((4, 4)))[0], e)
    apart = math.sqrt(1.0 - LOWEST_COS_PHI**2)
    return [
        Slip(
            "Theorem 1",
            "‖T X‖/‖T‖, X from T with pairs as columns",
            0.0,
            float(np.linalg.norm(T @ X) / np.linalg.norm(T)),
            "The proof builds T with pairs as columns, yet multiplies T X, which needs pairs as rows. Even "
            "where both shapes fit (32 pairs of 32 values) the null space of the other reading leaves T X "
            "far from 0. Rows are meant, and used here.",
        ),
        Slip(
            "Lemma 2",
            "dimensions of the null space, 20 × 50 of rank 12",
            float(min(A.shape) - 12),
            float(nulls),
            "The proof counts min(m, n) − r dimensions; the null space of an m × n matrix has n − r. With "
            "fewer pairs than values the print promises too few, and the difference is there for any pairs.",
        ),
        Slip(
            "Lemma 3",
            "right singular vectors with σ = 0, 20 × 50 of rank 12",
            0.0,
            float(nulls),
            "Eq. 19 divides by σᵢ for every i. Where there is a null space, the only case that matters here, "
            "that is a division by 0; the missing left vectors are any orthonormal completion.",
        ),
        Slip(
            "Lemma 4",
            "smallest ‖K A − I‖, A 20 × 50 of full rank",
            0.0,
            inverse_gap,
            "Full rank is not enough for a left inverse; full column rank is needed. A wide matrix has none: "
            "K A has rank 20 and misses I by √30 at least.",
        ),
        Slip(
            "Theorem 2, Eq. 5",
            f"‖Σ₁ − α Σ₂‖/‖Σ₁‖ at cos φ = {LOWEST_COS_PHI}",
            0.0,
            apart,
            "From cos φ → 1 the proof takes Σ₁ = α Σ₂. At Table 1's lowest cos φ the best α leaves sin φ.",
        ),
        Slip(
            "Theorem 2, Eq. 7",
            "‖U₃W₂ − W₂M‖/‖U₃W₂‖, W₁ = (e₁ e₂), W₂ = (e₃ e₄)",
            0.0,
            step.missed,
            "A left inverse K of W₂ is said to give M with U₃W₂ = W₂M. Here K exists, the spectra are equal, "
            "T₁ in the span of e₃, e₄ and T₂ in that of e₁, e₂ fulfil T₁W₁ = 0 and T₂W₂ = 0, and yet "
            "T₂W₁ keeps all of T₂: no M comes near. M exists only where W₁ lies in the span of W₂, which "
            "is what was to be shown.",
        ),
        Slip(
            "Theorem 2, Eq. 7, m = d",
            "smallest ‖T W₂‖/‖T‖, W₂ orthogonal 4 × 4",
            0.0,
            float(scipy.linalg.svdvals(e)[-1]),
            f"With m = d the step does hold (it misses by {square.missed:.0e}), but then T₂W₂ = 0 only for "
            "T₂ = 0: the premise leaves no translation to speak of.",
        ),
    ]
