"""Each map from the same moments, against an implementation that shares no code with it."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigh, orthogonal_procrustes, subspace_angles
from scipy.stats import multivariate_normal
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge
from solver_worlds import gaussian, orthonormal

from solvers.closed import (
    Analytic,
    Cca,
    GeneralisedNull,
    Kissme,
    NormWeighted,
    PairData,
    Plda,
    Procrustes,
    Regression,
)
from solvers.errors import NoPairsError, SolverUsageError
from solvers.invariant import invariant
from solvers.metric import leading_svd
from solvers.metrics import average_precision, paired_bootstrap
from solvers.moments import Moments

D, N = 24, 400
EPS32 = float(np.finfo(np.float32).eps)
JOINT = [Plda, Cca, Regression]
ALL = [*JOINT, Procrustes, Kissme]


@pytest.fixture(scope="module")
def pairs():
    """Pairs whose sides have means, spectra and orientations of their own, float64."""
    rng = np.random.default_rng(3)
    o = rng.standard_normal((N, D)) * np.linspace(2, 0.4, D) @ orthonormal(rng, D, D) + 1.5
    turn = np.eye(D) + 0.15 * rng.standard_normal((D, D))
    return o, 0.7 * o @ turn + rng.standard_normal((N, D)) * np.linspace(0.3, 0.8, D) - 0.5


@pytest.fixture(scope="module")
def data(pairs):
    return PairData.from_arrays(*pairs)


def covariances(o, g):
    both = np.cov(np.hstack([o, g]).T, bias=True)
    return both[:D, :D], both[:D, D:], both[D:, D:]


def ridged(cov, lam):
    return cov + lam * np.trace(cov) / len(cov) * np.eye(len(cov))


def scores(fitted, q, r):
    p = fitted.projection()
    return p.queries(q) @ p.references(r).T


def assert_same_ranking(found, truth):
    """Equal up to a constant of each query; maps are kept in float32."""
    spread = np.ptp(found - truth, axis=1).max()
    assert spread < 200 * EPS32 * np.abs(truth).max(), spread


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_plda_is_the_log_likelihood_ratio_of_one_identity_against_two(pairs, data, lam):
    o, g = pairs
    oo, og, gg = covariances(o, g)
    within = np.cov((g - o).T, bias=True) / 2
    between = (oo + gg) / 2 - within
    assert np.abs(between - (og + og.T) / 2).max() < 1e-12
    # Indefinite in general, from a sample; the model keeps what an identity can have.
    within = ridged(within, lam)
    values, vectors = eigh(between, within)
    between = within @ (vectors * np.maximum(values, 0)) @ vectors.T @ within
    q, r = g[:9] - g.mean(axis=0), o[:30] - o.mean(axis=0)
    one = multivariate_normal(
        np.zeros(2 * D), np.block([[between + within, between], [between, between + within]])
    )
    alone = multivariate_normal(np.zeros(D), between + within)
    truth = np.array([[one.logpdf(np.r_[a, b]) - alone.logpdf(a) - alone.logpdf(b) for b in r] for a in q])
    fitted = Plda(None, lam).fit(data)
    assert_same_ranking(scores(fitted, g[:9], o[:30]), truth)
    assert np.allclose(fitted.spectrum, np.sort(values[values > 0])[::-1])


def test_cca_is_scikit_learns(pairs, data):
    o, g = pairs
    k = 3
    theirs = CCA(k, scale=False, max_iter=5000, tol=1e-12).fit(o, g)
    fitted = Cca(k, 0.0).fit(data)
    x, y = theirs.transform(o, g)
    theirs_rho = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(k)]
    # Its power iterations stop early where correlations are close: vectors to 1e-3, values to the square.
    assert fitted.spectrum == pytest.approx(theirs_rho, abs=1e-6)
    assert subspace_angles(fitted.reference_map, theirs.x_rotations_).max() < 1e-3
    assert subspace_angles(fitted.query_map, theirs.y_rotations_).max() < 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_cca_solves_the_block_pencil(pairs, data, lam):
    oo, og, gg = covariances(*pairs)
    zero = np.zeros((D, D))
    values, vectors = eigh(
        np.block([[zero, og], [og.T, zero]]), np.block([[ridged(oo, lam), zero], [zero, ridged(gg, lam)]])
    )
    fitted = Cca(5, lam).fit(data)
    assert np.allclose(fitted.spectrum, values[::-1][:5], atol=1e-10)
    assert subspace_angles(fitted.reference_map, vectors[:D, ::-1][:, :5]).max() < 1e-6
    assert subspace_angles(fitted.query_map, vectors[D:, ::-1][:, :5]).max() < 1e-6
    # The weights of the Bayes score: var of a side's canonical coordinate under its ridged covariance.
    rho = fitted.spectrum
    for W, cov, weight in ((fitted.query_map, gg, 1), (fitted.reference_map, oo, rho)):
        found = np.diag(W.T @ ridged(cov, lam) @ W)
        assert np.allclose(found, weight**2 / (1 - rho**2))


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_regression_is_the_likelihood_of_a_ridge_regression(pairs, data, lam):
    o, g = pairs
    oo, og, gg = covariances(o, g)
    ridge = Ridge(alpha=N * lam * np.trace(oo) / D, solver="svd").fit(o, g)
    noise = multivariate_normal(np.zeros(D), ridged(gg - ridge.coef_ @ og, lam))
    truth = np.array([noise.logpdf(row - ridge.predict(o[:30])) for row in g[:9]])
    assert_same_ranking(scores(Regression(None, lam).fit(data), g[:9], o[:30]), truth)


def test_regression_is_cca_where_their_ridges_are_equal(pairs, data):
    o, g = pairs
    for rank in (None, 5):
        found = [scores(m(rank, 0.0, "bias").fit(data), g[:9], o[:30]) for m in (Regression, Cca)]
        assert_same_ranking(*found)
    # The opposite: a ridge of the noise is not a ridge of the translations.
    apart = [scores(m(None, 1.0, "bias").fit(data), g[:9], o[:30]) for m in (Regression, Cca)]
    assert np.ptp(apart[0] - apart[1], axis=1).min() > 0.1


def test_procrustes_is_scipys_rotation(pairs, data):
    o, g = (x - x.mean(axis=0) for x in pairs)
    rotation, _ = orthogonal_procrustes(g, o)
    fitted = Procrustes(None).fit(data)
    assert np.abs(fitted.query_map @ fitted.reference_map.T - rotation).max() < 1e-10
    truth = (g[:9] @ rotation) @ o[:30].T
    truth /= np.linalg.norm(o[:30], axis=1) * np.linalg.norm(g[:9], axis=1)[:, None]
    assert np.abs(scores(fitted, pairs[1][:9], pairs[0][:30]) - truth).max() < 50 * EPS32


def test_the_short_way_to_singular_vectors_is_as_good_down_to_its_floor():
    rng = np.random.default_rng(0)
    U, V = orthonormal(rng, 60, 60), orthonormal(rng, 60, 60)
    for last in (3e-4, 1e-9):  # by the Gram, and where the Gram could not tell
        a = (U * np.geomspace(1, last, 60)) @ V.T
        left, sigma, right = leading_svd(a, 20)
        truth = np.linalg.svd(a)
        assert np.abs(sigma / truth[1][:20] - 1).max() < 1e-7
        assert np.abs(left @ right.T - truth[0][:, :20] @ truth[2][:20]).max() < 1e-6
        assert np.abs(left.T @ left - np.eye(20)).max() < 1e-6


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_kissme_ranks_by_its_mahalanobis_distance(pairs, data, lam):
    o, g = pairs
    T = g - o
    strangers = (g[:, None] - o[None]).reshape(-1, D)
    same, other = T.T @ T / N, strangers.T @ strangers / len(strangers)
    added = lam * np.trace(same) / D * np.eye(D)
    M = np.linalg.inv(same + added) - np.linalg.inv(other + added)
    values, vectors = np.linalg.eigh(M)
    M = (vectors * np.maximum(values, 0)) @ vectors.T
    fitted = Kissme(None, lam).fit(data)
    assert np.abs(fitted.query_map @ fitted.query_map.T - M).max() < 1e-9 * np.abs(M).max()
    t = g[:9, None] - o[None, :30]
    assert_same_ranking(scores(fitted, g[:9], o[:30]), -0.5 * np.einsum("qrd,de,qre->qr", t, M, t))


def test_norm_weighted_divides_by_the_norm_that_bayes_would_take(pairs):
    o, g = pairs
    fitted = NormWeighted(0.3).fit(PairData.from_gallery(o))
    cov = np.cov(o.T, bias=True)
    e, V = np.linalg.eigh(cov * D / np.trace(cov))
    a = 0.3 * e / (0.3 * e + 0.7)
    norm = (((o - o.mean(axis=0)) @ V) ** 2 * a**2 / (e * (1 - a**2))).sum(axis=1) ** 0.5
    truth = (g - o.mean(axis=0)) @ ((o - o.mean(axis=0)) / norm[:, None]).T
    found = scores(fitted, g, o)
    ratio = found / truth  # one positive factor for each query
    assert np.abs(ratio / ratio[:, :1] - 1).max() < 1e-2
    assert (ratio > 0).all()
    assert (found.argmax(axis=1) == truth.argmax(axis=1)).all()
    with pytest.raises(SolverUsageError, match="no meaning"):
        fitted.projection().with_score("bias")


@pytest.mark.parametrize("method", ALL)
def test_fewer_rows_than_dimensions_give_the_same_map_by_the_span(method):
    rng = np.random.default_rng(1)
    o = rng.standard_normal((9, D)) + 0.5
    g = 0.8 * o + 0.4 * rng.standard_normal((9, D))
    span = PairData.from_arrays(o, g)
    assert span.moments.basis is not None
    whole = Moments(D)
    whole.update(o, g)
    primal = PairData(D, 9, 9, 9, None, lambda: [(o, g)], lambda: [o], moments_source=lambda: whole)
    few, all_ = (method(6).fit(d) for d in (span, primal))
    assert (few.report["path"], all_.report["path"]) == ("span", "primal")
    queries = rng.standard_normal((5, D))
    a, b = (scores(f, queries, o) for f in (few, all_))
    assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()


@pytest.mark.parametrize("method", ALL)
def test_torch_tensors_give_the_same_maps(pairs, data, method):
    same = method(7).fit(PairData.from_arrays(*(torch.from_numpy(x) for x in pairs)))
    assert_same_maps(same, method(7).fit(data))


@pytest.mark.parametrize("method", ALL)
def test_cupy_arrays_give_the_same_maps(pairs, data, method):
    cupy = pytest.importorskip("cupy")
    same = method(7).fit(PairData.from_arrays(*(cupy.asarray(x) for x in pairs)))
    assert_same_maps(same, method(7).fit(data))


def assert_same_maps(a, b):
    for name in ("query_map", "reference_map", "center", "query_center"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            # Two LAPACKs in float64, whose gaps between eigenvalues are some hundredths of the largest.
            assert np.abs(x - y).max() < 1e-9 * np.abs(y).max()


@pytest.mark.parametrize("method", ALL)
def test_what_cannot_be_learned_from_is_named(pairs, method):
    o, g = pairs
    with pytest.raises(NoPairsError, match=method.name):
        method(4).fit(PairData.from_gallery(o))
    with pytest.raises(SolverUsageError, match="do not vary"):
        method(4).fit(PairData.from_arrays(o[:1], g[:1]))
    with pytest.raises(SolverUsageError, match="differences are zero"):
        method(4).fit(PairData.from_arrays(o, o))
    with pytest.raises(SolverUsageError, match="rank"):
        method(D + 1).fit(PairData.from_arrays(o, g))


@pytest.mark.parametrize("method", [*JOINT, Kissme])
def test_constant_dimensions_need_a_ridge_and_say_so(pairs, method):
    o, g = (x.copy() for x in pairs)
    o[:, 5] = g[:, 5] = 2.0
    data = PairData.from_arrays(o, g)
    fitted = method(None, 0.1).fit(data)
    assert np.isfinite(fitted.query_map).all()
    assert np.abs(fitted.query_map[5]).max() < 1e-6 * np.abs(fitted.query_map).max()
    if method in JOINT:
        with pytest.raises(SolverUsageError, match="ridge"):
            method(None, 0.0).fit(data)


@pytest.mark.parametrize("knobs", [{"lam": -1.0}, {"lam": float("nan")}, {"score": "dot"}])
@pytest.mark.parametrize("method", [*JOINT, Kissme])
def test_bad_knobs_are_refused(method, knobs):
    with pytest.raises(SolverUsageError):
        method(**knobs)


def test_a_rank_above_what_is_there_keeps_what_is_there():
    o, g, _ = gaussian(D, 8, 1)
    fitted = Procrustes(20).fit(PairData.from_arrays(o, g))
    assert fitted.rank == fitted.report["effective_rank"] == 7
    assert "Rank 20 was asked for" in fitted.report["statement"]


# Covariances that are the same everywhere in the picture.

SHAPE = (2, 6, 6)
SIDE = int(np.prod(SHAPE))


def test_the_invariant_covariance_is_the_nearest_and_stays_a_covariance():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((30, 2 * SIDE)) @ rng.standard_normal((2 * SIDE, 2 * SIDE))
    both = x.T @ x / 30
    oo, og, gg = (
        invariant(part, SHAPE) for part in (both[:SIDE, :SIDE], both[:SIDE, SIDE:], both[SIDE:, SIDE:])
    )
    # A projection: again it changes nothing, and what it took away is orthogonal to what it left.
    assert np.abs(invariant(og, SHAPE) - og).max() < 1e-10 * np.abs(og).max()
    assert abs(((both[:SIDE, SIDE:] - og) * og).sum()) < 1e-10 * (og**2).sum()
    joint = np.linalg.eigvalsh(np.block([[oo, og], [og.T, gg]]))
    assert joint.min() > -1e-12 * joint.max()
    assert np.trace(oo) == pytest.approx(np.trace(both[:SIDE, :SIDE]))
    with pytest.raises(SolverUsageError, match="cannot have the shape"):
        Plda(4, latent_shape=(3, 6, 6)).fit(PairData.from_arrays(x[:, :SIDE], x[:, SIDE:]))


def pictures_alike_everywhere():
    """Origins and translations whose covariances are the same everywhere in the picture."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((SIDE, SIDE))
    basis = np.linalg.eigh(invariant(x @ x.T, SHAPE))[1]
    e = (1.0 + np.arange(SIDE)) ** -1.0
    e *= SIDE / e.sum()
    a = 0.5 * e / (0.5 * e + 0.5)
    z = rng.standard_normal((1200, SIDE)) * np.sqrt(e)
    g = a * z + rng.standard_normal(z.shape) * np.sqrt(e * (1 - a**2))
    return z @ basis.T, g @ basis.T


