from dataclasses import replace

import numpy as np
import pytest
import torch
from solver_worlds import gaussian, orthonormal

from solvers.errors import DivergedError, SolverUsageError
from solvers.metrics import average_precision
from solvers.projection import Projection
from solvers.sgd import ArraySource, CosFace, cosface_loss, preset_auto, preset_paper, train
from solvers.training import batches, schedule, start_weights

D = 96


def _numpy_loss_and_gradients(x, W, C, labels, scale, margin):
    """CosFace in float64 NumPy, gradients derived by hand through both normalisations."""
    y = x @ W
    y_norm, c_norm = (np.linalg.norm(a, axis=1, keepdims=True) for a in (y, C))
    u, v = y / y_norm, C / c_norm
    hot = np.eye(len(C))[labels]
    logits = scale * (u @ v.T - margin * hot)
    shifted = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    loss = -np.log(p[hot.astype(bool)]).mean()
    d_cos = scale * (p - hot) / len(x)
    d_u, d_v = d_cos @ v, d_cos.T @ u
    d_y = (d_u - u * (u * d_u).sum(axis=1, keepdims=True)) / y_norm
    d_c = (d_v - v * (v * d_v).sum(axis=1, keepdims=True)) / c_norm
    return loss, x.T @ d_y, d_c


@pytest.mark.parametrize(("scale", "margin"), [(64.0, 0.35), (8.0, 0.0)])
def test_loss_and_gradients_agree_with_numpy(scale, margin):
    rng = np.random.default_rng(0)
    x, W, C = rng.standard_normal((20, D)), rng.standard_normal((D, 10)), rng.standard_normal((7, 10))
    labels = rng.integers(7, size=20)
    loss, d_W, d_C = _numpy_loss_and_gradients(x, W, C, labels, scale, margin)
    tW, tC = (torch.tensor(a, requires_grad=True) for a in (W, C))
    value = cosface_loss(torch.tensor(x), tW, tC, torch.tensor(labels), scale, margin)
    value.backward()
    assert float(value.detach()) == pytest.approx(loss, rel=1e-6)
    assert np.abs(tW.grad.numpy() - d_W).max() < 1e-6 * np.abs(d_W).max()
    assert np.abs(tC.grad.numpy() - d_C).max() < 1e-6 * np.abs(d_C).max()


@pytest.fixture(scope="module")
def world():
    """Isotropic origins; translation shakes 30 planted directions hard and the rest a little."""
    n, held_out, extra, per = 400, 150, 300, 4
    rng = np.random.default_rng(0)
    shaken = orthonormal(rng, D, 30)
    o = rng.standard_normal((n + held_out + extra, D))
    y = np.repeat(np.arange(n + held_out), per)
    g = o[y] + 2.5 * rng.standard_normal((len(y), 30)) @ shaken.T + 0.5 * rng.standard_normal((len(y), D))
    fit = y < n
    rows = np.concatenate([o[:n], g[fit]]).astype(np.float32)
    source = ArraySource(rows, np.concatenate([np.arange(n), y[fit]]))

    def validate(W):
        p = Projection(W, W)
        return average_precision(p.queries(g[~fit]), y[~fit], p.references(o), np.arange(len(o))).map

    return source, validate, shaken


def _config(source, **knobs):
    cfg = preset_auto(400, len(source.labels), D, rank=48)
    return replace(cfg, steps=300, validate_every=100, lr=0.01, device="cpu", **knobs)


@pytest.mark.parametrize("weight_init", ["principal", "random"])
def test_a_planted_world_is_learned(world, weight_init):
    source, validate, shaken = world
    result = train(_config(source, weight_init=weight_init), source, validate=validate)
    assert result.best_map > result.start_map + 0.08
    assert validate(result.weights) == result.best_map
    assert result.history[-1]["loss"] < result.history[1]["loss"]
    start = start_weights(weight_init, _config(source), source, np.random.default_rng(0))

    def shaken_share(W):  # of W's energy lies in the directions that translation shakes
        return np.linalg.norm(shaken.T @ W) ** 2 / np.linalg.norm(W) ** 2

    assert shaken_share(result.weights) < 0.5 * shaken_share(start)


def test_shuffled_labels_teach_less_than_true_ones(world):
    source, validate, _ = world
    shuffled = ArraySource(source.rows, np.random.default_rng(0).permutation(source.labels))
    gains = []
    for data in (source, shuffled):
        result = train(_config(data, weight_init="principal"), data, validate=validate)
        gains.append(result.best_map - result.start_map)
    # Not zero: pushing any rows apart evens out the spectrum, and that takes no labels.
    assert gains[1] < 0.6 * gains[0]


def test_auto_starts_where_validation_is_better(world):
    source, validate, _ = world
    cfg = replace(_config(source, weight_init="auto"), steps=1)
    scores = {
        name: train(replace(cfg, weight_init=name), source, validate=validate).start_map
        for name in ("principal", "random")
    }
    chosen = train(cfg, source, validate=validate)
    assert chosen.weight_init == max(scores, key=scores.get) == "random"
    # With the roles exchanged, origins varying in few directions, the other start wins.
    o, g, y = gaussian(D, 200, 3)
    few = ArraySource(np.concatenate([o, g]), np.concatenate([np.arange(200), y]))

    def retrieve(W):
        p = Projection(W, W)
        return average_precision(p.queries(g), y, p.references(o), np.arange(200)).map

    assert train(cfg, few, validate=retrieve).weight_init == "principal"
    assert train(cfg, few).weight_init == "principal"


