from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from scipy.linalg import subspace_angles
from solver_worlds import orthonormal, planted

from solvers import nullspace
from solvers.closed import GeneralisedNull, NullSpace, PairData, RandomSubspace, fit_path
from solvers.errors import NoPairsError, SolverUsageError
from solvers.metrics import residual_ratio
from solvers.moments import Moments
from solvers.rank import rank_cutoff

D, R = 96, 64
EPS64, EPS16, EPS32 = (float(np.finfo(t).eps) for t in (np.float64, np.float16, np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [80, 400], ids=["dual", "primal"])
def test_planted_null_space_is_found(n, dtype):
    o, g, null = planted(n, D, R)
    # The plant is moved by the cast itself; what is found must be the plant to 1e-6.
    fitted = NullSpace(D - R).fit(PairData.from_arrays(o.astype(dtype), g.astype(dtype)))
    assert fitted.report["numerical_rank"] == R
    assert fitted.report["path"].startswith("primal" if n >= D else "dual")
    assert subspace_angles(fitted.query_map, null).max() < 1e-6
    # float32 storage of W costs eps32 per entry, so the file's W still meets the same bound.
    assert subspace_angles(fitted.projection().query_map.astype(np.float64), null).max() < 1e-6


@pytest.mark.parametrize("n", [40, 400], ids=["dual", "primal"])
@pytest.mark.parametrize("m", [1, 20, D])
def test_w_is_orthonormal_whatever_the_rank(n, m):
    o, g, _ = planted(n, D, R if n > R else n)
    W = NullSpace(m).fit(PairData.from_arrays(o, g)).query_map
    assert W.shape == (D, m)
    assert np.abs(W.T @ W - np.eye(m)).max() < 100 * D * EPS64  # two orthonormalisations of d terms


def test_a_matrix_without_null_space_is_called_full_rank():
    o, g, _ = planted(400, D, R, noise=0.1)
    fitted = NullSpace(8).fit(PairData.from_arrays(o, g))
    assert fitted.report["numerical_rank"] == D
    assert "full rank" in fitted.report["statement"]
    # The opposite of a null space: the residual is not zero; yet nothing of rank 8 has a smaller one.
    T = g - o
    sigma = np.linalg.svd(T, compute_uv=False)
    assert np.linalg.norm(T @ fitted.query_map) == pytest.approx(np.linalg.norm(sigma[-8:]), rel=1e-6)
    assert np.linalg.norm(T @ fitted.query_map[:, 0]) == pytest.approx(sigma[-1], rel=1e-6)  # smallest first


def test_the_rest_is_filled_with_smallest_singular_directions_when_the_null_space_is_small():
    o, g, null = planted(400, D, D - 3)
    fitted = NullSpace(10).fit(PairData.from_arrays(o, g))
    assert subspace_angles(fitted.query_map[:, :3], null).max() < 1e-6
    lengths = np.linalg.norm((g - o) @ fitted.query_map, axis=0)
    assert (np.diff(lengths[3:]) > 0).all()
    assert "3 of the 10" in fitted.report["statement"]


def test_fewer_pairs_than_dimensions_is_arithmetic_and_does_not_hold_out():
    rng = np.random.default_rng(3)
    o = rng.standard_normal((100, D))
    g = o + rng.standard_normal((100, D))  # nothing to learn: isotropic differences
    data = PairData.from_arrays(o[:50], g[:50])
    fitted = NullSpace(20).fit(data)
    assert "arithmetic" in fitted.report["statement"]
    W = fitted.projection()
    random = RandomSubspace(20).fit(data).projection()
    assert residual_ratio(W, o[:50], g[:50]) < 1e-6  # float32 W: eps32 times a few
    held_out, chance = residual_ratio(W, o[50:], g[50:]), residual_ratio(random, o[50:], g[50:])
    assert held_out > 0.7 * chance
    enough = NullSpace(20).fit(PairData.from_arrays(np.tile(o, (2, 1)), np.tile(g, (2, 1))))
    assert "arithmetic" not in enough.report["statement"]


def test_inside_a_large_null_space_the_directions_of_largest_origin_variance_are_taken():
    o, g, null = planted(60, D, 40)
    fitted = NullSpace(5).fit(PairData.from_arrays(o, g))
    cov = np.cov(o.T, bias=True)
    inside = null.T @ cov @ null
    best = null @ np.linalg.eigh(inside)[1][:, ::-1][:, :5]
    assert subspace_angles(fitted.query_map, best).max() < 1e-6
    primal = NullSpace(5).fit(PairData.from_arrays(np.tile(o, (3, 1)), np.tile(g, (3, 1))))
    assert primal.report["path"].startswith("primal")
    # One W from both paths, column by column and sign by sign.
    assert np.abs(primal.query_map - fitted.query_map).max() < 1e-6


def test_without_origin_variance_the_rest_is_deterministic_and_null():
    rng = np.random.default_rng(5)
    o = np.repeat(rng.standard_normal((4, D)), 10, axis=0)
    g = o + rng.standard_normal((40, D))
    fits = [NullSpace(30).fit(PairData.from_arrays(o, g)).query_map for _ in range(2)]
    assert np.array_equal(*fits)
    assert np.abs((g - o) @ fits[0]).max() < 1e-12
    prefix = NullSpace(12).fit(PairData.from_arrays(o, g)).query_map
    assert np.abs(prefix - fits[0][:, :12]).max() < 1e-12


@pytest.mark.parametrize("n", [60, 400])
def test_ranks_are_nested(n):
    o, g, _ = planted(n, D, 40)
    data = PairData.from_arrays(o, g)
    for method in (NullSpace, GeneralisedNull):
        wide = method(40).fit(data).projection()
        assert np.abs(wide.truncated(7).query_map - method(7).fit(data).projection().query_map).max() < 1e-5


def test_block_sizes_do_not_matter():
    o, g, _ = planted(300, D, R)
    one = NullSpace(8).fit(PairData.from_arrays(o, g, block=10_000)).query_map
    many = NullSpace(8).fit(PairData.from_arrays(o, g, block=7)).query_map
    assert np.abs(one - many).max() < 1e-8


def test_float16_storage_decides_the_cutoff():
    o, g, null = planted(400, D, R)
    o16, g16 = o.astype(np.float16), g.astype(np.float16)
    stored = NullSpace(D - R).fit(PairData.from_arrays(o16, g16))
    assert stored.report["decided_by"] == "float16 storage"
    assert stored.report["numerical_rank"] == R
    # Rounding moves the plant visibly, by about eps16, and no further.
    angle = subspace_angles(stored.query_map, null).max()
    assert 1e-5 < angle < 30 * EPS16
    # Told nothing of the storage, float64 arithmetic takes the rounding for signal.
    blind = NullSpace(D - R).fit(PairData.from_arrays(o16.astype(np.float64), g16.astype(np.float64)))
    assert blind.report["numerical_rank"] == D
    assert blind.report["decided_by"].startswith("float64 arithmetic")
    # All its singular values lie far above what the Gram would lose: no second pass by QR.
    assert blind.report["accumulator"].startswith("gram: the smallest singular value")


def test_the_cutoff_is_the_larger_of_both_floors():
    gram = rank_cutoff(10.0, 400, 96, gram=True)
    direct = rank_cutoff(10.0, 400, 96, gram=False)
    assert gram.value == pytest.approx(10 * np.sqrt(400 * EPS64))
    assert direct.value == pytest.approx(10 * 400 * EPS64)
    stored = rank_cutoff(10.0, 96, 400, gram=True, stored_eps=EPS16, rms=2.0)
    assert stored.value == pytest.approx(np.sqrt(800) * EPS16 * 2.0)
    assert stored.decided_by == "float16 storage"
    assert rank_cutoff(1e6, 96, 400, gram=True, stored_eps=EPS32, rms=1.0).decided_by.startswith("float64")
    assert rank_cutoff(1.0, 96, 400, gram=False, stored_eps=EPS32, rms=1.0).decided_by == "float32 storage"


def _direct(o, g, lam):
    T = g - o
    sigma_o, sigma_t = np.cov(o.T, bias=True), T.T @ T / len(T)
    B = sigma_t + lam * np.trace(sigma_t) / len(sigma_t) * np.eye(len(sigma_t))
    values, vectors = scipy.linalg.eigh(sigma_o, B)
    return values[::-1], vectors[:, ::-1], B


@pytest.mark.parametrize("n", [40, 300], ids=["span", "primal"])
@pytest.mark.parametrize("lam", [0.1, 10.0])
def test_generalised_null_agrees_with_the_direct_eigenproblem(n, lam):
    o, g, _ = planted(n, D, 30, noise=0.2)
    fitted = GeneralisedNull(12, lam).fit(PairData.from_arrays(o, g))
    assert fitted.report["path"] == ("span" if n == 40 else "primal")
    values, vectors, B = _direct(o, g, lam)
    W = fitted.query_map
    # Condition of B times d eps64 is below 1e-10 here.
    assert np.allclose(fitted.spectrum, values[:12], rtol=1e-9)
    assert subspace_angles(W, vectors[:, :12]).max() < 1e-7
    assert np.abs(W.T @ B @ W - np.eye(12)).max() < 1e-9
    assert np.abs(W.T @ W - np.eye(12)).max() > 1e-2  # the scale is B's, not orthonormal
    assert np.allclose(fitted.center, o.mean(axis=0))


def test_span_and_primal_paths_agree():
    o, g, _ = planted(40, D, 30)
    span = GeneralisedNull(12).fit(PairData.from_arrays(o, g))
    # Every row three times: the same moments, but more rows than dimensions.
    primal = GeneralisedNull(12).fit(PairData.from_arrays(np.tile(o, (3, 1)), np.tile(g, (3, 1))))
    assert (span.report["path"], primal.report["path"]) == ("span", "primal")
    assert np.abs(span.query_map - primal.query_map).max() < 1e-8


def test_generalised_null_keeps_only_directions_with_origin_variance():
    o, g, _ = planted(20, D, 30)
    fitted = GeneralisedNull(60).fit(PairData.from_arrays(o, g))
    assert fitted.rank == 19 == fitted.report["effective_rank"]  # centring takes one
    assert fitted.report["requested_rank"] == 60


def test_one_path_for_many_ridges_is_many_fits():
    o, g, _ = planted(150, D, 30, noise=0.1)
    data = PairData.from_arrays(o, g)
    for lam, fitted in zip((0.1, 1.0, 50.0), fit_path(data, (0.1, 1.0, 50.0), 9), strict=True):
        assert np.array_equal(fitted.query_map, GeneralisedNull(9, lam).fit(data).query_map)
        assert fitted.knobs == {"rank": 9, "lam": lam}


def test_impossible_requests_are_refused():
    o, g, _ = planted(50, D, 30)
    data = PairData.from_arrays(o, g)
    for rank in (0, D + 1):
        for method in (NullSpace, GeneralisedNull, RandomSubspace):
            with pytest.raises(SolverUsageError, match=str(rank)):
                method(rank).fit(data)
    with pytest.raises(SolverUsageError, match="lam"):
        GeneralisedNull(5, 0.0)
    with pytest.raises(NoPairsError, match="analytic"):
        NullSpace(5).fit(PairData.from_gallery(o))
    with pytest.raises(SolverUsageError, match="zero"):
        GeneralisedNull(5).fit(PairData.from_arrays(o, o))
    g[3, 3] = np.nan
    with pytest.raises(SolverUsageError, match="not finite"):
        NullSpace(5).fit(PairData.from_arrays(o, g))


def spread_world(decades, n=400):
    """Pairs whose differences have singular values over so many decades, and the null basis beside them."""
    rng = np.random.default_rng(8)
    left = orthonormal(rng, n, R)
    basis = orthonormal(rng, D, D)
    t = np.sqrt(n) * (left * np.logspace(0, -decades, R)) @ basis[:, :R].T
    o = rng.standard_normal((n, D))
    return o, o + t, basis[:, R:]


@pytest.mark.parametrize(
    ("decades", "accumulator", "bound"),
    # Forming g - o rounds by eps64 of the latents; a gap of 1e-8 turns that into some 1e-8 of angle. The Gram
    # holds squares: its rounding is eps64 of the largest, against a gap of 1e-8 of it over four decades.
    [(8, "qr", 1e-6), (4, "gram", 1e-7)],
)
@pytest.mark.parametrize("n", [80, 400], ids=["dual", "primal"])
@pytest.mark.parametrize("library", ["numpy", "torch", "cupy"])
def test_a_null_space_beside_singular_values_over_decades(library, n, decades, accumulator, bound):
    xp = pytest.importorskip(library)
    if library == "cupy" and not xp.is_available():
        pytest.skip("CuPy finds no GPU")
    o, g, null = spread_world(decades, n)
    fitted = NullSpace(D - R, accumulator).fit(PairData.from_arrays(xp.asarray(o), xp.asarray(g)))
    assert fitted.report["numerical_rank"] == R
    assert subspace_angles(fitted.query_map, null).max() < bound


def test_each_accumulator_fails_where_it_should():
    o, g, null = spread_world(8)
    data = PairData.from_arrays(o, g)
    by_gram = NullSpace(D - R, "gram").fit(data)
    assert by_gram.report["numerical_rank"] < R, "the Gram takes small directions for zero"
    assert by_gram.report["decided_by"] == "float64 arithmetic (Gram)"
    told = NullSpace(D - R).fit(data)
    assert told.report["accumulator"].startswith("qr: by the Gram everything below")
    assert subspace_angles(told.query_map, null).max() < 1e-6
    # Latents that were stored in float32 are rounded: QR cannot bring back what storage took.
    stored = PairData.from_arrays(o.astype(np.float32), g.astype(np.float32))
    assert NullSpace(D - R, "qr").fit(stored).report["decided_by"] == "float32 storage"
    # Stored in half precision, and with float32 tiles, the Gram is good enough: it is storage that decides.
    half = NullSpace(D - R).fit(PairData.from_arrays(o.astype(np.float16), g.astype(np.float16)))
    assert half.report["accumulator"] == "gram: float16 storage sets the floor, not the Gram's arithmetic"
    with pytest.raises(SolverUsageError, match="accumulator"):
        NullSpace(accumulator="svd")


@pytest.mark.parametrize("n", [20, 40])
def test_primal_and_dual_are_one_problem(n):
    """Fewer rows than dimensions: from the rows' span, or from sums over all dimensions, the same maps."""
    o, g, _ = planted(n, D, n // 2, noise=1e-2)
    dual = PairData.from_arrays(o, g)
    whole = Moments(D, shift=o.mean(axis=0))
    whole.update(o, g)
    primal = replace(dual, moments_source=lambda: whole)
    assert (dual.moments.dim, primal.moments.dim) == (2 * n, D)
    for lam in (0.1, 10.0):
        a, b = (GeneralisedNull(n // 2, lam).fit(data) for data in (dual, primal))
        assert (a.report["path"], b.report["path"]) == ("span", "primal")
        # Two float64 eigenproblems of one pencil; its condition is (1 + lam') / lam', some 1e3 here.
        assert np.abs(a.query_map - b.query_map).max() < 1e-9 * np.abs(a.query_map).max()
        assert np.allclose(a.spectrum, b.spectrum, rtol=1e-9)
    rows, sums = nullspace._dual(dual), nullspace._primal(primal)
    assert rows.numerical_rank == sums.numerical_rank == n
    # By the Gram both: values to sqrt(eps64) of the largest at worst, and these lie within two decades.
    assert np.allclose(rows.sigma, sums.sigma[:n], rtol=1e-9)
    assert subspace_angles(rows.row_vectors, sums.row_vectors).max() < 1e-9
