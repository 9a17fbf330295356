from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from solver_worlds import STEEP, gaussian, orthonormal

from solvers.closed import GeneralisedNull, Identity, PairData
from solvers.distributed import World
from solvers.errors import BadRowsError, DivergedError, SolverMemoryError, SolverUsageError, StoppedError
from solvers.heads import build_head
from solvers.keeper import Keeper, Watch
from solvers.memory import bytes_needed
from solvers.metrics import average_precision, paired_bootstrap
from solvers.projection import Projection
from solvers.sampler import batches, read_ahead
from solvers.sgd import ArraySource, CosFace, preset_auto, preset_paper, train
from solvers.starts import given_weights, start_weights
from solvers.state import State
from solvers.training import schedule

D = 96


@pytest.fixture(autouse=True)
def _one_thread():
    """These worlds are too small to gain from threads, and a busy machine makes them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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

    def validate(snapshot):
        W = snapshot.weights
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
    assert validate(result) == result.best_map
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

    def retrieve(snapshot):
        p = Projection(snapshot.weights, snapshot.weights)
        return average_precision(p.queries(g), y, p.references(o), np.arange(200)).map

    assert train(cfg, few, validate=retrieve).weight_init == "principal"
    assert train(cfg, few).weight_init == "principal"


def test_the_start_is_kept_when_training_only_harms(world):
    source = world[0]
    scores = iter([0.9, 0.5, 0.4, 0.3])
    cfg = CosFace(rank=4, steps=30, validate_every=10, weight_init="principal", device="cpu")
    result = train(cfg, source, validate=lambda snapshot: next(scores))
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
    wrong = [{"lr": 0.0}, {"steps": 0}, {"warmup": 0.9, "flat": 0.1}, {"class_init": "x"}, {"loss": "x"}]
    for knobs in (*wrong, {"precision": "fp8"}, {"head": "x"}, {"patience": 0}, {"accumulate": 0}):
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
    polls = iter([False] * 7 + [True])
    with pytest.raises(StoppedError) as stopped:
        train(cfg, ArraySource(rows, labels), stop=lambda: next(polls))
    assert stopped.value.step == 8
    assert np.array_equal(caught.value.weights, stopped.value.weights), "the bad step changed nothing"


def test_batches_hold_p_identities_times_k_rows():
    labels = np.repeat(np.arange(10), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    cfg = CosFace(rank=1, batch_identities=4, per_identity=3)
    draws = batches(labels, 10, cfg)
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


def test_on_analytic_diffusion_it_ends_where_gnull_does_and_shuffled_identities_gain_nothing():
    n, (g, references) = 2000, STEEP.queries()
    own, names = np.arange(len(g)), np.arange(len(references))
    o, t = STEEP.draw(n, 2)

    def ap(p):
        return average_precision(p.queries(g), own, p.references(references), names).ap

    def trained(labels):
        cfg = CosFace(
            rank=D, steps=300, batch_identities=128, per_identity=2, weight_init="principal", device="cpu"
        )
        W = train(cfg, ArraySource(np.concatenate([o, t]), np.concatenate([np.arange(n), labels]))).weights
        return ap(Projection(W, W))

    data = STEEP.pairs(n)
    gnull, raw = (ap(method.fit(data).projection()) for method in (GeneralisedNull(D, 1.0), Identity()))
    true, shuffled = trained(np.arange(n)), trained(np.roll(np.arange(n), 1))
    low, high = paired_bootstrap(true, gnull, own)
    assert high >= 0, "worse than gnull"
    assert high - low < 0.06, "an interval that is too wide would let anything pass"
    # The start, a turn of all coordinates, retrieves as well as raw latents do; strangers add nothing to it.
    assert paired_bootstrap(shuffled, raw, own)[0] <= 0
    assert paired_bootstrap(true, shuffled, own)[0] > 0


@pytest.mark.parametrize("head", [{}, {"head": "mlp", "layers": 2}], ids=["linear", "mlp"])
def test_a_batch_in_parts_is_the_batch(world, head):
    cfg = CosFace(rank=8, steps=12, weight_init="random", device="cpu", **head)
    source, probe = world[0], world[0].rows[:50]
    whole, parts, half = (
        train(replace(cfg, **knobs), source).snapshot.embed(probe)
        for knobs in ({}, {"accumulate": 5}, {"batch_identities": 32})
    )
    # Adam moves an entry by the learning rate whatever the gradient's size, and only the last bits of that
    # differ: eps for each of the scale that cancels in it, added up over the steps.
    allowed = cfg.scale * cfg.steps * np.finfo(np.float32).eps * np.abs(whole).max()
    assert 0 < np.abs(parts - whole).max() < allowed
    assert np.abs(half - whole).max() > 10 * allowed


def test_a_source_may_return_any_float_type_and_library(world):
    rows, labels = world[0].rows.astype(np.float16), world[0].labels
    cfg = CosFace(rank=8, steps=5, device="cpu")

    class Tensors(ArraySource):
        def gather(self, indices):
            return self.rows[torch.as_tensor(indices)]

    frozen = rows.copy()
    frozen.flags.writeable = False
    forms = [
        ArraySource(rows, labels),
        ArraySource(frozen, labels),
        ArraySource(rows.astype(np.float64), labels),
        Tensors(torch.tensor(rows), labels),
        Tensors(torch.tensor(rows, dtype=torch.float32), labels),
    ]
    first, *others = (train(cfg, source).weights for source in forms)
    for other in others:
        assert np.array_equal(first, other)


def test_reading_ahead_is_one_batch_in_order_and_hides_no_error():
    import threading

    loaded, free = [], threading.Event()

    def load(item):
        loaded.append(item)
        if item == 3:
            raise OSError("disk")
        if item == 2:
            free.set()
        return item

    reader = read_ahead(iter(range(6)), load)
    assert next(reader) == 0
    assert next(reader) == 1
    assert free.wait(10), "the next batch is read while this one is used"
    assert loaded == [0, 1, 2]
    assert next(reader) == 2
    with pytest.raises(OSError, match="disk"):
        next(reader)
    assert list(read_ahead(iter(()), load)) == []


def test_a_warm_start_begins_where_the_given_w_is(world):
    source, validate, _ = world
    o, g, _ = source.rows[:400], source.rows[400:], None
    W = GeneralisedNull(48, 1.0).fit(PairData.from_arrays(np.repeat(o, 4, axis=0), g)).query_map
    cfg = replace(_config(source), steps=10, validate_every=10)
    seen = []
    warm = train(cfg, source, validate=validate, init=W, observe=seen.append)
    assert warm.weight_init == "init"
    assert warm.start_map == average_precision_of(validate, W)
    assert warm.start_map > train(cfg, source, validate=validate).start_map + 0.05
    # Random class weights would undo the start: with a W given they begin at the means, whatever was asked.
    random = train(replace(cfg, class_init="random"), source, validate=validate, init=W)
    assert np.array_equal(random.weights, warm.weights)
    # A power of two apart: the cosines are the same to the bit, and a step means the same for every W.
    ratio = given_weights(W, D, 48) / W.astype(np.float32)
    assert np.ptp(ratio) < 1e-6 * ratio.max()
    assert 0.7 < np.sqrt(np.mean(given_weights(1e6 * W, D, 48) ** 2) * D) < 1.5
    for record in seen:
        assert {"step", "loss", "lr", "map", "best_map", "seconds", "rows_per_second"} <= set(record)
    for wrong in (W[:, :5], W[:-1], 0 * W, np.full_like(W, np.nan)):
        with pytest.raises(SolverUsageError, match="start from"):
            train(cfg, source, init=wrong)
    with pytest.raises(SolverUsageError, match="no matrix"):
        train(replace(cfg, head="mlp"), source, init=W)


def average_precision_of(validate, W):
    class Given:
        weights = W.astype(np.float32)

    return validate(Given)


def test_training_stops_when_validation_does_not_improve(world):
    source = world[0]
    scores = iter([0.5, 0.6, 0.6, 0.6, 0.7])
    cfg = CosFace(rank=4, steps=30, validate_every=5, weight_init="principal", device="cpu", patience=2)
    result = train(cfg, source, validate=lambda snapshot: next(scores))
    assert (result.steps, result.stopped_early, result.best_step) == (15, "patience", 15)
    scores = iter([0.5, 0.6, 0.6, 0.7, 0.7, 0.8, 0.8])
    assert train(cfg, source, validate=lambda snapshot: next(scores)).steps == 30
    assert train(replace(cfg, max_seconds=1e-9), source).stopped_early == "max_seconds"


def test_a_head_that_is_no_matrix_is_trained_and_given_back(world):
    source = world[0]
    cfg = CosFace(rank=8, steps=5, head="mlp", layers=2, device="cpu", precision="bf16")
    maps = []
    result = train(cfg, source, validate=lambda snapshot: maps.append(snapshot.weights) or snapshot.step)
    assert result.weights is None
    assert maps == [None, None]
    assert result.snapshot.embed(source.rows[:3]).shape == (3, 8)
    with pytest.raises(SolverUsageError, match="has none"):
        cfg.fit(source)


def test_bad_rows_and_too_little_memory_are_found_before_the_first_step(world):
    rows, labels = world[0].rows.copy(), world[0].labels
    rows[1234, 5] = np.inf
    steps = []
    for knobs in (
        {"class_init": "means"},
        {"class_init": "random", "batch_identities": 400, "per_identity": 5},
    ):
        cfg = CosFace(rank=8, steps=3, weight_init="random", device="cpu", **knobs)
        with pytest.raises(BadRowsError, match="row 1234 of the source"):
            train(cfg, ArraySource(rows, labels), progress=lambda *a: steps.append(a))

    class Short(ArraySource):
        def gather(self, indices):
            return super().gather(indices)[:-1]

    cfg = CosFace(rank=8, steps=3, weight_init="random", class_init="random", device="cpu")
    with pytest.raises(BadRowsError, match=r"\(127, 96\) for 128 rows"):
        train(cfg, Short(world[0].rows, labels), progress=lambda *a: steps.append(a))
    needed = bytes_needed(cfg, 400, D)
    with pytest.raises(SolverMemoryError, match=r"rank 8 among 400 identities holds 0\.00 GB on cpu"):
        train(cfg, world[0], free_bytes=needed - 1, progress=lambda *a: steps.append(a))
    assert steps == []
    assert train(cfg, world[0], free_bytes=needed).steps == 3
    # 100,000 identities at rank 512: seven arrays of 0.2 GB.
    assert 1.4e9 < bytes_needed(preset_paper(), 100_000, 4096) < 2.5e9


def test_what_falls_short_of_the_recipe_is_said():
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 1, 2, 2, 3])
    cfg = replace(preset_paper(rank=4), steps=3, schedule_every=1, device="cpu")
    fitted = cfg.fit(ArraySource(rng.standard_normal((6, D)), labels))
    few, single, repeated = fitted.report["notes"]
    assert few.startswith("There are 4 identities and the recipe asks for 128")
    assert single.startswith("2 of 4 identities have a single row")
    assert repeated.startswith("2 of 4 identities have fewer rows than the 4 of a batch")
    assert few in fitted.report["statement"]
    enough = CosFace(rank=4, steps=3, batch_identities=3, device="cpu")
    two_each = ArraySource(rng.standard_normal((6, D)), np.repeat(np.arange(3), 2))
    assert enough.fit(two_each).report["notes"] == []


def test_where_losses_are_looked_at_late_the_weights_of_the_last_good_look_are_kept(world):
    """As on a GPU, where a bad step has changed the weights before the host learns of it."""
    cfg = CosFace(rank=8, steps=20, device="cpu")
    state = State(cfg, build_head("linear", D, 8), np.eye(400, 8, dtype=np.float32), World())
    keeper = Keeper(None, World())
    keeper.begin(state.snapshot(0), None)
    watch = Watch(cfg, state, keeper)
    watch.every = 4
    x, labels = torch.tensor(world[0].rows[:64]), torch.tensor(world[0].labels[:64])
    kept = {}
    for step in range(1, 7):
        watch.add(step, 0.1, state.step(x, labels, 0.01))
        kept[step] = state.snapshot(step).weights
    with torch.no_grad():
        state.average.weight.fill_(torch.nan)
    watch.add(7, 0.1, torch.tensor(torch.nan))
    with pytest.raises(DivergedError, match="step 7 of 20") as caught:
        watch.add(8, 0.1, torch.tensor(torch.inf))
    assert np.array_equal(caught.value.weights, kept[4])


def test_draws_depend_on_seed_and_step_alone():
    labels = np.repeat(np.arange(50), 7)
    cfg = CosFace(rank=1, batch_identities=16, per_identity=4, seed=3)
    whole = list(islice(batches(labels, 50, cfg), 12))
    assert all(
        np.array_equal(a, b) for a, b in zip(whole[5:], batches(labels, 50, cfg, done=5), strict=False)
    )
    other = next(batches(labels, 50, replace(cfg, seed=4)))
    assert not np.array_equal(whole[0], other)
    # Within an identity every row is drawn equally often: 4,000 draws of 7 rows, five standard deviations.
    one = CosFace(rank=1, batch_identities=2, per_identity=4)
    draws = np.concatenate(list(islice(batches(np.repeat([0, 1], 7), 2, one), 1000)))
    counts = np.bincount(draws, minlength=14)
    assert np.abs(counts - 4000 / 7).max() < 5 * np.sqrt(4000 / 7)
