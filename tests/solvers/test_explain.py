"""Contributions add up to the score, and sit where two pictures agree."""

import numpy as np
import pytest
from solver_worlds import gaussian

from solvers.analytic import Analytic
from solvers.closed import PairData, Pca, Plda, Regression
from solvers.errors import SolverUsageError
from solvers.explain import contributions, grid
from solvers.gallery_maps import Centred, Identity
from solvers.projection import Projection
from solvers.verdict import verdict_map
from solvers.weighted import NormWeighted

SHAPE = (3, 4, 4)
D = 48


def world():
    rows, g, _ = gaussian(D, 120, 1)
    return rows, g


def maps():
    rows, g = world()
    data = PairData.from_arrays(rows, g)
    analytic = Analytic(0.1, 20).fit(data).projection()
    rng = np.random.default_rng(0)
    two_centres = Projection(
        rng.standard_normal((D, 7)),
        rng.standard_normal((D, 7)),
        center=rng.standard_normal(D),
        query_center=rng.standard_normal(D),
    )
    return {
        "raw": Identity().fit(data).projection(),
        "centred": Centred().fit(data).projection(),
        "pca": Pca(10).fit(data).projection(),
        "analytic": analytic,
        "bias": analytic.with_score("bias"),
        "verdict": verdict_map(analytic),
        "norm-weighted": NormWeighted().fit(data).projection(),
        "plda": Plda(rank=12).fit(data).projection(),
        "regression": Regression(rank=12).fit(data).projection(),
        "two centres": two_centres,
        "two centres, bias": two_centres.with_score("bias"),
    }


MAPS = maps()


@pytest.mark.parametrize("W", MAPS.values(), ids=MAPS)
def test_they_add_up_to_the_score(W):
    rows, g = (x.astype(np.float64) for x in world())
    for i, j in ((0, 0), (0, 1), (5, 9)):
        parts = contributions(W, g[i], rows[j])
        assert parts.shape == (D,)
        assert parts.dtype == np.float64
        score = float((W.queries(g[i : i + 1]) @ W.references(rows[j : j + 1]).T)[0, 0])
        # Sums of d terms, each rounded: d eps of the terms' size.
        assert abs(parts.sum() - score) <= 64 * D * np.finfo(float).eps * np.abs(parts).sum()
        assert abs(grid(parts, SHAPE).sum() - score) <= 64 * D * np.finfo(float).eps * np.abs(parts).sum()


def test_the_sides_are_treated_alike():
    rows, _ = world()
    W = MAPS["pca"]
    there, back = contributions(W, rows[0], rows[1]), contributions(W, rows[1], rows[0])
    # The sum of both orders' terms, rounded once more.
    assert np.abs(there - back).max() <= 1e-12 * np.abs(there).max()
    other = MAPS["analytic"]
    assert not np.allclose(contributions(other, rows[0], rows[1]), contributions(other, rows[1], rows[0]))


@pytest.mark.parametrize("name", ["raw", "centred", "analytic", "verdict"])
def test_a_shared_corner_is_where_they_sit(name):
    """Latents that vary place by place: two that share one corner alone agree there, and nowhere else."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((400, D))
    W = (
        {
            "raw": Identity(),
            "centred": Centred(),
            "analytic": Analytic(0.1, None),
            "verdict": Analytic(0.1, None),
        }[name]
        .fit(PairData.from_gallery(rows))
        .projection()
    )
    W = verdict_map(W) if name == "verdict" else W
    corner = np.zeros(SHAPE, bool)
    corner[:, :2, :2] = True
    inside, means = np.zeros((4, 4), bool), []
    inside[:2, :2] = True
    shared, strange = [], []
    for i in range(0, 200, 2):
        q = np.where(corner.ravel(), rows[i], rows[i + 1])
        shared.append(grid(contributions(W, q, rows[i]), SHAPE))
        strange.append(grid(contributions(W, rows[i + 1], rows[i]), SHAPE))
    means = np.mean(shared, axis=0)
    assert means[inside].min() > 5 * np.abs(means[~inside]).max()
    # The opposite: of two strangers no place stands out.
    assert np.abs(np.mean(strange, axis=0)).max() < means[inside].min() / 5


def test_what_has_no_direction_contributes_nothing():
    W = MAPS["raw"]
    assert not contributions(W, np.zeros(D), np.ones(D)).any()
    assert np.isfinite(contributions(W, np.ones(D, np.float16), np.ones(D, np.float16))).all()


def test_what_does_not_fit_is_refused():
    W = MAPS["raw"]
    with pytest.raises(SolverUsageError, match="rows of 48 values"):
        contributions(W, np.ones(47), np.ones(47))
    with pytest.raises(SolverUsageError, match="One latent is a row"):
        contributions(W, np.ones((2, D)), np.ones(D))
    with pytest.raises(SolverUsageError, match="cannot be laid out"):
        grid(np.ones(D), (4, 4, 4))
