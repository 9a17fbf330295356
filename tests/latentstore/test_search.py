"""Exact search is brute force in float64: in value and order, by every backend, in blocks of any kind."""

from __future__ import annotations

import math

import numpy as np
import pytest

from latentstore import scan, search
from latentstore.errors import MissingExtraError, UsageError
from latentstore.search import BACKENDS, Search, find_device, has_faiss, select_backend, top_k

WAYS = [
    pytest.param({"backend": "numpy"}, id="numpy"),
    pytest.param(
        {"backend": "faiss"},
        id="faiss",
        marks=pytest.mark.skipif(not has_faiss(), reason="FAISS is not installed"),
    ),
    *(
        pytest.param({"backend": "torch", "scan": dtype}, id=f"torch-{dtype}")
        for dtype in ("float32", "float16", "bfloat16")
    ),
]
every_way = pytest.mark.parametrize("way", WAYS)


def blocks(refs, size, *, order=None, reuse=False):
    """Cut references into blocks; with ``reuse`` every block comes in the same memory, as from a reader."""
    starts = np.arange(0, len(refs), size)
    buffer = np.empty((size, refs.shape[1]), refs.dtype)
    for start in starts if order is None else starts[order]:
        rows = np.arange(start, min(start + size, len(refs)))
        if reuse:
            buffer[: len(rows)] = refs[rows]
            yield rows, buffer[: len(rows)]
            buffer[:] = np.nan
        else:
            yield rows, refs[rows]


def brute_force(queries, refs, k):
    """Every score in float64, ordered by (-score, row)."""
    exact = queries.astype(np.float64) @ refs.astype(np.float64).T
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(exact, order, 1), order


