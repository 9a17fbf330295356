import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from solvers.errors import ProjectionFormatError, SolverUsageError
from solvers.methods import METHODS, build, check_rank, get
from solvers.moments import CovMoments, Moments

D = 64
ROOT = Path(__file__).parents[2]
FIELDS = ("sum_o", "sum_g", "oo", "gg", "og", "tt")


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    o = rng.standard_normal((300, D)) + 3
    return o, o + 1e-3 * rng.standard_normal((300, D))


def _fed(o, g, blocks):
    moments = Moments(D)
    for i in blocks:
        moments.update(o[i], g[i])
    return moments


def _close(a, b):
    assert a.n == b.n
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        # Sums of 300 terms in another order: 300 eps64 of the largest.
        assert np.abs(x - y).max() <= 300 * np.finfo(np.float64).eps * np.abs(y).max()


def test_streamed_merged_and_batched_sums_agree(pairs):
    o, g = pairs
    batch = _fed(o, g, [slice(None)])
    t = g - o
    for name, truth in (("oo", o.T @ o), ("gg", g.T @ g), ("og", o.T @ g), ("tt", t.T @ t)):
        assert np.allclose(getattr(batch, name), truth, rtol=1e-12)
    _close(_fed(o, g, [slice(i, i + 7) for i in range(0, 300, 7)]), batch)
    _close(_fed(o, g, [slice(i, i + 50) for i in range(250, -1, -50)]), batch)
    parts = [_fed(o, g, [slice(i, i + 100)]) for i in (0, 100, 200)]
    for order in ((0, 1, 2), (2, 0, 1)):
        total = Moments(D)
        for i in order:
            total.merge(parts[i])
        _close(total, batch)


def test_differences_keep_the_digits_that_sums_of_squares_lose(pairs):
    o, g = (x.astype(np.float64) for x in pairs)
    o, g = o + 1e5, g + 1e5
    moments = _fed(o, g, [slice(None)])
    truth = (g - o).T @ (g - o)
    scale = np.abs(truth).max()
    from_sums = moments.oo + moments.gg - moments.og - moments.og.T
    assert np.abs(moments.tt - truth).max() < 1e-9 * scale
    assert np.abs(from_sums - truth).max() > 1e-2 * scale


def test_half_precision_blocks_are_summed_in_float64(pairs):
    o, g = (x.astype(np.float16) for x in pairs)
    moments = _fed(o, g, [slice(None)])
    exact = o.astype(np.float64)
    assert moments.oo.dtype == np.float64
    assert np.allclose(moments.oo, exact.T @ exact, rtol=1e-12)


def test_means_and_covariances(pairs):
    o, g = pairs
    moments = _fed(o, g, [slice(None)])
    assert np.allclose(moments.mean_o, o.mean(axis=0))
    assert np.allclose(moments.mean_g, g.mean(axis=0))
    assert np.allclose(moments.cov_o, np.cov(o.T, bias=True), atol=1e-12)
    one, two = CovMoments(D), CovMoments(D)
    one.update(o[:100])
    two.update(o[100:])
    two.merge(one)
    assert np.allclose(two.mean, o.mean(axis=0))
    assert np.allclose(two.cov, np.cov(o.T, bias=True), atol=1e-12)


def test_saving_is_lossless_and_atomic(pairs, tmp_path):
    moments = _fed(*pairs, [slice(None)])
    moments.save(tmp_path / "m.safetensors")
    again = Moments.load(tmp_path / "m.safetensors")
    assert (again.n, again.dim) == (300, D)
    assert all(np.array_equal(getattr(again, f), getattr(moments, f)) for f in FIELDS)
    again.update(*(x[:5] for x in pairs))  # what was loaded can go on
    assert again.n == 305
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ProjectionFormatError):
        Moments.load(tmp_path / "bad.safetensors")


def test_wrong_blocks_are_refused(pairs):
    o, g = (x.copy() for x in pairs)
    with pytest.raises(SolverUsageError, match="as many"):
        Moments(D).update(o, g[:-1])
    with pytest.raises(SolverUsageError, match="shape"):
        Moments(D + 1).update(o, g)
    with pytest.raises(SolverUsageError, match="merged"):
        Moments(D).merge(Moments(D + 1))
    with pytest.raises(SolverUsageError, match="no rows"):
        _ = Moments(D).mean_o
    g[7, 0] = np.inf
    moments = Moments(D)
    with pytest.raises(SolverUsageError, match="1 of 300"):
        moments.update(o, g)
    assert moments.n == 0  # a refused block leaves nothing behind
    assert not moments.oo.any()


def test_methods_have_one_name_and_declare_what_they_need():
    assert list(METHODS) == ["identity", "centred", "pca", "svd", "gnull", "analytic", "cosface"]
    assert [n for n, m in METHODS.items() if m.needs_pairs] == ["svd", "gnull", "cosface"]
    assert [n for n, m in METHODS.items() if m.needs_torch] == ["cosface"]
    assert [n for n, m in METHODS.items() if not m.symmetric] == ["analytic"]
    assert build("svd", rank=7, lam=None).rank == 7
    assert build("analytic", rank="all").rank is None
    with pytest.raises(SolverUsageError, match="Did you mean 'analytic'"):
        get("analitic")
    with pytest.raises(SolverUsageError, match="no knob lam"):
        build("svd", lam=1.0)
    with pytest.raises(SolverUsageError, match="number"):
        build("svd", rank="all")
    with pytest.raises(SolverUsageError, match="4097"):
        check_rank(4097, 4096)


def test_importing_the_solvers_loads_nothing_heavy():
    code = (
        "import sys, solvers, solvers.closed, solvers.metrics, solvers.projection\n"
        "import solvers.sgd, solvers.selection\n"
        "heavy = {'torch', 'cupy', 'faiss', 'dask', 'diffusers', 'latentstore', 'cli'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