def test_the_start_is_kept_when_training_only_harms(world):
    source = world[0]
    scores = iter([0.9, 0.5, 0.4, 0.3])
    cfg = CosFace(rank=4, steps=30, validate_every=10, weight_init="principal", device="cpu")
    result = train(cfg, source, validate=lambda W: next(scores))
    start = start_weights("principal", cfg, source, np.random.default_rng(cfg.seed))
    assert (result.best_step, result.best_map, result.start_map) == (0, 0.9, 0.9)
    assert np.array_equal(result.weights, start)
    assert np.abs(start.T @ start - np.eye(4)).max() < 1e-6  # float32 columns
    top = np.linalg.svd(source.rows.astype(np.float64), full_matrices=False)[2][:4].T
    # Three rounds of subspace iteration hold nearly all the energy of the true singular vectors.
    energy = [np.linalg.norm(source.rows @ W) ** 2 for W in (start, top)]
    assert 0.95 * energy[1] < energy[0] < 1.001 * energy[1]


def test_a_seed_reproduces(world):
    source = world[0]
    cfg = CosFace(rank=8, steps=15, device="cpu")
    first, again, other = (train(replace(cfg, seed=s), source).weights for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_training_leaves_global_state_alone(world):
    before = (torch.get_rng_state(), torch.backends.cuda.matmul.allow_tf32)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    train(CosFace(rank=4, steps=3, device="cpu"), world[0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.backends.cuda.matmul.allow_tf32
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("classes", [2, 5, 50])
def test_few_identities_work(classes):
    o, g, y = gaussian(D, classes, 2)
    source = ArraySource(np.concatenate([o, g]), np.concatenate([np.arange(classes), y]))
    cfg = replace(preset_auto(classes, len(source.labels), D, rank=8), steps=20)
    seen = []
    fitted = cfg.fit(source, progress=lambda step, steps, loss: seen.append((step, steps)))
    assert np.isfinite(fitted.query_map).all()
    assert fitted.query_map.shape == (D, 8)
    assert seen == [(i, 20) for i in range(1, 21)]
    assert fitted.projection().method == "cosface"


def test_wrong_labels_are_refused(world):
    rows = world[0].rows[:6]
    for labels in (np.zeros(6, int), np.array([0, 0, 2, 2, 3, 3])):
        with pytest.raises(SolverUsageError):
            train(CosFace(rank=4, steps=1), ArraySource(rows, labels))
    with pytest.raises(SolverUsageError, match="rank"):
        train(CosFace(rank=D + 1, steps=1), world[0])
    for knobs in ({"lr": 0.0}, {"steps": 0}, {"warmup": 0.9, "flat": 0.1}, {"class_init": "x"}):
        with pytest.raises(SolverUsageError):
            CosFace(**knobs)


def test_divergence_is_named_and_keeps_the_last_good_w():
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((40, D)).astype(np.float32), np.arange(40) % 10

    class Spoiled(ArraySource):
        calls = 0

        def gather(self, indices):
            Spoiled.calls += 1
            block = super().gather(indices)
            return block * np.nan if Spoiled.calls > 8 else block

    cfg = CosFace(rank=4, steps=20, weight_init="random", class_init="random", device="cpu")
    with pytest.raises(DivergedError, match="step 9") as caught:
        train(cfg, Spoiled(rows, labels))
    assert caught.value.weights.shape == (D, 4)
    assert np.isfinite(caught.value.weights).all()


def test_batches_hold_p_identities_times_k_rows():
    labels = np.repeat(np.arange(10), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    cfg = CosFace(rank=1, batch_identities=4, per_identity=3)
    draws = batches(labels, 10, cfg, np.random.default_rng(0))
    seen = []
    for _ in range(10):
        rows = next(draws)
        classes = labels[rows].reshape(4, 3)
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0])) == 4
        for c, members in zip(classes[:, 0], rows.reshape(4, 3), strict=True):
            assert len(set(members)) == min(3, c + 1) or c < 2  # without replacement where there are enough
        seen.extend(classes[:, 0])
    assert sorted(np.bincount(seen)) == [4] * 10  # every identity equally often


def test_the_published_recipe():
    cfg = preset_paper()
    assert (cfg.scale, cfg.margin, cfg.lr, cfg.rank) == (64.0, 0.35, 3.5e-4, 512)
    assert (cfg.batch_identities * cfg.per_identity, cfg.steps) == (512, 25 * 2000)
    shares = [schedule(2000 * epoch, cfg) for epoch in range(25)]
    assert shares[0] == pytest.approx(0.01)
    assert np.allclose(np.diff(shares[:6]), 0.99 / 5)
    assert shares[5:11] == [1.0] * 6
    assert (np.diff(shares[10:]) < 0).all()
    assert schedule(1999, cfg) == shares[0]  # constant inside an epoch


def test_auto_stays_inside_its_budget():
    small, large = preset_auto(300, 1500, 4096), preset_auto(20_000, 100_000, 4096)
    assert large.steps <= preset_auto(3000, 15_000, 4096).steps
    assert preset_auto(300, 1500, 4096, budget=5.0).steps < small.steps
    assert preset_auto(2, 4, 64).rank == 64
