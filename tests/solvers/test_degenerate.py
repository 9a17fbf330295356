"""Data at the edge: every closed form gives a map or a clear answer, and never one that is not finite."""

import numpy as np
import pytest

from solvers.closed import PairData
from solvers.errors import NoPairsError, SolverError, SolverUsageError
from solvers.methods import METHODS, build
from solvers.sums import PairSums

D = 24
CLOSED = [name for name, method in METHODS.items() if not method.needs_torch]
PAIRED = [name for name in CLOSED if METHODS[name].needs_pairs]


def made(name, rank=4):
    return build(name, **({"rank": rank} if "rank" in METHODS[name].__dataclass_fields__ else {}))


def world(n, seed=0):
    rng = np.random.default_rng(seed)
    o = rng.standard_normal((n, D)) * np.linspace(2, 0.5, D) + 1
    return o, o + 0.3 * rng.standard_normal((n, D))


def fit_or_say(name, data, rank=4):
    """Return a fit whose maps are finite, or the sentences of a refusal."""
    try:
        fitted = made(name, rank).fit(data)
    except SolverError as error:
        said = str(error)
        assert len(said) > 40
        assert "Error" not in said
        return said
    for part in (fitted.query_map, fitted.reference_map, fitted.spectrum):
        assert np.isfinite(part).all()
    assert fitted.query_map.shape[1] == fitted.rank >= 1
    return fitted


@pytest.mark.parametrize("name", PAIRED)
def test_no_pairs(name):
    with pytest.raises(NoPairsError, match=f"{name} learns from pairs"):
        made(name).fit(PairData.from_gallery(world(50)[0]))


@pytest.mark.parametrize("name", CLOSED)
def test_one_pair(name):
    fit_or_say(name, PairData.from_arrays(*world(1), gallery=world(50)[0]))


@pytest.mark.parametrize("n", [10, 300], ids=["fewer pairs than dimensions", "more"])
@pytest.mark.parametrize("name", CLOSED)
def test_identical_pairs(name, n):
    o, _ = world(n)
    found = fit_or_say(name, PairData.from_arrays(o, o))
    if name == "gnull":
        assert "every translation equals its origin" in found
    if name == "svd":
        assert found.report["numerical_rank"] == 0
        assert "every translation equals its origin" in found.report["statement"]


@pytest.mark.parametrize("n", [10, 300], ids=["fewer pairs than dimensions", "more"])
@pytest.mark.parametrize("name", CLOSED)
def test_constant_dimensions(name, n):
    o, g = world(n)
    o[:, 3] = g[:, 3] = 5.0
    found = fit_or_say(name, PairData.from_arrays(o, g))
    if name == "svd" and n > D:
        assert found.report["numerical_rank"] == D - 1
        assert abs(found.query_map[3, 0]) > 1 - 1e-9, "the direction in which nothing moves is the null space"


@pytest.mark.parametrize("name", PAIRED)
def test_rows_that_are_not_finite(name):
    o, g = world(100)
    g[7, 2] = np.nan
    with pytest.raises(SolverUsageError, match="1 of 100"):
        made(name).fit(PairData.from_arrays(o, g))


@pytest.mark.parametrize("name", [n for n in CLOSED if "rank" in METHODS[n].__dataclass_fields__])
def test_a_rank_above_what_is_there(name):
    data = PairData.from_arrays(*world(6), gallery=world(8)[0])
    found = fit_or_say(name, data, rank=D)
    if not isinstance(found, str):
        assert found.rank <= D
        if found.rank < D:
            assert "asked for" in found.report["statement"] or found.report["effective_rank"] == found.rank
    with pytest.raises(SolverUsageError, match=str(D)):
        made(name, rank=D + 1).fit(data)


@pytest.mark.parametrize("name", PAIRED)
def test_a_stranger_to_the_data_is_told_by_its_dimensions(name):
    o, g = world(20)
    with pytest.raises(SolverUsageError, match=rf"\({len(o)}, {D}\)"):
        made(name).fit(PairData.from_arrays(o, g[:, :-1]))


def test_sixteen_thousand_dimensions_are_solved_in_the_span_of_few_pairs():
    """d = 16,384 and 12 pairs: no matrix of d x d is made, by any method that could do without."""
    rng = np.random.default_rng(1)
    o = rng.standard_normal((12, 16_384)).astype(np.float32)
    g = o + 0.1 * rng.standard_normal(o.shape).astype(np.float32)
    data = PairData.from_arrays(o, g)
    assert data.moments.dim == 24
    for name in PAIRED:
        fitted = made(name).fit(data)
        assert fitted.query_map.shape == (16_384, 4)
    assert isinstance(data.moments.pairs, PairSums)
