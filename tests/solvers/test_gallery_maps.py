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


def _bayes(alpha_bar, prompt, gallery, queries, references):
    """log N(g; a o, s) from the covariance itself: no shared code, no eigenvalue trick beyond eigh."""
    mu = gallery.mean(axis=0)
    cov = np.cov(gallery.T, bias=True)
    c = 1 / np.sqrt(np.trace(cov) / len(cov))
    e, V = np.linalg.eigh(cov * c**2)
    e = np.maximum(e, 1e-4 * e.max())
    h = np.sqrt(alpha_bar) * e / (alpha_bar * e + 1 - alpha_bar)
    a = np.sqrt(alpha_bar) * h
    s = h**2 * (1 - alpha_bar) + e * (1 - alpha_bar) / (alpha_bar * e + 1 - alpha_bar)
    s = s + (1 - a) ** 2 * prompt**2 * e
    g, o = (queries - mu) * c @ V, (references - mu) * c @ V
    return -0.5 * (((g[:, None] - a * o[None]) ** 2) / s).sum(axis=2)


@pytest.mark.parametrize("n", [40, 300], ids=["span", "primal"])
@pytest.mark.parametrize("prompt", [0.0, 0.4])
@pytest.mark.parametrize("alpha_bar", [0.1, 0.7])
def test_bias_score_is_the_bayes_likelihood(rows, n, prompt, alpha_bar):
    gallery = rows[:n]
    _, g, _ = gaussian(D, 20, 1)
    queries = g.astype(np.float64)
    fitted = Analytic(alpha_bar, None, prompt, "bias").fit(PairData.from_gallery(gallery))
    assert fitted.rank == min(D, n - 1)
    p = fitted.projection()
    scores = p.queries(queries) @ p.references(gallery).T
    truth = _bayes(alpha_bar, prompt, gallery, queries, gallery)
    # Equal up to a constant for each query; float32 maps cost some eps32 of the score's terms.
    offset = scores - truth
    spread = np.ptp(offset, axis=1).max()
    assert spread < 1e-4 * np.ptp(truth, axis=1).min()
    assert (scores.argmax(axis=1) == truth.argmax(axis=1)).all()
    # The contrary: cosine is another ranking.
    cosine = p.with_score("cosine")
    other = cosine.queries(queries) @ cosine.references(gallery).T
    assert (np.argsort(other, axis=1) != np.argsort(truth, axis=1)).any()


def test_analytic_ignores_the_scale_of_latents_and_beats_the_controls():
    o, g, y = gaussian(D, 150, 2, extra=300)

    def score(projection, factor=1.0):
        return average_precision(
            projection.queries(g * factor), y, projection.references(o * factor), np.arange(len(o))
        ).map

    data = PairData.from_gallery(o)
    bayes = Analytic(0.3, None, score="bias").fit(data).projection()
    scaled = Analytic(0.3, None, score="bias").fit(PairData.from_gallery(o * 7)).projection()
    assert score(bayes) == pytest.approx(score(scaled, 7.0), abs=1e-3)
    others = controls(PairData.from_gallery(o), 32)
    assert score(bayes) > max(score(p) for p in others.values())


def test_analytic_ranks_are_nested_in_pca_order(rows):
    data = PairData.from_gallery(rows)
    wide, narrow = Analytic(rank=None).fit(data), Analytic(rank=9).fit(data)
    assert np.array_equal(wide.query_map[:, :9], narrow.query_map)
    assert subspace_angles(narrow.query_map, Pca(9).fit(data).query_map).max() < 1e-10


@pytest.mark.parametrize(
    "knobs", [{"alpha_bar": 0.0}, {"alpha_bar": 1.0}, {"prompt": -1.0}, {"score": "dot"}]
)
def test_analytic_refuses_bad_knobs(knobs):
    with pytest.raises(SolverUsageError):
        Analytic(**knobs)


def test_equal_rows_are_refused():
    with pytest.raises(SolverUsageError, match="equal"):
        Analytic(rank=4).fit(PairData.from_gallery(np.ones((10, D))))
    with pytest.raises(SolverUsageError, match="0 rows"):
        Centred().fit(PairData.from_gallery(np.ones((0, D))))


def test_controls_stand_beside_every_w(rows):
    data = PairData.from_gallery(rows)
    found = controls(data, 16)
    assert list(found) == [
        "raw",
        "centred",
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
