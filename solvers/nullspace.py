"""The null space of translation differences, literally (Lemma 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from .arrays import as_float64, as_like, namespace, to_host
from .data import PairData, difference_cutoff, differences
from .errors import SolverUsageError
from .fitted import Fitted, make_report
from .gallery_maps import Capabilities, random_orthonormal
from .generalised import difference_report
from .linalg import eigh, fix_signs, orthonormalise, qr, svd, triangle
from .rank import EPS64, Cutoff, check_rank, tile_noise
from .spectrum import dual_gram, dual_vectors, fit_spectrum

ACCUMULATORS = ("auto", "gram", "qr")
NEAR = 5.0
"""Times the Gram's cutoff from which its singular values are good to a fiftieth: errors are of squares."""


@dataclass(frozen=True)
class NullSpace(Capabilities):
    """W from the (near-)null space of T, row i = E(g_i) - E(o_i): T W = 0 (Lemma 2).

    With T = U S V^T, W holds the last m right singular vectors, smallest first. Inside a null space
    larger than m every choice is equally a solution; the m directions of largest origin variance are
    taken, so that every backend gives one W. Orthonormal. Symmetric, without a centre: T is a difference,
    so the lemma says nothing about the mean. The lemma's proof counts rows: T is n x d, so its null space
    has d - rank(T) dimensions.

    Equivalent for small data: ``scipy.linalg.svd(T)[2][-m:].T``. Price: with fewer pairs than dimensions
    the n x n Gram of T and n x d floats, otherwise the moments' d x d Gram (d = 4,096: 134 MB) and its
    eigen-decomposition. A Gram squares the condition number, which the cutoff knows; the triangle of a tall
    QR does not, at several times the price.

    Parameters
    ----------
    rank
        Number of columns m.
    accumulator
        "gram", "qr", or "auto": the Gram, and again by QR where it was the Gram's own arithmetic, and not
        the rounding of the stored latents, that decided what counts as zero.
    """

    rank: int = 512
    accumulator: str = "auto"
    name: ClassVar[str] = "svd"
    needs_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.accumulator not in ACCUMULATORS:
            raise SolverUsageError(
                f"The accumulator must be one of {', '.join(ACCUMULATORS)}, not {self.accumulator!r}."
            )

    def fit(self, data: PairData) -> Fitted:
        """Fit on pairs, in their arrays' own library; origins break the tie inside a large null space."""
        data.require_pairs(self.name)
        m = check_rank(self.rank, data.dim)
        found, why = self._decompose(data)
        d, r = data.dim, found.numerical_rank
        null_part = _null_directions(data, found, min(m, d - r))
        rows_part = found.row_vectors[:, found.row_vectors.shape[1] - (m - null_part.shape[1]) :]
        xp = namespace(found.row_vectors)
        W = to_host(xp.concat([null_part, fix_signs(xp.flip(rows_part, axis=1))], axis=1))
        report = make_report(
            numerical_rank=r,
            cutoff=found.cutoff.value,
            decided_by=found.cutoff.decided_by,
            sigma_max=float(found.sigma[0]),
            sigma_min=float(found.sigma[-1]),
            n_pairs=data.n_pairs,
            path=("dual" if data.n_pairs < d else "primal") + (" (QR)" if why.startswith("qr") else ""),
            statement=_statement(data.n_pairs, d, r, m),
            requested_rank=m,
            effective_rank=m,
        )
        report["accumulator"] = why
        return Fitted(W, W, None, "cosine", found.sigma, self.name, asdict(self), report=report)

    def _decompose(self, data: PairData) -> tuple[_Decomposition, str]:
        """Return the singular values and vectors of T, and by which accumulator and why."""
        dual = data.n_pairs < data.dim
        by_gram, by_qr = (_dual, _dual_qr) if dual else (_primal, _primal_qr)
        if self.accumulator == "qr":
            return by_qr(data), "qr: asked for"
        found = by_gram(data)
        if self.accumulator == "gram":
            return found, "gram: asked for"
        if "Gram" not in found.cutoff.decided_by:
            return found, f"gram: {found.cutoff.decided_by} sets the floor, not the Gram's arithmetic"
        if not found.sigma[0] > 0:
            return found, "gram: all differences are zero"
        if found.sigma[-1] > NEAR * found.cutoff.value:
            return found, (
                f"gram: the smallest singular value, {found.sigma[-1]:.1e}, lies well above what its "
                f"arithmetic would take for zero ({found.cutoff.value:.1e})"
            )
        return by_qr(data), (
            f"qr: by the Gram everything below {found.cutoff.value:.1e} would count as zero "
            f"({found.cutoff.decided_by})"
        )


@dataclass(frozen=True, eq=False)
class _Decomposition:
    sigma: np.ndarray  # all min(n, d) singular values, descending
    row_vectors: Any  # (d, r) right singular vectors above the cutoff, descending
    null_vectors: Any  # (d, d - r), where the path gives them, else None
    cutoff: Cutoff

    @property
    def numerical_rank(self) -> int:
        return int(self.row_vectors.shape[1])


