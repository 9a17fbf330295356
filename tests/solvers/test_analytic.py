import json
import re

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from solver_worlds import gaussian

from solvers.analytic import Analytic, transfer
from solvers.closed import PairData, Pca
from solvers.errors import SolverUsageError
from solvers.frequency import fit_frequency
from solvers.metrics import average_precision
from solvers.projection import Projection
from solvers.selection import controls

D = 64
SHAPE = (3, 4, 6)
SEVERAL = (0.05, 0.3, 0.3, 0.8)


@pytest.fixture(scope="module")
def rows():
    return gaussian(D, 300, 1)[0].astype(np.float64)


# --- one noise level ---------------------------------------------------------------------------------


def _bayes(strengths, prompt, gallery, queries, references):
    """log N(g; a o, s) from the covariance itself: no shared code, no eigenvalue trick beyond eigh."""
    mu = gallery.mean(axis=0)
    cov = np.cov(gallery.T, bias=True)
    c = 1 / np.sqrt(np.trace(cov) / len(cov))
    e, V = np.linalg.eigh(cov * c**2)
    e = np.maximum(e, 1e-4 * e.max())
    gains, variances = [], []
    for alpha_bar in strengths:
        h = np.sqrt(alpha_bar) * e / (alpha_bar * e + 1 - alpha_bar)
        a = np.sqrt(alpha_bar) * h
        s = h**2 * (1 - alpha_bar) + e * (1 - alpha_bar) / (alpha_bar * e + 1 - alpha_bar)
        gains.append(a)
        variances.append(s + (1 - a) ** 2 * prompt**2 * e)
    # The law of total variance, given o: the mean of the variances and the variance of the means.
    a = np.mean(gains, axis=0)
    s = np.mean(variances, axis=0) + np.var(gains, axis=0) * e
    g, o = (queries - mu) * c @ V, (references - mu) * c @ V
    return -0.5 * (((g[:, None] - a * o[None]) ** 2) / s).sum(axis=2)


@pytest.mark.parametrize("n", [40, 300], ids=["span", "primal"])
@pytest.mark.parametrize("prompt", [0.0, 0.4])
@pytest.mark.parametrize("alpha_bar", [0.1, 0.7, SEVERAL], ids=str)
def test_bias_score_is_the_bayes_likelihood(rows, n, prompt, alpha_bar):
    gallery = rows[:n]
    _, g, _ = gaussian(D, 20, 1)
    queries = g.astype(np.float64)
    fitted = Analytic(alpha_bar, None, prompt, "bias").fit(PairData.from_gallery(gallery))
    assert fitted.rank == min(D, n - 1)
    p = fitted.projection()
    scores = p.queries(queries) @ p.references(gallery).T
    truth = _bayes(np.atleast_1d(alpha_bar), prompt, gallery, queries, gallery)
    # Equal up to a constant for each query; float32 maps cost some eps32 of the score's terms.
    offset = scores - truth
    spread = np.ptp(offset, axis=1).max()
    assert spread < 1e-4 * np.ptp(truth, axis=1).min()
    assert (scores.argmax(axis=1) == truth.argmax(axis=1)).all()
    # The contrary: cosine is another ranking.
    cosine = p.with_score("cosine")
    other = cosine.queries(queries) @ cosine.references(gallery).T
    assert (np.argsort(other, axis=1) != np.argsort(truth, axis=1)).any()


def test_it_ignores_the_scale_of_latents_and_beats_the_controls():
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


@pytest.mark.parametrize(
    "knobs", [{}, {"alpha_bar": SEVERAL, "prompt": 3.0}, {"latent_shape": (4, 4, 4)}], ids=str
)
def test_ranks_are_nested_in_pca_order(rows, knobs):
    data = PairData.from_gallery(rows)
    wide, narrow = Analytic(rank=None, **knobs).fit(data), Analytic(rank=9, **knobs).fit(data)
    assert np.array_equal(wide.query_map[:, :9], narrow.query_map)
    assert (np.diff(wide.spectrum) <= 0).all()
    if "latent_shape" not in knobs:
        assert subspace_angles(narrow.query_map, Pca(9).fit(data).query_map).max() < 1e-10


