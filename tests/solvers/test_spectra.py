"""cos φ and its control: what any two matrices share, what two W share, and the angles between them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from scipy.stats import ks_2samp
from solver_worlds import orthonormal

from solvers.errors import SolverUsageError
from solvers.spectra import (
    chance_overlap,
    cos_phi,
    draws_for,
    gaussian_sigmas,
    map_spectrum,
    overlap,
    principal_angles,
    random_band,
    singular_values,
    untrained_band,
)

D, M = 256, 32
EPS64, EPS32 = (float(np.finfo(t).eps) for t in (np.float64, np.float32))


def shaped(rng, spectrum, d=D):
    """A (d, m) map with random singular vectors and the given singular values."""
    m = len(spectrum)
    return orthonormal(rng, d, m) * np.asarray(spectrum) @ orthonormal(rng, m, m).T


def test_orthonormal_maps_agree_by_construction_and_are_called_so():
    rng = np.random.default_rng(0)
    for dtype in (np.float64, np.float32):
        a, b = (map_spectrum(orthonormal(rng, D, M).astype(dtype)) for _ in range(2))
        assert a.flat
        assert b.flat
        # The cosine is second order in the spread of the values, which storage leaves below eps32 * sqrt(m).
        assert cos_phi(a.sigma, b.sigma) == pytest.approx(1.0, abs=M * EPS32**2 + 8 * EPS64)
    # A scale does not matter; a spread, however slight, does.
    assert map_spectrum(7 * orthonormal(rng, D, M)).flat
    assert not map_spectrum(shaped(rng, np.linspace(1.001, 1, M))).flat
    assert not map_spectrum(rng.standard_normal((D, M))).flat


def test_spectrum_ignores_rotations_and_the_order_of_columns_but_not_their_scale():
    rng = np.random.default_rng(1)
    W = rng.standard_normal((D, M))
    own = map_spectrum(W)
    for same in (W @ orthonormal(rng, M, M), orthonormal(rng, D, D) @ W, W[:, rng.permutation(M)], 3 * W):
        other = map_spectrum(same)
        assert cos_phi(own.sigma, other.sigma) == pytest.approx(1.0, abs=D * EPS64)
    scaled = map_spectrum(W * np.geomspace(1, 30, M))
    assert cos_phi(own.sigma, scaled.sigma) < 0.95
    assert overlap(principal_angles(own, scaled)) == pytest.approx(1.0, abs=D * EPS64)


def test_random_spectra_are_those_of_gaussian_matrices():
    """The bidiagonal draws against singular values of matrices: largest, middle, smallest."""
    rng = np.random.default_rng(2)
    for shape in ((24, 6), (6, 24), (8, 8), (5, 1)):
        made = np.array([np.linalg.svd(rng.standard_normal(shape), compute_uv=False) for _ in range(1500)])
        drawn = gaussian_sigmas(shape, 1500, seed=3)
        assert drawn.shape == made.shape
        assert (np.diff(drawn, axis=1) <= 0).all()
        for k in {0, made.shape[1] // 2, made.shape[1] - 1}:
            assert ks_2samp(made[:, k], drawn[:, k]).pvalue > 1e-4
    wrong = gaussian_sigmas((25, 7), 1500, seed=3)[:, 0]
    assert ks_2samp(gaussian_sigmas((24, 6), 1500, seed=4)[:, 0], wrong).pvalue < 1e-4


def test_two_random_matrices_agree_almost_perfectly_which_is_the_point_of_the_band():
    band = random_band((D, M), (D, M))
    assert 0.99 < band.low < band.mean < band.high < 1
    rng = np.random.default_rng(5)
    values = [
        cos_phi(*(np.linalg.svd(rng.standard_normal((D, M)), compute_uv=False) for _ in range(2)))
        for _ in range(200)
    ]
    inside = sum(band.place(v) == "inside" for v in values)
    # 190 of 200 expected, standard deviation 3.1, and the band's own edges are estimates: four of each.
    assert 172 <= inside <= 200
    # The larger the matrices, the less cos φ can tell.
    assert random_band((2 * D, 2 * M), (2 * D, 2 * M)).low > band.low
    # The same seed, the same band; it is no comparison of a matrix with itself.
    assert random_band((D, M), (D, M)) == band


def test_spectra_that_differ_lie_outside_the_band():
    rng = np.random.default_rng(6)
    flat, steep = map_spectrum(orthonormal(rng, D, M)), map_spectrum(shaped(rng, np.geomspace(1, 0.02, M)))
    random = map_spectrum(rng.standard_normal((D, M)))
    band = random_band((D, M), (D, M))
    assert band.place(cos_phi(flat.sigma, steep.sigma)) == "below"
    assert band.place(cos_phi(random.sigma, steep.sigma)) == "below"
    assert band.place(cos_phi(steep.sigma, steep.sigma)) == "above"
    assert untrained_band(random).high > 0.999 > 0.9 > untrained_band(steep).high


def test_different_ranks_are_cut_to_the_shorter():
    assert cos_phi(np.array([3.0, 1.0, 0.5]), np.array([6.0, 2.0])) == pytest.approx(1.0, abs=4 * EPS64)
    assert cos_phi(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(np.sqrt(0.5), abs=4 * EPS64)
    band = random_band((D, M), (D, M // 2))
    assert 0.99 < band.low < band.high < 1


def test_principal_angles_are_the_planted_ones():
    rng = np.random.default_rng(7)
    planted = np.array([1e-6, 0.2, 0.9, np.pi / 2])
    Q = orthonormal(rng, D, 8)
    turned = Q[:, :4] * np.cos(planted) + Q[:, 4:] * np.sin(planted)
    # Bases of the same spaces: columns mixed and scaled.
    A, B = Q[:, :4] @ rng.standard_normal((4, 4)), turned @ rng.standard_normal((4, 4))
    a, b = map_spectrum(A), map_spectrum(B)
    angles = principal_angles(a, b)
    # Near 0 by the cosine, and near 90 degrees by the sine, an angle is known to sqrt(2 eps64).
    assert np.abs(angles - planted).max() < 2 * np.sqrt(2 * EPS64)
    assert np.abs(angles - np.sort(subspace_angles(A, B))).max() < 2 * np.sqrt(2 * EPS64)
    assert overlap(angles) == pytest.approx(np.linalg.norm(Q[:, :4].T @ turned) ** 2 / 4, abs=1e-9)


def test_overlap_of_random_subspaces_is_its_chance_level():
    rng = np.random.default_rng(8)
    found = []
    for _ in range(60):
        a, b = (map_spectrum(rng.standard_normal((64, m))) for m in (8, 16))
        found.append(overlap(principal_angles(a, b)))
    assert chance_overlap(a, b) == 16 / 64
    assert abs(np.mean(found) - 0.25) < 4 * np.std(found) / np.sqrt(len(found))
    nested = map_spectrum(rng.standard_normal((64, 16)))
    inside = map_spectrum(nested.basis[:, :8])
    assert overlap(principal_angles(nested, inside)) == pytest.approx(1.0, abs=64 * EPS64)


def test_singular_values_alone_are_those_of_the_whole_spectrum():
    W = shaped(np.random.default_rng(10), np.geomspace(1, 1e-3, M))
    np.testing.assert_allclose(singular_values(W), map_spectrum(W).sigma, atol=D * EPS64)
    with pytest.raises(SolverUsageError, match="is zero"):
        singular_values(np.zeros((4, 2)))


def test_rounding_adds_no_directions():
    rng = np.random.default_rng(9)
    low = (rng.standard_normal((D, 5)) @ rng.standard_normal((5, M))).astype(np.float32)
    s = map_spectrum(low)
    assert s.rank == 5
    assert len(s.sigma) == M


def test_what_cannot_be_compared_is_refused_with_the_values():
    with pytest.raises(SolverUsageError, match=r"\(4, 2\) is zero"):
        map_spectrum(np.zeros((4, 2)))
    a, b = (map_spectrum(np.eye(d)[:, :2]) for d in (4, 5))
    with pytest.raises(SolverUsageError, match="4 and 5"):
        principal_angles(a, b)


def test_large_maps_get_fewer_draws():
    assert draws_for((256, 32)) >= 100
    assert draws_for((4096, 4096), (4096, 8)) < draws_for((4096, 512)) < draws_for((4096, 64))