def _dual(data: PairData) -> _Decomposition:
    T, squares = _stack(data)
    values, left = dual_gram(T)
    sigma = to_host(values)
    cutoff = difference_cutoff(data, float(sigma[0]), squares)
    r = int(np.count_nonzero(sigma > cutoff.value))
    return _Decomposition(sigma, dual_vectors(T, values[:r], left[:, :r]), None, cutoff)


def _dual_qr(data: PairData) -> _Decomposition:
    T, squares = _stack(data)
    basis, lower = qr(T.T)
    left, values, _ = svd(lower)
    sigma = to_host(values)
    cutoff = difference_cutoff(data, float(sigma[0]), squares, gram=False)
    r = int(np.count_nonzero(sigma > cutoff.value))
    return _Decomposition(sigma, basis @ left[:, :r], None, cutoff)


def _primal(data: PairData) -> _Decomposition:
    values, vectors = data.second_t
    sigma = np.sqrt(np.clip(to_host(values) * data.n_pairs, 0.0, None))
    pairs = data.moments.pairs
    noise = 0.0
    if pairs.precision == "float32":
        noise = tile_noise(to_host(namespace(pairs.tt).linalg.diagonal(pairs.tt)))
    cutoff = difference_cutoff(data, float(sigma[0]), pairs.squares, noise=noise)
    r = int(np.count_nonzero(sigma > cutoff.value))
    return _Decomposition(sigma, vectors[:, :r], vectors[:, r:], cutoff)


def _primal_qr(data: PairData) -> _Decomposition:
    """Tall-skinny QR: the triangle of all rows so far and the next block, whose square is never formed."""
    upper, squares = None, 0.0
    for t, energy in differences(data):
        upper = triangle(t if upper is None else namespace(t).concat([upper, t]))
        squares += energy
    _, values, vt = svd(upper)
    sigma, vectors = to_host(values), vt.T
    cutoff = difference_cutoff(data, float(sigma[0]), squares, gram=False)
    r = int(np.count_nonzero(sigma > cutoff.value))
    return _Decomposition(sigma, vectors[:, :r], vectors[:, r:], cutoff)


def _stack(data: PairData) -> tuple[Any, float]:
    """Return T (n, d) and the sum of squares of the latents behind it."""
    found = list(differences(data))
    return namespace(*(t for t, _ in found)).concat([t for t, _ in found]), sum(e for _, e in found)


def _null_directions(data: PairData, found: _Decomposition, count: int) -> Any:
    """Return `count` orthonormal null directions, those of largest origin variance first."""
    rows, basis = found.row_vectors, found.null_vectors
    xp = namespace(rows)
    if count == 0:
        return rows[:, :0]
    if basis is not None:
        inside = eigh(basis.T @ data.moments.origins.cov @ basis, count)[1]
        return fix_signs(basis @ inside)

    def projected() -> Iterator[Any]:
        for block in data.origins():
            x = as_float64(block, data.dim, "origins")
            yield x - (x @ rows) @ rows.T

    # Rounding of what was projected away is no variance: measure it against the whole origins.
    energy = sum(float((as_float64(b, data.dim, "origins") ** 2).sum()) for b in data.origins())
    floor = float(np.sqrt(max(data.n_origins, data.dim) * EPS64 * energy))
    varying = as_like(fit_spectrum(projected(), data.dim, data.n_origins, floor=floor).vectors, rows)
    varying = varying[:, :count]
    if varying.shape[1]:
        varying = fix_signs(orthonormalise(varying - rows @ (rows.T @ varying)))
    missing = count - varying.shape[1]
    if missing == 0:
        return varying
    known = xp.concat([rows, varying], axis=1)
    filling = random_orthonormal(data.dim, missing, 0, against=to_host(known))
    return xp.concat([varying, as_like(filling, rows)], axis=1)


def _statement(n: int, d: int, r: int, m: int) -> str:
    nulls = d - r
    if r == 0:
        return (
            f"All {n} differences are zero: every translation equals its origin, and every direction is "
            "null. Check that translations are paired with origins, not with themselves."
        )
    if n < d:
        return (
            f"T has {n} rows and {d} columns, so an exact null space of at least {d - n} dimensions is "
            "arithmetic, "
            "not learned: judge W by its held-out residual beside a random subspace."
        )
    if nulls == 0:
        return "T is full rank: no exact null space; these are the smallest singular directions."
    if nulls < m:
        return (
            f"T has numerical rank {r} of {d}: its null space has {nulls} of the {m} directions asked for; "
            f"the other {m - nulls} are the smallest singular directions."
        )
    return f"T has numerical rank {r} of {d}: W lies in its null space of {nulls} dimensions."


def difference_facts(data: PairData) -> dict[str, object]:
    """Return numerical rank, cutoff and extreme singular values of T, for methods that do not factor it."""
    names = ("numerical_rank", "cutoff", "decided_by", "sigma_max", "sigma_min", "n_pairs")
    found = difference_report(data, "")
    return {name: found[name] for name in names}