def test_small_eigenvalues_count_as_a_ten_thousandth_of_the_largest():
    x = np.random.default_rng(0).standard_normal((200, 8)) * np.array([1, 1, 1, 1, 0.1, 1e-3, 1e-4, 1e-5])
    fitted = Analytic(0.1, None).fit(PairData.from_gallery(x))
    weights = np.linalg.norm(fitted.query_map, axis=0)
    assert fitted.rank == 8
    assert np.ptp(weights[5:]) < 1e-12 * weights[5]
    assert weights[5] > 9 * weights[4]


@pytest.mark.parametrize("prompt", [0.0, 3.0])
@pytest.mark.parametrize("alpha_bar", [0.3, (0.001, 0.3), (0.1, 0.5, 0.9)])
def test_a_larger_component_always_tells_more(alpha_bar, prompt):
    e = np.geomspace(1e3, 1e-4, 200)
    a, s = transfer(e, alpha_bar, prompt)
    assert (np.diff(a**2 * e / s) < 0).all()


@pytest.mark.parametrize(
    "knobs",
    [
        {"alpha_bar": 0.0},
        {"alpha_bar": 1.0},
        {"alpha_bar": float("nan")},
        {"alpha_bar": ()},
        {"alpha_bar": (0.1, 1.0)},
        {"prompt": -1.0},
        {"score": "dot"},
    ],
    ids=str,
)
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(SolverUsageError, match=re.escape(str(next(iter(knobs.values()))))):
        Analytic(**knobs)


# --- several at once, and the prompt: against the diffusion itself, step by step ------------------------


def _diffuse(rng, o, e, alpha_bar, prompt):
    """Noise o to z_t, then draw z_0 from p(z_0 | z_t) under a prior whose mean the prompt has moved."""
    z = np.sqrt(alpha_bar) * o + np.sqrt(1 - alpha_bar) * rng.standard_normal(o.shape)
    moved = prompt * np.sqrt(e) * rng.standard_normal(o.shape)
    precision = 1 / e + alpha_bar / (1 - alpha_bar)  # of the posterior: the prior's and z_t's add up
    mean = (moved / e + np.sqrt(alpha_bar) * z / (1 - alpha_bar)) / precision
    return mean + rng.standard_normal(o.shape) / np.sqrt(precision)


@pytest.mark.parametrize("prompt", [0.0, 0.8])
@pytest.mark.parametrize("alpha_bar", [0.2, (0.05, 0.3, 0.9)], ids=["one", "several"])
def test_the_moments_are_those_of_the_diffusion(alpha_bar, prompt):
    rng = np.random.default_rng(1)
    e = np.array([9.0, 2.0, 0.5, 0.02])
    n = 200_000
    strengths = rng.choice(np.atleast_1d(alpha_bar), size=(n, 1))
    o = rng.standard_normal((n, len(e))) * np.sqrt(e)
    g = _diffuse(rng, o, e, strengths, prompt)
    a, s = transfer(e, alpha_bar, prompt)
    # Five standard errors: of a regression slope, and of a variance (fourth moments stay below 4 s^2).
    slope = (g * o).mean(axis=0) / (o**2).mean(axis=0)
    slope_error = ((g - a * o) * o / e).std(axis=0) / np.sqrt(n)
    assert (np.abs(slope - a) < 5 * slope_error).all()
    residual = (g - a * o) ** 2
    assert (np.abs(residual.mean(axis=0) - s) < 5 * residual.std(axis=0) / np.sqrt(n)).all()
    # The contrary: no single strength of several has these moments, nor has a prompt that stays put.
    wrong = [transfer(e, x, prompt)[1] for x in np.atleast_1d(alpha_bar)] if np.ndim(alpha_bar) else []
    wrong += [transfer(e, alpha_bar, 0.0)[1]] if prompt else []
    for other in wrong:
        assert (np.abs(residual.mean(axis=0) - other) > 5 * residual.std(axis=0) / np.sqrt(n)).any()