def one_half_repainted():
    """Translations that keep the upper half of a picture, somewhat, and draw the lower one anew."""
    rng = np.random.default_rng(9)
    o, noise = rng.standard_normal((2, 1200, *SHAPE))
    keep = np.where(np.arange(SHAPE[1]) < SHAPE[1] // 2, 0.5, 0.0)[:, None]
    return o.reshape(1200, -1), (keep * o + (3 - 4 * keep) * noise).reshape(1200, -1)


@pytest.mark.parametrize("method", JOINT)
def test_few_pairs_gain_by_the_shape_and_many_lose_where_pictures_lack_it(method):
    names = np.arange(1200)

    def ap(n, shape, lam):
        p = method(None, lam, "bias", shape).fit(PairData.from_arrays(o[:n], g[:n])).projection()
        return average_precision(p.queries(g[800:]), names[800:], p.references(o), names).ap

    def gain(n):
        plain = max((ap(n, None, lam) for lam in (0.1, 1.0, 10.0)), key=np.mean)
        return paired_bootstrap(ap(n, SHAPE, 0.1), plain, names[800:])

    o, g = pictures_alike_everywhere()
    assert gain(40)[0] > 0.05
    o, g = one_half_repainted()
    assert gain(800)[1] < -0.05


def test_gnull_and_analytic_are_untouched_by_who_shares_the_moments(data):
    """Fitting others on the same data leaves its moments alone."""
    before = GeneralisedNull(5).fit(data).query_map
    for method in ALL:
        method(5).fit(data)
    assert np.array_equal(GeneralisedNull(5).fit(data).query_map, before)
    assert Analytic(0.3, 5).fit(data).rank == 5
