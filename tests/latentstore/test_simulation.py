"""The analytic diffusion: its law, and the store of pairs it writes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from store_worlds import data_files, make_store, rows_of, shard_facts, tree

from latentstore.errors import SpaceMismatchError, StoreIncompleteError, UsageError
from latentstore.schema import OK, STATUS_CODE
from latentstore.simulate import Diffusion, GaussianPrior, simulate, translate
from latentstore.store import open_store

D, R = 12, 5


@pytest.fixture(scope="module")
def prior():
    """Five eigenpairs of uneven size; the seven other directions share one eigenvalue."""
    rng = np.random.default_rng(1)
    vectors = np.linalg.qr(rng.standard_normal((D, R)))[0]
    return GaussianPrior(
        mean=rng.standard_normal(D),
        vectors=vectors,
        values=np.array([5.0, 2.0, 1.0, 0.3, 0.05]),
        rest=0.4,
        scale=2.5,
    )


def full_basis(prior):
    """All eigenvectors and eigenvalues of the prior, in units of its scale."""
    rest = np.linalg.svd(prior.vectors.T)[2][R:].T
    V = np.concatenate([prior.vectors, rest], axis=1)
    return V, np.concatenate([prior.values, np.full(D - R, prior.rest)])


def coordinates(g, prior, V):
    return (g - prior.mean) / np.sqrt(prior.scale) @ V


def draw(prior, diffusion, n=8_000, seed=3):
    """Translations of one origin, and the origin, in eigen-coordinates."""
    V, e = full_basis(prior)
    o = np.random.default_rng(seed).standard_normal(D) * 1.5
    latent = prior.mean + np.sqrt(prior.scale) * (V @ o)
    g = translate(np.tile(latent, (n, 1)), prior, diffusion, np.arange(n))
    return o, coordinates(g, prior, V), e


def assert_gaussian(x, mean, variance):
    """Compare mean, variances and correlations, each within 5 of its standard errors.

    A normal z-score passes 5 once in 1.7 million; there are about a hundred here, and the seed is fixed.
    """
    n = len(x)
    assert np.abs((x.mean(axis=0) - mean) / np.sqrt(variance / n)).max() < 5
    assert np.abs((x.var(axis=0, ddof=1) / variance - 1) / np.sqrt(2 / (n - 1))).max() < 5
    off = np.corrcoef(x.T)[~np.eye(x.shape[1], dtype=bool)]
    assert np.abs(off).max() * np.sqrt(n) < 5


@pytest.mark.parametrize("prompt", [0.0, 0.8])
@pytest.mark.parametrize("alpha_bar", [0.1, 0.6])
def test_a_sample_given_its_origin(prior, alpha_bar, prompt):
    o, g, e = draw(prior, Diffusion(alpha_bar=alpha_bar, prompt=prompt))
    a = alpha_bar * e / (alpha_bar * e + 1 - alpha_bar)
    assert_gaussian(g, a * o, e * (1 - a**2) + (1 - a) ** 2 * prompt**2 * e)


@pytest.mark.parametrize("alpha_bar", [0.1, 0.6])
def test_the_mean_is_lemma_1(prior, alpha_bar):
    o, g, e = draw(prior, Diffusion(alpha_bar=alpha_bar, prompt=0.0, mode="mean"))
    h = np.sqrt(alpha_bar) * e / (alpha_bar * e + 1 - alpha_bar)
    # E[z0 | zt] = h zt, and zt = sqrt(ab) o + sqrt(1 - ab) eps
    assert_gaussian(g, np.sqrt(alpha_bar) * h * o, h**2 * (1 - alpha_bar))


def test_the_mean_moves_with_the_origin_as_the_dense_formula_says(prior):
    rng = np.random.default_rng(4)
    V, e = full_basis(prior)
    diffusion = Diffusion(alpha_bar=0.3, prompt=0.5, mode="mean")
    x, y = rng.standard_normal((2, 40, D))
    rows = np.arange(40)
    moved = translate(x, prior, diffusion, rows) - translate(y, prior, diffusion, rows)
    sigma = V @ np.diag(e) @ V.T
    A = 0.3 * sigma @ np.linalg.inv(0.3 * sigma + 0.7 * np.eye(D))
    # The same noise cancels; float64 sums of a dozen products of numbers near one.
    np.testing.assert_allclose(moved, (x - y) @ A.T, atol=1e-12)


def test_origins_of_the_prior_keep_its_law(prior):
    """A draw of p(z0 | zt) for an origin of the prior is a draw of the prior."""
    V, e = full_basis(prior)
    z = np.random.default_rng(5).standard_normal((8_000, D)) * np.sqrt(e)
    latents = prior.mean + np.sqrt(prior.scale) * z @ V.T
    g = translate(latents, prior, Diffusion(alpha_bar=0.3, prompt=0.0), np.arange(8_000))
    assert_gaussian(coordinates(g, prior, V), 0, e)


@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_no_noise_gives_the_origin(prior, mode):
    o, g, _ = draw(prior, Diffusion(alpha_bar=1 - 1e-10, mode=mode), n=50)
    # What is left is of order sqrt(1 - alpha_bar) = 1e-5, four or five of them at most.
    assert np.abs(g - o).max() < 1e-4
    _, far, _ = draw(prior, Diffusion(alpha_bar=0.9, mode=mode), n=50)
    assert np.abs(far - o).max() > 0.1


def test_noise_belongs_to_the_row(prior):
    x = np.random.default_rng(6).standard_normal((30, D))
    rows = np.arange(1000, 1030)
    diffusion = Diffusion(seed=4)
    whole = translate(x, prior, diffusion, rows)
    order = np.random.default_rng(7).permutation(30)
    np.testing.assert_allclose(translate(x[order], prior, diffusion, rows[order]), whole[order], atol=1e-12)
    np.testing.assert_allclose(translate(x[9:10], prior, diffusion, rows[9:10]), whole[9:10], atol=1e-12)
    assert np.abs(translate(x, prior, diffusion, rows + 1) - whole).max(axis=1).min() > 0.1
    assert np.abs(translate(x, prior, Diffusion(seed=5), rows) - whole).max(axis=1).min() > 0.1


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_runs_of_neighbouring_seeds_are_independent(prior, distance):
    _, a, _ = draw(prior, Diffusion(seed=0, prompt=1.0), n=4000)
    _, b, _ = draw(prior, Diffusion(seed=distance, prompt=1.0), n=4000)
    a, b = (x - x.mean(axis=0) for x in (a, b))
    correlation = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    # Twelve coordinates of uneven weight count as at least 2.5: 5 standard errors of a correlation.
    assert abs(correlation) < 5 / np.sqrt(2.5 * 4000)


@pytest.mark.parametrize(
    "options", [{"alpha_bar": 0}, {"alpha_bar": 1}, {"alpha_bar": -1}, {"prompt": -0.1}, {"mode": "text"}]
)
def test_settings_are_checked(options):
    with pytest.raises(UsageError, match="--"):
        Diffusion(**options)


def test_a_prior_is_scaled_and_floored():
    vectors = np.eye(4)[:, :3]
    prior = GaussianPrior.from_spectrum(np.ones(4), np.array([8.0, 4.0, 0.0]), vectors)
    assert prior.scale == 3.0  # 12 over four directions
    np.testing.assert_allclose(prior.values, [8 / 3, 4 / 3, 8 / 3 * 1e-4])
    np.testing.assert_allclose(prior.rest, 8 / 3 * 1e-4)
    with pytest.raises(UsageError, match="do not vary"):
        GaussianPrior.from_spectrum(np.ones(4), np.zeros(3), vectors)


# --- the store of pairs ------------------------------------------------------------------------------


N = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    latents = np.random.default_rng(8).standard_normal((N, D)).astype(np.float16)
    status = np.full(N, OK, np.uint8)
    status[[5, 100]] = STATUS_CODE["unreadable"]
    role = np.array(["reference", "origin", "translation"])[np.arange(N) % 3]
    identity = [f"id{i // 3}" for i in range(N)]
    inputs = rows_of(N, role=role.tolist(), identity=identity)
    return make_store(tmp_path_factory.mktemp("source") / "s.zarr", latents, status=status, inputs=inputs)


def run(source, prior, out, *, per_origin=1, **options):
    return simulate(source, out, prior, Diffusion(**options), per_origin=per_origin)


@pytest.mark.parametrize("per_origin", [1, 3])
def test_pairs(source, prior, tmp_path, per_origin):
    store = run(source, prior, tmp_path / "o.zarr", per_origin=per_origin, seed=2)
    valid = [i for i in range(N) if i % 3 != 2 and i != 100]  # row 5 is a translation anyway
    each = 1 + per_origin
    assert len(store) == len(valid) * each
    assert (store.kind, store.space, store.todo()) == ("simulated", source.space, [])
    assert store.counts() == {"ok": len(store)}
    got = store.reader.read(0, len(store)).reshape(len(valid), each, D)
    origins = source.reader.gather(valid)
    assert np.ascontiguousarray(got[:, 0]).tobytes() == origins.tobytes()
    for k in range(1, each):
        rows = np.arange(len(valid)) * each + k
        expected = translate(origins, prior, Diffusion(seed=2), rows)
        np.testing.assert_allclose(got[:, k], expected.astype(np.float16), rtol=2.0**-10, atol=1e-6)
    for a in range(each):
        for b in range(a):
            assert np.abs(got[:, a].astype(float) - got[:, b]).max(axis=1).min() > 0.05

    table = store.manifest()
    own = source.manifest().take(valid)
    assert table["row"].to_pylist() == list(range(len(store)))
    for name in ("identity", "group", "split"):
        assert table[name].to_pylist() == np.repeat(own[name].to_pylist(), each).tolist()
    assert table["role"].to_pylist() == (["origin"] + ["translation"] * per_origin) * len(valid)
    assert table["source"].to_pylist() == (["file"] + ["simulated"] * per_origin) * len(valid)
    assert len(set(table["path"].to_pylist())) == len(store)
    assert set(table["model"].to_pylist()) == {"", Diffusion(seed=2).name}
    # No identity on two sides.
    sides = {}
    for identity, split in zip(table["identity"].to_pylist(), table["split"].to_pylist(), strict=True):
        assert sides.setdefault(identity, split) == split
    assert set(sides.values()) == {"train", "validation", "test"}


def test_the_seed_decides(source, prior, tmp_path):
    a, b, c = (run(source, prior, tmp_path / str(i), seed=s) for i, s in enumerate((1, 1, 2)))
    skip = {"zarr.json"}
    files = [{k: v for k, v in data_files(s.root).items() if k not in skip} for s in (a, b, c)]
    assert files[0] == files[1]
    assert files[0]["latents/c/0/0"] != files[2]["latents/c/0/0"]
    assert a.data_hash() == b.data_hash() != c.data_hash()


def test_a_lost_record_is_made_again_with_the_same_bytes(source, prior, tmp_path):
    store = run(source, prior, tmp_path / "o.zarr", per_origin=2)
    before, facts = data_files(store.root), shard_facts(store.root)
    assert len(facts) == 8
    for shard in (0, 3):
        (store.root / "done" / f"{shard:06d}.json").unlink()
    (store.root / "latents" / "c" / "3" / "0").unlink()
    run(source, prior, store.root, per_origin=2)
    assert data_files(store.root) == before
    now = shard_facts(store.root)
    assert {k for k in now if now[k] != facts[k]} == {"0", "3"}
    run(source, prior, store.root, per_origin=2)
    assert shard_facts(store.root) == now


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"alpha_bar": 0.3}, {"prompt": 0.1}, {"mode": "mean"}, {"per_origin": 2}]
)
def test_other_settings_are_refused(source, prior, tmp_path, options):
    store = run(source, prior, tmp_path / "o.zarr")
    before = tree(store.root)
    with pytest.raises(UsageError, match=next(iter(options))):
        run(source, prior, store.root, **options)
    assert tree(store.root) == before


def test_another_source_is_refused(source, prior, tmp_path):
    store = run(source, prior, tmp_path / "o.zarr")
    other = make_store(tmp_path / "s.zarr", np.ones((10, D), np.float16))
    with pytest.raises(UsageError, match="data_hash"):
        run(other, prior, store.root)
    narrow = make_store(tmp_path / "n.zarr", np.ones((10, D // 2), np.float16))
    with pytest.raises(SpaceMismatchError):
        run(narrow, prior, store.root)
    with pytest.raises(UsageError, match="other settings"):
        run(source, prior, source.root)  # a store of pictures is not written over


def test_what_cannot_be_simulated(prior, tmp_path):
    latents = np.ones((100, D), np.float16)
    half = make_store(tmp_path / "half.zarr", latents, only=(0,))
    with pytest.raises(StoreIncompleteError, match="1 of 2"):
        run(half, prior, tmp_path / "o.zarr")
    only = make_store(tmp_path / "t.zarr", latents, inputs=rows_of(100, role=["query"] * 100))
    with pytest.raises(UsageError, match="no valid origin"):
        run(only, prior, tmp_path / "o.zarr")
    whole = make_store(tmp_path / "w.zarr", latents)
    with pytest.raises(UsageError, match="--per-origin"):
        run(whole, prior, tmp_path / "o.zarr", per_origin=0)
    assert not (tmp_path / "o.zarr").exists()


def test_overflow_is_recorded(source, prior, tmp_path):
    huge = dataclasses.replace(prior, scale=1e12)
    store = run(source, huge, tmp_path / "o.zarr")
    counts = store.counts()
    assert counts["not_finite"] > 0
    status = np.array(store.manifest()["status"].to_pylist())
    np.testing.assert_array_equal(status == "ok", store.status() == OK)
    assert (status[::2] == "ok").all()  # origins are as they were
    assert not open_store(store.root).reader.read(0, len(store))[status != "ok"].any()