def test_no_linear_gaussian_model_fits_the_mixture_better():
    rng = np.random.default_rng(2)
    e = np.array([4.0, 1.0, 0.1])
    several = (0.05, 0.5)
    o = rng.standard_normal((200_000, 3)) * np.sqrt(e)
    g = _diffuse(rng, o, e, rng.choice(several, size=(len(o), 1)), 0.0)

    def fit(a, s):
        return -0.5 * ((g - a * o) ** 2 / s + np.log(s)).mean(axis=0)

    a, s = transfer(e, several)
    best = fit(a, s)
    # Steps of a tenth change the likelihood to second order, thirty times what the sample's moments do.
    for da, ds in [(1.1, 1), (0.9, 1), (1, 1.1), (1, 0.9)]:
        assert fit(a * da, s * ds).sum() < best.sum()
    for single in several:
        assert fit(*transfer(e, single)).sum() < best.sum()


def test_several_equal_values_are_one_and_a_list_is_a_tuple(rows):
    data = PairData.from_gallery(rows)
    one, same = Analytic(0.2, None).fit(data), Analytic((0.2, 0.2, 0.2), None).fit(data)
    np.testing.assert_allclose(same.query_map, one.query_map, rtol=1e-12)
    twice, once = Analytic((0.1, 0.1, 0.7), None).fit(data), Analytic((0.1, 0.7), None).fit(data)
    assert np.abs(twice.reference_map - once.reference_map).max() > 1e-3
    assert Analytic([0.1, 0.7]) == Analytic((0.1, 0.7))


def test_knobs_survive_a_file(rows, tmp_path):
    method = Analytic((0.1, 0.7), 8, latent_shape=(4, 4, 4))
    method.fit(PairData.from_gallery(rows)).projection().save(tmp_path / "W.safetensors")
    knobs = Projection.load(tmp_path / "W.safetensors").knobs
    assert Analytic(**knobs) == method
    assert json.loads(json.dumps(knobs))["latent_shape"] == [4, 4, 4]


# --- the prior that is the same everywhere in the picture -----------------------------------------------


def _cosines(size):
    """Orthonormal DCT-II written out: rows are frequencies."""
    k, x = np.arange(size)[:, None], np.arange(size)[None]
    basis = np.sqrt(2 / size) * np.cos(np.pi * k * (2 * x + 1) / (2 * size))
    basis[0] /= np.sqrt(2)
    return basis


def _transform(shape):
    return np.kron(np.eye(shape[0]), np.kron(_cosines(shape[1]), _cosines(shape[2])))


def _stationary(n, seed=0):
    """Rows of a world whose covariance links only the channels of one frequency, and that covariance."""
    c, h, w = SHAPE
    rng = np.random.default_rng(seed)
    T = _transform(SHAPE)
    cov = np.zeros((c, h * w, c, h * w))
    for i in range(h * w):
        mix = rng.standard_normal((c, c)) / (1.0 + i) ** 0.3
        cov[:, i, :, i] = mix @ mix.T
    cov = T.T @ cov.reshape(len(T), -1) @ T
    return rng.standard_normal((n, len(T))) @ np.linalg.cholesky(cov).T + 2.0, cov


def _dense(spectrum):
    V = spectrum.leading(spectrum.rank)
    return (V * spectrum.values) @ V.T


