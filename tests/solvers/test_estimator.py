"""The estimator is the method: the same map, either side, in any array library."""

import doctest

import numpy as np
import pytest
from solver_worlds import gaussian

from solvers import OriginFinder, estimator
from solvers.data import PairData
from solvers.errors import NoPairsError, SolverUsageError
from solvers.methods import build


@pytest.fixture(scope="module")
def pairs():
    o, g, labels = gaussian(32, 200, 1)
    return o[labels], g


@pytest.mark.parametrize(("method", "knobs"), [("gnull", {"lam": 3.0}), ("svd", {}), ("analytic", {})])
def test_it_gives_what_the_method_gives(pairs, method, knobs):
    o, g = pairs
    finder = OriginFinder(method, rank=9, **knobs).fit(o, g)
    expected = build(method, rank=9, **knobs).fit(PairData.from_arrays(o, g)).projection()
    assert np.array_equal(finder.transform(g), expected.queries(g))
    assert np.array_equal(finder.transform_references(o), expected.references(o))
    assert finder.fitted_.method == method


def test_a_collection_alone_will_do_where_the_method_needs_no_pairs(pairs):
    o, g = pairs
    alone, beside = (
        OriginFinder("pca", rank=4).fit(o),
        OriginFinder("pca", rank=4).fit(o[:9], g[:9], gallery=o),
    )
    assert np.array_equal(alone.transform(g), beside.transform(g))
    with pytest.raises(NoPairsError, match="svd"):
        OriginFinder("svd", rank=4).fit(o)


def test_torch_in_torch_out(pairs):
    torch = pytest.importorskip("torch")
    o, g = pairs
    finder = OriginFinder("gnull", rank=5).fit(torch.from_numpy(o), torch.from_numpy(g))
    found = finder.transform(torch.from_numpy(g))
    assert isinstance(found, torch.Tensor)
    same = OriginFinder("gnull", rank=5).fit(o, g).transform(g)
    # float32 maps of two libraries' float64 fits: a few eps of unit rows.
    assert np.abs(found.numpy() - same).max() < 1e-5


def test_params_are_scikit_learns(pairs):
    base = pytest.importorskip("sklearn.base")
    finder = OriginFinder("gnull", rank=5, lam=2.0)
    assert finder.get_params() == {"method": "gnull", "rank": 5, "lam": 2.0}
    copy = base.clone(finder).set_params(lam=4.0)
    assert (copy.knobs, finder.knobs) == ({"rank": 5, "lam": 4.0}, {"rank": 5, "lam": 2.0})
    assert copy.set_params(method="svd", rank=3).get_params() == {"method": "svd", "rank": 3}


def test_what_cannot_be_is_refused(pairs):
    with pytest.raises(SolverUsageError, match="no knob lam"):
        OriginFinder("svd", lam=1.0)
    with pytest.raises(SolverUsageError, match="fit first"):
        OriginFinder("svd").transform(pairs[0])
    with pytest.raises(SolverUsageError, match="rows"):
        OriginFinder("pca").fit(pairs[0][0])
    lists = OriginFinder("pca", rank=2).fit(pairs[0].tolist()).projection_
    assert np.allclose(
        lists.query_map, OriginFinder("pca", rank=2).fit(pairs[0]).projection_.query_map, atol=1e-4
    )
    with pytest.raises(SolverUsageError, match="gradients"):
        OriginFinder("cosface").fit(*pairs)


def test_its_example_runs():
    found = doctest.testmod(estimator)
    assert found.attempted >= 6
    assert not found.failed
