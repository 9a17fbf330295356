"""Methods with other names: equal to one that is there, by a theorem."""

import numpy as np
import pytest
from scipy.linalg import sqrtm, subspace_angles
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from solver_worlds import gaussian

from solvers.closed import GeneralisedNull, PairData, Plda
from solvers.errors import SolverUsageError
from solvers.methods import ALIASES, METHODS, get

D, N = 24, 300


@pytest.fixture(scope="module")
def pairs():
    o, g, _ = gaussian(D, N, 1, alpha_bar=0.5)
    return o.astype(float), g.astype(float)


@pytest.mark.parametrize("lam", [0.1, 10.0])
def test_at_full_rank_gnull_is_wccn_and_rca(pairs, lam):
    """Both whiten by the within-class covariance; under the cosine only W W^T counts."""
    o, g = pairs
    # Its chunklets are an origin and a translation: centred on their own mean, +-t/2.
    chunks = np.stack([o, g])
    deviations = (chunks - chunks.mean(axis=0)).reshape(-1, D)
    within = deviations.T @ deviations / len(deviations)
    T = g - o
    second = T.T @ T / N
    assert np.abs(second / 4 - within).max() < 1e-12
    ridge = lam * np.trace(second) / D * np.eye(D)
    W = GeneralisedNull(D, lam).fit(PairData.from_arrays(o, g)).query_map
    inverse = np.linalg.inv(second + ridge)
    assert np.abs(W @ W.T - inverse).max() < 1e-10 * np.abs(inverse).max()
    # The opposite: at a lower rank it is not.
    W = W[:, : D // 2]
    assert np.abs(W @ W.T - inverse).max() > 0.1 * np.abs(inverse).max()


@pytest.mark.parametrize("lam", [0.1, 10.0])
def test_learned_whitening_is_gnull(pairs, lam):
    """Whitened by the pairs, then the principal components of the origins (Mikolajczyk and Matas 2007)."""
    o, g = pairs
    T = g - o
    second = T.T @ T / N
    whiten = np.linalg.inv(sqrtm(second + lam * np.trace(second) / D * np.eye(D)).real)
    components = np.linalg.eigh(np.cov((o @ whiten).T, bias=True))[1][:, ::-1]
    W = GeneralisedNull(9, lam).fit(PairData.from_arrays(o, g)).query_map
    theirs = (whiten @ components)[:, :9]
    # Signs are free; scales are not.
    assert np.abs(W * np.sign((W * theirs).sum(axis=0)) - theirs).max() < 1e-8 * np.abs(theirs).max()


def lda(o, g, k):
    classes = np.tile(np.arange(len(o)), 2)
    found = LinearDiscriminantAnalysis(solver="eigen", n_components=k).fit(np.concatenate([o, g]), classes)
    return found.scalings_[:, :k]


def test_lda_of_two_images_each_is_gnull_of_the_class_means(pairs):
    """Its within-class scatter is S_t / 4 and its between-class one cov((o + g) / 2), exactly."""
    o, g = pairs
    theirs = lda(o, g, 8)
    W = GeneralisedNull(8, 1e-12).fit(PairData.from_arrays(o, g, origins=(o + g) / 2)).query_map
    assert subspace_angles(W, theirs).max() < 1e-6
    # Normalised by S_t instead of S_t / 4: half the length.
    assert np.abs(np.abs(2 * W) - np.abs(theirs)).max() < 1e-6 * np.abs(theirs).max()


def test_lda_spans_what_plda_does(pairs):
    """S_b = S - S_t / 2 and LDA's S - S_t / 4 have one pencil with S_t, and so the same eigenvectors."""
    o, g = pairs
    o, g = o - o.mean(axis=0), g - g.mean(axis=0)  # LDA knows one mean, plda one for each side
    theirs = lda(o, g, 8)
    assert subspace_angles(Plda(8, 0.0).fit(PairData.from_arrays(o, g)).query_map, theirs).max() < 1e-6
    # gnull takes the origins' covariance alone: near where both sides vary alike, but a sample never does.
    angle = subspace_angles(GeneralisedNull(8, 1e-12).fit(PairData.from_arrays(o, g)).query_map, theirs).max()
    assert angle > 1e-3


@pytest.mark.parametrize("name", ["lda", "LDA", "wccn", "RCA", "learned whitening", "learned-whitening"])
def test_an_alias_names_the_method_that_equals_it(name):
    with pytest.raises(SolverUsageError, match="gnull") as refused:
        get(name)
    assert name in str(refused.value)
    assert not set(ALIASES) & set(METHODS)
