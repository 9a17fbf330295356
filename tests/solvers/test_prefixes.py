"""A nested method's W of rank k is the first k columns of its W of any larger rank."""

from dataclasses import replace

import numpy as np
import pytest
from solver_worlds import gaussian, planted

from solvers.closed import (
    Analytic,
    Cca,
    GeneralisedNull,
    Kissme,
    NullSpace,
    PairData,
    Pca,
    Plda,
    Procrustes,
    RandomSubspace,
    Regression,
)
from solvers.methods import METHODS
from solvers.sgd import ArraySource, CosFace

D, TOP, SMALL = 48, 32, (1, 7, 16)
EPS32 = float(np.finfo(np.float32).eps)

METHODS_WITH_PREFIXES = [
    NullSpace(TOP),
    GeneralisedNull(TOP, 0.1),
    GeneralisedNull(TOP, 10.0),
    Analytic(0.2, TOP),
    Analytic(0.2, TOP, prompt=2.0, score="bias"),
    Pca(TOP, 0.5),
    Plda(TOP),
    Cca(TOP),
    Regression(TOP, score="cosine"),
    Procrustes(TOP),
    Kissme(TOP),
    RandomSubspace(TOP),
]


def full_rank():
    """Every difference direction is there: W holds the smallest singular directions."""
    return gaussian(D, 200, 1)[:2]


def large_null_space():
    """The null space holds all TOP columns: their order is origin variance."""
    return planted(200, D, D - TOP)[:2]


def small_null_space():
    """Of the TOP columns 5 are null, and the rest are small singular directions."""
    return planted(200, D, D - 5)[:2]


def few_pairs():
    """Fewer pairs than dimensions, and origins that span less than the null space: the rest is drawn."""
    return planted(20, D, 20)[:2]


@pytest.mark.parametrize("world", [full_rank, large_null_space, small_null_space, few_pairs])
@pytest.mark.parametrize("method", METHODS_WITH_PREFIXES, ids=lambda m: type(m).__name__)
def test_a_prefix_is_the_fit_of_that_rank(method, world):
    o, g = world()
    data = PairData.from_arrays(o, g)
    whole = method.fit(data).projection()
    rows = np.random.default_rng(1).standard_normal((9, D)).astype(np.float32)
    for k in SMALL:
        cut, fitted = whole.truncated(k), replace(method, rank=k).fit(data).projection()
        assert cut.rank == fitted.rank == k
        assert cut.symmetric == fitted.symmetric == method.symmetric
        for a, b in ((cut.query_map, fitted.query_map), (cut.reference_map, fitted.reference_map)):
            # Two eigensolvers of float64 rounding, far below the float32 that W is kept in.
            assert np.abs(a - b).max() <= 100 * EPS32 * np.abs(b).max()
        # The bias -|r|^2/2 is made of the kept columns: its scores are the refit's too.
        a, b = (p.queries(rows) @ p.references(rows).T for p in (cut, fitted))
        assert np.abs(a - b).max() <= 1000 * EPS32 * np.abs(b).max()
        assert cut.knobs == fitted.knobs


def test_the_columns_matter_and_not_only_their_number():
    """The opposite: the last columns of a larger W are not the W of that rank."""
    data = PairData.from_arrays(*large_null_space())
    W, small = NullSpace(TOP).fit(data).query_map, NullSpace(7).fit(data).query_map
    assert np.abs(W[:, :7] - small).max() < 1e-6
    assert np.linalg.norm(W[:, -7:].T @ small) < 1e-6


def test_cosface_is_not_nested_and_says_so():
    o, g, labels = gaussian(D, 30, 2)
    source = ArraySource(np.concatenate([o[:30], g]), np.concatenate([np.arange(30), labels]))
    cfg = CosFace(rank=16, steps=60, batch_identities=16, per_identity=2)
    W, small = (replace(cfg, rank=k).fit(source).query_map for k in (16, 4))
    again = replace(cfg, rank=4).fit(source).query_map
    assert np.array_equal(small, again), "one seed, one W: what differs is not chance"

    def scores(W):
        y = o @ W
        return (y @ y.T) / np.outer(*[np.linalg.norm(y, axis=1)] * 2)

    # Any turn of W's columns scores alike, so scores are compared, not columns.
    assert np.abs(scores(W[:, :4]) - scores(small)).max() > 0.02  # a nested method: 1e-5
    assert not CosFace.nested_ranks


def test_every_method_declares_whether_its_ranks_are_nested():
    nested = {name for name, method in METHODS.items() if method.nested_ranks}
    assert {"svd", "gnull", "analytic", "pca", "plda", "cca", "regression", "procrustes", "kissme"} == nested
    assert not nested & {"cosface", "identity", "centred", "norm-weighted"}
