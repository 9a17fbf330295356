"""Exact search is brute force, by either backend and in any order of blocks."""

from __future__ import annotations

import numpy as np
import pytest

from latentstore.errors import UsageError
from latentstore.search import BACKENDS, select_backend, top_k

EPS = np.finfo(np.float32).eps
TRUE_BACKENDS = ["numpy", pytest.param("faiss", marks=pytest.mark.skipif(
    select_backend() != "faiss", reason="FAISS is not installed"))]  # fmt: skip


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


def world(n=700, q=40, m=64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((q, m)).astype(np.float32), rng.standard_normal((n, m)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 7, 700])
@pytest.mark.parametrize("size", [33, 700, 5000])
@pytest.mark.parametrize("backend", TRUE_BACKENDS)
@pytest.mark.parametrize("q", [3, 40])  # FAISS has two ways, by the number of queries
def test_brute_force(backend, size, k, q):
    queries, refs = world(q=q)
    scores, rows = top_k(queries, blocks(refs, size, reuse=True), k, backend=backend)
    assert scores.dtype == np.float32
    assert rows.shape == scores.shape == (q, k)
    exact = queries.astype(np.float64) @ refs.T.astype(np.float64)
    # Products of 64 float32 numbers, summed pairwise or in lanes: within 8 eps of the norms.
    room = 8 * EPS * np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(refs, axis=1).max()
    best = -np.sort(-exact, axis=1)[:, :k]
    found = np.take_along_axis(exact, rows, axis=1)
    assert (np.abs(scores - found) <= room).all()
    assert (np.abs(found - best) <= 2 * room).all()
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(r)) == k for r in rows.tolist())


def test_the_backends_agree():
    pytest.importorskip("faiss")
    queries, refs = world()
    a, b = (top_k(queries, blocks(refs, 100), 10, backend=name) for name in ("numpy", "faiss"))
    np.testing.assert_array_equal(a[1], b[1])  # no two scores of this world are within rounding
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)


def integers(n, q, m=8, seed=1):
    """Small integers: every product and sum is exact, and nearly every score is tied."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-1, 2, (x, m)).astype(np.float32) for x in (q, n)]


@pytest.mark.parametrize("q", [3, 40])
@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("size", [5, 17, 300])
@pytest.mark.parametrize("backend", TRUE_BACKENDS)
def test_ties_go_by_row(backend, size, k, q):
    queries, refs = integers(300, q)
    exact = queries.astype(np.float64) @ refs.T.astype(np.float64)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(-(-300 // size))
        scores, rows = top_k(queries, blocks(refs, size, order=order), k, backend=backend)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(scores, np.take_along_axis(exact, expected, 1))


@pytest.mark.parametrize("backend", TRUE_BACKENDS)
def test_rows_may_come_in_any_order(backend):
    queries, refs = integers(300, 30)
    _, expected = top_k(queries, blocks(refs, 300), 9, backend=backend)
    order = np.random.default_rng(2).permutation(300)
    _, rows = top_k(queries, [(order, refs[order])], 9, backend=backend)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("backend", TRUE_BACKENDS)
def test_all_equal(backend):
    _, rows = top_k(np.ones((25, 4)), blocks(np.ones((500, 4), np.float32), 200), 3, backend=backend)
    assert (rows == [0, 1, 2]).all()


@pytest.mark.parametrize("backend", TRUE_BACKENDS)
def test_fewer_references_than_asked(backend):
    queries, refs = world(n=10, q=4)
    scores, rows = top_k(queries, blocks(refs, 3), 50, backend=backend)
    assert scores.shape == rows.shape == (4, 10)
    assert (np.sort(rows, axis=1) == np.arange(10)).all()
    scores, rows = top_k(queries, [], 5, backend=backend)
    assert scores.shape == rows.shape == (4, 0)


@pytest.mark.parametrize("backend", TRUE_BACKENDS)
def test_other_dtypes_and_row_numbers(backend):
    queries, refs = world()
    shift = 10**10
    _, rows = top_k(queries, ((r + shift, b) for r, b in blocks(refs, 90)), 5, backend=backend)
    _, expected = top_k(queries, blocks(refs, 700), 5, backend=backend)
    np.testing.assert_array_equal(rows - shift, expected)
    wide = top_k(queries.astype(np.float64), blocks(np.asfortranarray(refs), 90), 5, backend=backend)[1]
    np.testing.assert_array_equal(wide, expected)


@pytest.mark.parametrize("k", [0, -1])
def test_k(k):
    with pytest.raises(UsageError, match="--top"):
        top_k(np.ones((1, 2)), [], k)


def test_backends_have_names():
    assert select_backend("numpy") == "numpy"
    assert select_backend("auto") in BACKENDS
    with pytest.raises(UsageError, match="auto, faiss, numpy"):
        select_backend("annoy")