@pytest.mark.parametrize("block", [7, 40])
def test_it_is_the_sample_covariance_with_other_frequencies_struck_out(block):
    x, _ = _stationary(40)
    fitted = fit_frequency((x[i : i + block] for i in range(0, 40, block)), SHAPE, 40)
    T = _transform(SHAPE)
    same = np.kron(np.ones((SHAPE[0], SHAPE[0])), np.eye(SHAPE[1] * SHAPE[2]))
    expected = T.T @ ((T @ np.cov(x.T, bias=True) @ T.T) * same) @ T
    assert np.abs(_dense(fitted) - expected).max() < 1e-12 * np.abs(expected).max() * len(T)
    np.testing.assert_allclose(fitted.mean, x.mean(axis=0), rtol=1e-12)
    V = fitted.leading(fitted.rank)
    assert fitted.rank == fitted.dim == len(T)
    assert np.abs(V.T @ V - np.eye(len(T))).max() < 1e-13 * len(T)
    assert np.trace(expected) == pytest.approx(fitted.total, rel=1e-12)
    assert (fitted.channels.max(axis=1) >= -fitted.channels.min(axis=1)).all()


def test_digits_survive_rows_far_from_zero():
    x, _ = _stationary(40)
    near, far = fit_frequency([x], SHAPE, 40), fit_frequency([x[:9] + 1e6, x[9:] + 1e6], SHAPE, 40)
    # The rows themselves lose eps64 * 1e6 = 2e-10; raw second moments would lose 1e12 * eps64 = 2e-4.
    np.testing.assert_allclose(far.values[:20], near.values[:20], rtol=1e-8)


def _error(estimate, truth):
    return np.linalg.norm(estimate - truth) / np.linalg.norm(truth)


def test_few_rows_settle_it_where_the_world_is_stationary_and_many_mislead_it_elsewhere():
    x, cov = _stationary(20)
    assert _error(_dense(fit_frequency([x], SHAPE, 20)), cov) < 0.6 * _error(np.cov(x.T, bias=True), cov)
    # The contrary: variation that sits in one place, many rows.
    scale = np.ones(len(cov))
    scale[: len(cov) // 4] = 5.0
    y = np.random.default_rng(0).standard_normal((4000, len(cov))) * scale
    truth = np.diag(scale**2)
    assert _error(_dense(fit_frequency([y], SHAPE, 4000)), truth) > 3 * _error(np.cov(y.T, bias=True), truth)


def test_it_needs_no_square_matrix():
    # 16,384 dimensions, whose covariance would take 2.1 GB.
    x = np.random.default_rng(0).standard_normal((3, 16384))
    fitted = Analytic(rank=5, latent_shape=(16, 32, 32)).fit(PairData.from_gallery(x))
    assert fitted.query_map.shape == (16384, 5)
    assert fitted.report["path"] == "frequency"
    assert fitted.report["effective_rank"] == 5
    # Two of 16 channels' directions at each frequency: three rows have no more, less their mean.
    assert len(fitted.spectrum) == 2 * 32 * 32


def test_what_it_cannot_do_is_said(rows):
    data = PairData.from_gallery(rows)
    for shape in [(4, 4, 5), (64, 1), (-4, -4, 4)]:
        with pytest.raises(SolverUsageError, match="64 values cannot have the shape"):
            Analytic(latent_shape=shape, rank=4).fit(data)
    with pytest.raises(SolverUsageError, match="rank must lie"):
        Analytic(latent_shape=(4, 4, 4), rank=65).fit(data)
    with pytest.raises(SolverUsageError, match="at least 1 row"):
        fit_frequency([], (4, 4, 4), 0)
    with pytest.raises(SolverUsageError, match="announced"):
        fit_frequency([rows[:9]], (4, 4, 4), 10)
    with pytest.raises(SolverUsageError, match="not finite"):
        fit_frequency([np.full((2, D), np.nan)], (4, 4, 4), 2)
    short = Analytic(latent_shape=(4, 4, 4), rank=64).fit(PairData.from_gallery(rows[:2]))
    assert "Rank 64 was asked for; 16 is all there is." in short.report["statement"]


@pytest.mark.parametrize("shape", [None, (4, 4, 4)], ids=["sample", "frequency"])
def test_equal_rows_are_refused(shape):
    with pytest.raises(SolverUsageError, match="equal"):
        Analytic(rank=4, latent_shape=shape).fit(PairData.from_gallery(np.ones((10, D))))
