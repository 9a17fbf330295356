"""Theorems 1 and 2 on planted pairs: they hold where they were planted, and fail beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg

from solvers import theory
from solvers.errors import NoPairsError, SolverUsageError

EPS = float(np.finfo(np.float64).eps)
D, MOVED, RANK = 64, 16, 24
# The null space comes from the Gram of T: its vectors are off by about eps * cond(T)^2 * sqrt(d), and within
# the moved subspace T of Gaussian entries has a condition number below 4.
EXACT = 16 * np.sqrt(D) * EPS


def residuals(world, rank=RANK, seed=0):
    """Map name → residual on (its own fitted pairs, held-out pairs, the second model's held-out pairs)."""
    places = (world.held_out, world.other_held_out)
    return {
        m.name: tuple(theory.residual(m.W, pairs, world.mean) for pairs in (m.own, *places))
        for m in theory.maps(world, rank, seed)
    }


def test_both_theorems_hold_where_the_models_share_a_subspace():
    found = residuals(theory.planted(dim=D, moved=MOVED))
    assert max(found["svd"]) < EXACT
    # What knows nothing of the pairs sees the whole of the translation: 16 of 64 directions, so about 1/2.
    for control in ("random subspace", "untrained W", "all directions (m = d)"):
        assert found[control] == pytest.approx((0.5, 0.5, 0.5), rel=0.15)
    assert found["svd, fitted on wrong pairs"][1] > 0.2
    assert found["svd, fitted on wrong pairs"][0] > 1.0  # unrelated pictures are farther apart than they vary


def test_theorem_2_fails_where_each_model_has_its_own_subspace():
    world = theory.planted(dim=D, moved=MOVED, shared=False)
    found = residuals(world)
    own, unseen, other = found["svd"]
    assert max(own, unseen) < EXACT  # Theorem 1 still holds
    assert other == pytest.approx(found["random subspace"][2], rel=0.2)
    _, first, second = found["svd, fitted on the second model"]
    assert second < EXACT
    assert first > 0.3


def test_fewer_pairs_than_dimensions_have_a_null_space_that_says_nothing():
    found = residuals(theory.planted(dim=D, moved=D, n=30), rank=16)
    for name in ("svd", "svd, fitted on wrong pairs"):
        own, unseen, other = found[name]
        assert own < EXACT
        assert min(unseen, other) > 0.7


def test_a_rank_beyond_the_null_space_is_seen():
    found = residuals(theory.planted(dim=D, moved=MOVED), rank=D - MOVED + 4)
    assert found["svd"][0] > 0.05
    assert residuals(theory.planted(dim=D, moved=MOVED), rank=D - MOVED)["svd"][0] < EXACT


def test_the_residual_is_that_of_its_definition():
    rng = np.random.default_rng(5)
    o, g = (rng.standard_normal((1500, 8)).astype(np.float32) for _ in range(2))  # more than one block
    W, mean = rng.standard_normal((8, 3)), rng.standard_normal(8)
    pairs = theory.Pairs(o, g, np.arange(1500))
    t, centred = g.astype(float) - o, o - mean
    expected = np.linalg.norm(t @ W) / np.linalg.norm(centred @ W)
    assert theory.residual(W, pairs, mean) == pytest.approx(expected, rel=1e-12)
    assert theory.residual(7 * W, pairs, mean) == pytest.approx(expected, rel=1e-12)  # no matter of scale
    assert theory.residual(None, pairs, mean) == pytest.approx(theory.residual(np.eye(8), pairs, mean))
    empty = theory.Pairs(o[:0], g[:0], np.arange(0))
    assert np.isnan(theory.residual(W, empty, mean))
    assert np.isnan(theory.residual(np.zeros((8, 3)), pairs, mean))


@pytest.mark.parametrize("seed", range(5))
def test_wrong_pairs_have_no_right_one_among_them(seed):
    rng = np.random.default_rng(seed)
    identities = rng.permutation(np.repeat(np.arange(9), rng.integers(1, 6, 9)))
    rows = np.arange(len(identities), dtype=float)[:, None]
    wrong = theory.mismatched(theory.Pairs(rows, rows, identities), seed)
    assert wrong is not None
    taken = wrong.translations[:, 0].astype(int)
    assert sorted(taken) == list(range(len(rows)))
    assert not (identities[taken] == identities).any()
    # One identity with more than half of the pairs, or no pairs: there are no wrong ones.
    for labels in (np.array([0, 0, 0, 1]), np.zeros(0)):
        x = np.zeros((len(labels), 1))
        assert theory.mismatched(theory.Pairs(x, x, labels), seed) is None


def full_svd_step(W1, W2):
    """The step with the d x d orthogonal matrices of the print, and the best M by least squares."""
    (U1, _, _), (U2, _, _) = (np.linalg.svd(W) for W in (W1, W2))
    turned = U1 @ U2.T @ W2
    M = np.linalg.lstsq(W2, turned, rcond=None)[0]
    return np.linalg.norm(turned - W2 @ M) / np.linalg.norm(turned)


def test_the_last_step_needs_more_than_a_left_inverse():
    rng = np.random.default_rng(1)
    d, m = 12, 5
    W1, W2 = (rng.standard_normal((d, m)) for _ in range(2))
    step = theory.last_step(W1, W2)
    assert step.left_inverse < 100 * EPS
    assert step.missed == pytest.approx(full_svd_step(W1, W2), rel=1e-10)
    assert step.missed > 0.5
    # The same span, however it is turned: then an M exists.
    inside = theory.last_step(W1, W1 @ rng.standard_normal((m, m)))
    assert inside.missed < 1e4 * EPS  # times the condition of a Gaussian m x m
    # m = d: every W has the same span.
    square = theory.last_step(rng.standard_normal((d, d)), rng.standard_normal((d, d)))
    assert square.missed < 1e3 * EPS
    assert square.chance == 0.0


def test_chance_is_what_random_subspaces_give():
    rng = np.random.default_rng(2)
    orthonormal = [np.linalg.qr(rng.standard_normal((60, 15)))[0] for _ in range(40)]
    missed = [theory.last_step(a, b).missed for a, b in zip(orthonormal[::2], orthonormal[1::2], strict=True)]
    # 20 draws of a mean of 15 squared sines: within 2 %.
    assert np.mean(missed) == pytest.approx(theory.last_step(*orthonormal[:2]).chance, rel=0.02)


def test_the_counterexample_fulfils_every_premise_of_theorem_2():
    W1, W2 = np.eye(4)[:, :2], np.eye(4)[:, 2:]
    rng = np.random.default_rng(3)
    T1, T2 = rng.standard_normal((9, 2)) @ W2.T, rng.standard_normal((9, 2)) @ W1.T
    step = theory.last_step(W1, W2)
    assert np.linalg.norm(T1 @ W1) == np.linalg.norm(T2 @ W2) == step.spectra == step.left_inverse == 0.0
    assert np.linalg.norm(T2 @ W1) == np.linalg.norm(T2)
    assert step.missed == 1.0


def test_spectra_are_apart_by_the_sine_of_their_angle():
    W1, W2 = np.diag([3.0, 1.0, 1.0])[:, :2], np.diag([1.0, 1.0, 1.0])[:, :2]
    cos = (3 + 1) / (np.sqrt(10) * np.sqrt(2))
    assert theory.last_step(W1, W2).spectra == pytest.approx(np.sqrt(1 - cos**2), rel=1e-12)


def test_maps_that_the_step_cannot_take():
    with pytest.raises(SolverUsageError, match="maps of 4 and 5 values"):
        theory.last_step(np.eye(4)[:, :2], np.eye(5)[:, :2])
    with pytest.raises(SolverUsageError, match="numerical rank below 2"):
        theory.last_step(np.ones((4, 2)), np.eye(4)[:, :2])


def test_the_slips_differ_from_the_print():
    found = {slip.where: slip for slip in theory.slips()}
    assert (found["Lemma 2"].printed, found["Lemma 2"].found) == (8, 50 - 12)
    assert found["Lemma 4"].found == pytest.approx(np.sqrt(50 - 20), rel=1e-12)
    assert found["Theorem 2, Eq. 5"].found == pytest.approx(0.1277, abs=1e-4)
    assert found["Theorem 2, Eq. 7"].found == 1.0
    assert all(slip.printed != slip.found for slip in found.values())
    # Where the print is right: a tall matrix of full column rank has the left inverse of Lemma 4.
    tall = np.random.default_rng(0).standard_normal((50, 20))
    assert np.linalg.norm(np.linalg.pinv(tall) @ tall - np.eye(20)) < 1e-12
    assert scipy.linalg.null_space(tall).shape[1] == min(tall.shape) - 20 == 0


def test_no_pairs_and_pairs_that_do_not_move():
    world = theory.planted(dim=8, moved=2, n=20)
    none = theory.Pairs(np.zeros((0, 8)), np.zeros((0, 8)), np.arange(0))
    with pytest.raises(NoPairsError, match="0 pairs"):
        list(theory.maps(replace(world, fitted=none), 2))
    names = [m.name for m in theory.maps(replace(world, other_fitted=none), 2)]
    assert "svd, fitted on the second model" not in names
    still = replace(world.fitted, translations=world.fitted.origins)
    with pytest.raises(SolverUsageError, match="every translation equals its origin"):
        list(theory.maps(replace(world, fitted=still), 2))