def random_world(n=700, q=40, m=64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((q, m), np.float32), rng.standard_normal((n, m), np.float32)


def integers(n, q, m=8, seed=1):
    """Small integers: every product and sum is exact, and nearly every score is tied."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-1, 2, (x, m)).astype(np.float32) for x in (q, n)]


def clustered(n=100_000, q=20, m=512, seed=2):
    """Pictures in clusters, with exact duplicates, and near-duplicates a grid step or two away.

    All numbers are multiples of 2⁻¹⁶ below 4: sums of their products are exact in float64, in any order, and
    are rounded in float32.
    """
    rng = np.random.default_rng(seed)
    grid = rng.integers(-(2**18), 2**18, (50, m))
    rows, some = rng.integers(0, 50, n), rng.integers(0, n, n // 2)
    refs = (grid * 2.0**-16).astype(np.float32)[rows]
    refs[some, rng.integers(0, m, n // 2)] += (rng.integers(-2, 3, n // 2) * 2.0**-16).astype(np.float32)
    queries = grid[rng.integers(0, 50, q)] // 2 + rng.integers(-(2**15), 2**15, (q, m))
    return (queries * 2.0**-16).astype(np.float32), refs


@pytest.fixture(scope="module")
def large():
    queries, refs = random_world(100_000, 20, 512)
    return queries, refs, brute_force(queries, refs, 10)


@pytest.fixture(scope="module")
def dense():
    queries, refs = clustered()
    return queries, refs, brute_force(queries, refs, 10)


@every_way
def test_a_hundred_thousand_random_references(large, way):
    queries, refs, (scores, rows) = large
    found = top_k(queries, blocks(refs, 65_536), 10, **way)
    np.testing.assert_array_equal(found[1], rows)
    # Two float64 sums of 512 products: log2(512) roundings in a tree, 512 at most in BLAS, of 2⁻⁵³ each.
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(refs, axis=1).max()
    assert (np.abs(found[0] - scores) <= 521 * 2.0**-53 * norms).all()


@every_way
def test_clusters_with_duplicates_and_near_ties(dense, way):
    queries, refs, (scores, rows) = dense
    order = np.random.default_rng(0).permutation(-(-len(refs) // 30_000))
    found = top_k(queries, blocks(refs, 30_000, order=order), 10, **way)
    np.testing.assert_array_equal(found[0], scores)
    np.testing.assert_array_equal(found[1], rows)


def test_that_world_is_hard(dense, monkeypatch):
    """Float32 alone gets it wrong, and so does a second look at only what seems to be the best."""
    queries, refs, (_, rows) = dense
    alone = np.argsort(-(queries @ refs.T), axis=1, kind="stable")[:, :10]
    assert (alone != rows).any(axis=1).mean() > 0.5
    monkeypatch.setattr(search, "bound", lambda m, scan, norms: 0 * norms)
    _, found = top_k(queries, blocks(refs, 30_000), 10, backend="numpy")
    assert (found != rows).any()


@pytest.mark.parametrize("q", [3, 40])
@pytest.mark.parametrize("k", [1, 50])
@pytest.mark.parametrize("size", [17, 300])
@every_way
def test_ties_go_by_row(way, size, k, q):
    queries, refs = integers(300, q)
    scores, rows = brute_force(queries, refs, k)
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(-(-300 // size))
        found = top_k(queries, blocks(refs, size, order=order, reuse=True), k, **way)
        np.testing.assert_array_equal(found[1], rows)
        np.testing.assert_array_equal(found[0], scores)


@pytest.mark.parametrize("k", [1, 7, 700])
@pytest.mark.parametrize("size", [33, 5000])
@every_way
def test_any_k_and_block(way, size, k):
    queries, refs = random_world()
    scores, rows = top_k(queries, blocks(refs, size, reuse=True), k, **way)
    assert (scores.dtype, rows.dtype) == (np.float64, np.int64)
    np.testing.assert_array_equal(rows, brute_force(queries, refs, k)[1])


@every_way
def test_rows_may_come_in_any_order(way):
    queries, refs = integers(300, 30)
    order = np.random.default_rng(2).permutation(300)
    _, rows = top_k(queries, [(order, refs[order])], 9, **way)
    np.testing.assert_array_equal(rows, brute_force(queries, refs, 9)[1])


@every_way
def test_all_equal(way, monkeypatch):
    monkeypatch.setattr(search, "_HELD", 100)  # what waits is settled over and over
    _, rows = top_k(np.ones((25, 4)), blocks(np.ones((500, 4), np.float32), 200), 3, **way)
    assert (rows == [0, 1, 2]).all()


@pytest.mark.parametrize("tile", [1, 64, 10_000])
@every_way
def test_tiles_and_queries_of_any_size(way, tile, monkeypatch):
    monkeypatch.setattr(search, "_TILE", {"cpu": (7, tile)})
    queries, refs = integers(300, 20)
    _, rows = top_k(queries, blocks(refs, 100), 4, **way)
    np.testing.assert_array_equal(rows, brute_force(queries, refs, 4)[1])


@every_way
def test_fewer_references_than_asked(way):
    queries, refs = random_world(n=10, q=4)
    scores, rows = top_k(queries, blocks(refs, 3), 50, **way)
    assert scores.shape == rows.shape == (4, 10)
    assert (np.sort(rows, axis=1) == np.arange(10)).all()
    assert top_k(queries, [], 5, **way)[1].shape == (4, 0)
    assert top_k(queries[:0], blocks(refs, 3), 5, **way)[1].shape == (0, 5)


@every_way
def test_other_dtypes_and_row_numbers(way):
    queries, refs = random_world()
    shift, expected = 10**10, brute_force(queries, refs, 5)[1]
    _, rows = top_k(queries, ((r + shift, b) for r, b in blocks(refs, 90)), 5, **way)
    np.testing.assert_array_equal(rows - shift, expected)
    wide = top_k(queries.astype(np.float64), blocks(np.asfortranarray(refs), 90), 5, **way)[1]
    np.testing.assert_array_equal(wide, expected)
    refs.flags.writeable = False
    np.testing.assert_array_equal(top_k(queries, [(np.arange(700), refs)], 5, **way)[1], expected)


@pytest.mark.parametrize(("q", "r"), [(0, -100), (-73, -73), (-80, -80), (50, 50), (-50, 50), (50, -80)])
@every_way
def test_any_magnitude(way, q, r):
    """Near-ties whose products, or the squares of whose norms, are below float32's range, or far above 1."""
    queries, refs = clustered(3000, 6, 64)
    queries, refs = np.ldexp(queries, q), np.ldexp(refs, r)  # exact
    scores, rows = brute_force(queries, refs, 5)
    found = top_k(queries, blocks(refs, 1000), 5, **way)
    np.testing.assert_array_equal(found[1], rows)
    np.testing.assert_array_equal(found[0], scores)


@every_way
def test_one_reference_dwarfs_the_others(way):
    """As a bias column does: the bound then admits nearly everything, and the answer is the same."""
    queries, refs = random_world(n=300, q=5)
    refs[17] *= 1e6
    np.testing.assert_array_equal(top_k(queries, [(np.arange(300), refs)], 5, **way)[1],
                                  brute_force(queries, refs, 5)[1])  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@every_way
def test_what_float32_cannot_rank_is_refused(way, value):
    queries, refs = random_world(n=20, q=2)
    refs[3, 1] = value
    with pytest.raises(UsageError, match="not finite"):
        top_k(queries, blocks(refs, 20), 3, **way)
    queries[0, 0] = np.nan
    with pytest.raises(UsageError, match="queries"):
        top_k(queries, [], 3, **way)


def test_a_known_norm_changes_nothing():
    queries, refs = random_world()
    largest = float(np.linalg.norm(refs, axis=1).max()) * 1.001
    for at in (largest, 100 * largest):
        _, rows = top_k(queries, blocks(refs, 100), 5, largest=at)
        np.testing.assert_array_equal(rows, brute_force(queries, refs, 5)[1])


# --- the arithmetic ---------------------------------------------------------------------------------------


def test_the_second_score_depends_on_the_two_rows_alone():
    import torch

    queries, refs = random_world(n=2000, q=3, m=513)
    i, j = np.repeat(np.arange(3), 2000), np.tile(np.arange(2000), 3)
    whole = scan.exact_scores(queries, refs, i, j)
    one_by_one = [scan.exact_scores(queries, refs, i[p : p + 1], j[p : p + 1])[0] for p in range(0, 6000, 97)]
    np.testing.assert_array_equal(whole[::97], one_by_one)
    other = scan.exact_scores(torch.tensor(queries), torch.tensor(refs), torch.tensor(i), torch.tensor(j))
    np.testing.assert_array_equal(whole, other.numpy())
    # Ten levels of a tree over 513 terms, half a unit in the last place of the absolute sum each.
    for p in range(0, 6000, 997):
        terms = queries[i[p]].astype(np.float64) * refs[j[p]].astype(np.float64)
        assert abs(whole[p] - math.fsum(terms)) <= 10 * 2.0**-53 * np.abs(terms).sum()


def worst_rows(m, u, seed=3):
    """Numbers halfway between two neighbours of a 16-bit type, all rounded the same way."""
    rng = np.random.default_rng(seed)
    return ((1 + u * 0.999) * np.exp2(rng.integers(-1, 2, (20, m)))).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_bound_of_a_16_bit_scan_holds_and_is_needed(dtype):
    import torch

    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for m, rows in ((512, worst_rows(512, u)), (64, random_world(20, 1, 64)[1])):
        norm = np.linalg.norm(rows.astype(np.float64), axis=1)
        largest = float(norm.max())
        q, b, scale = scan.half_scale(
            torch.tensor(rows), torch.tensor(norm), torch.tensor(rows), largest, dtype
        )
        scanned = (q @ b.T).to(getattr(torch, dtype)).to(torch.float64).numpy()
        exact = (rows.astype(np.float64) @ rows.astype(np.float64).T) * scale.numpy()[:, None]
        error = np.abs(scanned - exact)
        limit = scan.bound(m, dtype, norm * largest * scale.numpy())[:, None]
        assert (error <= limit).all()
        if m == 512:
            assert (error / limit).max() > 0.3, "two thirds of the bound are the worst case's own"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("power", [-126, -140, -149])
def test_a_16_bit_scan_of_references_at_the_end_of_float32s_range(dtype, power):
    """What would make their norms 1 is itself beyond float32."""
    queries, refs = (np.sign(x) for x in random_world(50, 5, 16))
    refs = np.ldexp(refs, power) * (np.arange(50)[:, None] % 3 == 0)
    largest = float(np.linalg.norm(refs.astype(np.float64), axis=1).max())
    scores, rows = top_k(queries, [(np.arange(50), refs)], 5, backend="torch", scan=dtype, largest=largest)
    expected = brute_force(queries, refs, 5)
    np.testing.assert_array_equal(scores, expected[0])
    np.testing.assert_array_equal(rows, expected[1])


def test_the_bound_of_float32_holds_in_any_order_of_summation():
    rng = np.random.default_rng(4)
    q = rng.uniform(0.5, 1, (1, 4096)).astype(np.float32)  # one sign: the sums grow, and so do their errors
    r = rng.uniform(0.5, 1, (1, 4096)).astype(np.float32)
    exact = math.fsum((q[0].astype(np.float64) * r[0]).tolist())
    limit = scan.bound(4096, "float32", np.linalg.norm(q) * np.linalg.norm(r))
    in_turn = np.float32(0)
    for product in q[0] * r[0]:
        in_turn += product
    for value in (in_turn, (q @ r.T)[0, 0], (q[0] * r[0]).sum()):
        assert abs(float(value) - exact) <= limit
    assert abs(float(in_turn) - exact) > 8 * np.finfo(np.float32).eps * exact, "fewer terms would not do"


# --- which one ---------------------------------------------------------------------------------------------


def test_a_large_job_is_timed_both_ways(large, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "_WORTH", 1)
    queries, refs, (_, rows) = large
    found = Search(queries, 10)
    assert found.backend == "auto"
    for r, b in blocks(refs, 50_000):
        found.add(r, b)
    assert found.backend == min(found.seconds, key=lambda name: found.seconds[name])
    assert found.seconds.keys() == {"faiss", "numpy"}
    np.testing.assert_array_equal(found.best()[1], rows)


def test_backends_have_names(monkeypatch):
    assert select_backend("numpy") == "numpy"
    assert select_backend("auto", "cuda:1") == "torch"
    for name in BACKENDS:
        assert select_backend(name) in BACKENDS
    with pytest.raises(UsageError, match="auto, faiss, numpy"):
        select_backend("annoy")
    with pytest.raises(UsageError, match="on the CPU"):
        select_backend("numpy", "cuda")
    monkeypatch.setattr(search, "has_faiss", lambda: False)
    assert select_backend("auto") == "numpy"
    with pytest.raises(MissingExtraError, match="pip install"):
        select_backend("faiss")


def test_no_cuda_is_said():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert find_device("auto") == "cpu"
    with pytest.raises(UsageError, match="CUDA"):
        top_k(np.ones((1, 2)), [], 1, device="cuda")
    with pytest.raises(UsageError, match="float16"):
        top_k(np.ones((1, 2)), [], 1, scan="float16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_cuda(large, dense, dtype):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the scan on one is not run")
    for queries, refs, (_, rows) in (large, dense):
        _, found = top_k(queries, blocks(refs, 65_536), 10, device="cuda", scan=dtype)
        np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("k", [0, -1])
def test_k(k):
    with pytest.raises(UsageError, match="--top"):
        top_k(np.ones((1, 2)), [], k)
