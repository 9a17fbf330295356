import numpy as np
import pytest
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from solver_worlds import gaussian

from solvers.closed import Analytic, Centred, Identity, PairData, Pca, RandomSubspace
from solvers.errors import SolverUsageError
from solvers.metrics import average_precision
from solvers.selection import choose, controls
from solvers.spectrum import fit_spectrum

D = 64


@pytest.fixture(scope="module")
def rows():
    return gaussian(D, 300, 1)[0].astype(np.float64)


@pytest.mark.parametrize("n", [40, 300], ids=["dual", "primal"])
def test_spectrum_is_the_covariance(rows, n):
    x = rows[:n] + 100.0  # far from zero: raw second moments would lose digits
    spectrum = fit_spectrum((x[i : i + 17] for i in range(0, n, 17)), D, n)
    rebuilt = (spectrum.vectors * spectrum.values) @ spectrum.vectors.T
    assert np.abs(rebuilt - np.cov(x.T, bias=True)).max() < 1e-10
    assert np.abs(spectrum.vectors.T @ spectrum.vectors - np.eye(spectrum.rank)).max() < 1e-12
    assert spectrum.rank == min(n - 1, D)
    pivots = spectrum.vectors[np.abs(spectrum.vectors).argmax(axis=0), np.arange(spectrum.rank)]
    assert (pivots > 0).all()


def test_blocks_that_change_are_refused(rows):
    with pytest.raises(SolverUsageError, match="announced"):
        fit_spectrum([rows[:30]], D, 31)
    with pytest.raises(SolverUsageError, match="announced"):
        fit_spectrum([rows[:100]], D, 99)


@pytest.mark.parametrize("n", [40, 300])
def test_full_whitening_agrees_with_scikit_learn(rows, n):
    x = rows[:n]
    ours = Pca(10, 0.5).fit(PairData.from_gallery(x)).projection().coordinates(rows)
    theirs = PCA(10, whiten=True, svd_solver="full").fit(x).transform(rows)
    # scikit-learn divides the covariance by n - 1; signs are free; float32 maps cost a few eps32.
    scale = np.sqrt(n / (n - 1))
    assert np.abs(np.abs(ours) - scale * np.abs(theirs)).max() < 2e-5


def test_exponents_weigh_the_same_directions(rows):
    data = PairData.from_gallery(rows)
    quarter, half = Pca(10, 0.25).fit(data), Pca(10, 0.5).fit(data)
    ratio = quarter.query_map / half.query_map
    assert np.allclose(ratio, quarter.spectrum[:10] ** 0.25)
    assert Pca(60, 0.5).fit(PairData.from_gallery(rows[:20])).rank == 19


def test_random_subspace_is_orthonormal_nested_and_seeded(rows):
    data = PairData.from_gallery(rows)
    W = RandomSubspace(20, 1).fit(data).query_map
    assert np.abs(W.T @ W - np.eye(20)).max() < 1e-12
    assert np.abs(RandomSubspace(5, 1).fit(data).query_map - W[:, :5]).max() < 1e-12
    assert subspace_angles(W, RandomSubspace(20, 2).fit(data).query_map).max() > 0.5


def test_equal_rows_are_refused():
    with pytest.raises(SolverUsageError, match="equal"):
        Pca(4).fit(PairData.from_gallery(np.ones((10, D))))
    with pytest.raises(SolverUsageError, match="0 rows"):
        Centred().fit(PairData.from_gallery(np.ones((0, D))))


def test_controls_stand_beside_every_w(rows):
    data = PairData.from_gallery(rows)
    found = controls(data, 16)
    assert list(found) == [
        "raw",
        "centred",
        "norm-weighted",
        "PCA-whitened ¼",
        "PCA-whitened ¼, all",
        "PCA-whitened ½",
        "PCA-whitened ½, all",
        "random subspace",
    ]
    x = rows.astype(np.float32)
    assert np.allclose(found["raw"](x), Identity().fit(data).projection()(x))
    assert np.allclose(found["centred"](x), Centred().fit(data).projection()(x))
    assert np.allclose(found["PCA-whitened ¼"](x), Pca(16, 0.25).fit(data).projection()(x), atol=1e-6)
    assert found["PCA-whitened ½, all"].rank == D


def test_choose_takes_the_best_and_the_earlier_of_equals():
    o, g, y = gaussian(D, 100, 2)
    data = PairData.from_gallery(o)
    candidates = [RandomSubspace(4).fit(data).projection()]
    candidates += [Analytic(0.3, None).fit(data).projection()] * 2
    index, table = choose(
        candidates, lambda p: average_precision(p.queries(g), y, p.references(o), np.arange(len(o)))
    )
    assert index == 1
    assert table[1]["map"] > table[0]["map"]
    assert table[1]["method"] == "analytic"
    with pytest.raises(SolverUsageError, match="0 candidates"):
        choose([], lambda p: None)
