"""The recipe of a training run: what it refuses and fills in, what of it ran, what it leaves as it was."""

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint import CFG, D, killed_at, make_source

from solvers.checkpoint import Checkpoint
from solvers.distributed import World
from solvers.errors import DivergedError, SolverMemoryError, SolverUsageError
from solvers.heads import build_head
from solvers.keeper import Keeper
from solvers.losses import DEFAULTS
from solvers.memory import bytes_needed
from solvers.sgd import ArraySource, CosFace, preset_paper, train
from solvers.state import Snapshot, State
from solvers.training import schedule

# Run as a child for each of the ways in which a user may have set torch's precision: a setting of a process
# that is refused to be read again would spoil all other tests.
SETTINGS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch._dynamo  # once, before the forks: its optimisers import it at their first step
from test_checkpoint import CFG, make_source
from dataclasses import replace
from solvers.sgd import train
from solvers.state import products

def new(): torch.backends.cuda.matmul.fp32_precision = "tf32"
def old(): torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = False
def medium(): torch.set_float32_matmul_precision("medium")
def nothing(): pass

READ = {
    "matmul": lambda: torch.backends.cuda.matmul.allow_tf32,
    "cudnn": lambda: torch.backends.cudnn.allow_tf32,
    "precision": torch.get_float32_matmul_precision,
    "new": lambda: torch.backends.cuda.matmul.fp32_precision,
    "conv": lambda: torch.backends.cudnn.conv.fp32_precision,
}

def read():
    found = {}
    for name, one in READ.items():
        try:
            found[name] = one()
        except (RuntimeError, AttributeError) as error:  # and must be refused afterwards, too
            found[name] = type(error).__name__
    return found

def check(preset):
    preset()
    before = read()
    seen = []
    train(replace(CFG, steps=2, precision="tf32"), make_source(), progress=lambda *a: seen.append(read()))
    assert seen[0] == before, ("on a CPU nothing is set", preset.__name__, before, seen[0])
    for precision in ("fp32", "tf32", "bf16"):
        with products(precision, "cuda"):
            inside = read()
        new = inside["new"] in ("ieee", "tf32")
        fast = [inside["new"], inside["conv"]] if new else [inside["matmul"], inside["cudnn"]]
        expected = ("ieee", "tf32") if new else (False, True)
        assert fast == 2 * [expected[precision == "tf32"]], (precision, inside)
        assert read() == before, (preset.__name__, precision, before, read())

for preset in (nothing, new, old, medium):
    if preset is new and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        continue
    child = os.fork()
    if child == 0:
        try:
            check(preset)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, preset.__name__
"""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_users_settings_of_torch_are_as_they_were():
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", SETTINGS, str(here)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=here.parents[1],
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_scale_and_margin_are_those_of_the_loss():
    for loss, numbers in DEFAULTS.items():
        cfg = CosFace(loss=loss)
        assert (cfg.scale, cfg.margin) == numbers
    assert CosFace(loss="circle", margin=0.1).scale == DEFAULTS["circle"][0]
    assert CosFace(loss="circle", margin=0.1).margin == 0.1
    assert (preset_paper().scale, preset_paper().margin) == DEFAULTS["cosface"]
    kept = replace(CosFace(), loss="circle")
    assert (kept.scale, kept.margin) == DEFAULTS["cosface"], "numbers that were resolved are numbers"
    own = replace(CosFace(), loss="circle", scale=None, margin=None)
    assert (own.scale, own.margin) == DEFAULTS["circle"]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"loss": "softmax", "margin": 0.35}, "has no margin"),
        ({"seed": -1}, "seed must be a whole number, at least 0"),
        ({"seed": 0.5}, "seed"),
        ({"steps": 2.5}, "steps must be a whole number, at least 1, not 2.5"),
        ({"rank": 8.0}, "rank"),
        ({"rank": None}, "rank"),
        ({"accumulate": "2"}, "accumulate"),
        ({"lr": math.inf}, "finite"),
        ({"lr": math.nan}, "finite"),
        ({"scale": math.inf}, "finite"),
        ({"scale": 0.0}, "positive"),
        ({"margin": math.nan}, "finite"),
        ({"max_seconds": math.nan}, "max_seconds"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"warmup_from": 1.5}, "warmup_from"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(knobs, said):
    with pytest.raises(SolverUsageError, match=said):
        CosFace(**knobs)
    assert CosFace(steps=np.int64(3), seed=0, max_seconds=math.inf).steps == 3
    with pytest.raises(SolverUsageError, match="5 rows and 4 labels"):
        ArraySource(np.zeros((5, 3)), np.zeros(4, int))


def test_what_ran_is_recorded():
    init = np.random.default_rng(0).standard_normal((D, CFG.rank))
    cfg = replace(CFG, steps=2, precision="tf32", class_init="random")
    warm = cfg.fit(make_source(), init=init)
    ran = {"device": "cpu", "processes": 1, "threads": 1, "precision": "fp32"}
    assert {name: warm.report[name] for name in ran} == ran, "TF32 is of CUDA alone"
    assert warm.knobs["class_init"] == "means"
    cold = replace(cfg, precision="bf16").fit(make_source())
    assert cold.report["precision"] == "bf16"
    assert cold.knobs["class_init"] == "random"


@pytest.mark.parametrize("decay", [0.9999, 0.5])
@pytest.mark.parametrize("count", [0, 10**6])
def test_the_average_follows_w_by_its_recursion(count, decay):
    """W_n enters with 1 - min(decay, (1 + n) / (10 + n)), n steps having been taken."""
    cfg = replace(CFG, ema_decay=decay)
    state = State(cfg, build_head("linear", D, CFG.rank), np.eye(30, CFG.rank, dtype=np.float32), World())
    source = make_source()
    x, labels = torch.tensor(source.rows[:24]).float(), torch.tensor(source.labels[:24])
    start = state.average.weight.numpy().astype(np.float64)
    rules = {
        "it": lambda n: min(decay, (1 + n) / (10 + n)),
        "another rise": lambda n: min(decay, (1 + n) / (11 + n)),
        "another cap": lambda n: min((1 + decay) / 2, (1 + n) / (10 + n)),
    }
    means, apart = dict.fromkeys(rules, start), dict.fromkeys(rules, 0.0)
    state.count, steps = count, 30
    for n in range(count + 1, count + steps + 1):
        state.step(x, labels, 0.5)
        W, found = state.objective.head.weight.detach().numpy(), state.average.weight.numpy()
        for name, rule in rules.items():
            means[name] = rule(n) * means[name] + (1 - rule(n)) * W
            apart[name] = max(apart[name], float(np.abs(means[name] - found).max()))
    # Every step rounds once, to eps of the average.
    allowed = steps * np.finfo(np.float32).eps * np.abs(found).max()
    assert apart["it"] < allowed
    other = "another cap" if count else "another rise"
    assert apart[other] > 10 * allowed, other


def test_the_rise_begins_where_it_is_told_to():
    cfg = replace(preset_paper(), warmup_from=0.2)
    shares = [schedule(2000 * epoch, cfg) for epoch in range(6)]
    assert np.allclose(shares, np.linspace(0.2, 1.0, 6))


def test_a_rate_counts_no_validation():
    waits, told = 0.4, []

    def slow(snapshot):
        time.sleep(waits)
        return 0.5

    train(replace(CFG, steps=10, validate_every=5), make_source(), validate=slow, observe=told.append)
    rows = 5 * CFG.batch_identities * CFG.per_identity
    assert [t["step"] for t in told] == [5, 10]
    for record in told:
        # Five steps on 24 rows take milliseconds.
        assert record["rows_per_second"] > 2 * rows / waits


def test_a_score_that_is_no_number_loses_to_any():
    def kept(*scores):
        keeper = Keeper(lambda snapshot: scores[snapshot.step], World())
        head = build_head("linear", D, 4)
        keeper.begin(Snapshot(head, 0), scores[0])
        for step in range(1, len(scores)):
            keeper.see(Snapshot(head, step), 1.0, 0.1)
        return keeper.best.step

    nan = math.nan
    assert kept(nan, 0.1, 0.2) == 2
    assert kept(0.3, nan, 0.2) == 0
    assert kept(0.1, 0.3, nan) == 1
    assert kept(nan, nan, nan) == 2, "among equals the later one"
    scores = {"principal": nan, "random": 0.2}
    calls = iter([*scores.values(), 0.3])
    started = train(replace(CFG, weight_init="auto", steps=1), make_source(), validate=lambda s: next(calls))
    assert (started.weight_init, started.start_map) == ("random", 0.2)


def test_the_clock_of_a_checkpoint_saves(tmp_path):
    killed_at(2, CFG, tmp_path / "steps")
    assert not (tmp_path / "steps").exists(), "three steps were not taken"
    ours = Checkpoint(tmp_path / "run", every_seconds=0.0, key="k")
    times = []
    train(replace(CFG, steps=3), make_source(), checkpoint=ours, progress=lambda *a: times.append(ours._last))
    assert times == sorted(set(times)), "after every step"
    late = Checkpoint(tmp_path / "late", every_seconds=None, key="k")
    seen = []
    train(
        replace(CFG, steps=3),
        make_source(),
        checkpoint=late,
        progress=lambda *a: seen.append(late.path.exists()),
    )
    assert seen == [False] * 3
    assert late.path.exists(), "the last step is kept for what comes after it"


def test_a_divergence_says_where_w_is_to_those_who_can_reach_it():
    source = make_source()
    with pytest.raises(DivergedError) as caught:
        train(replace(CFG, lr=1e38, class_init="random"), source)
    assert "this error" not in str(caught.value)
    assert caught.value.__notes__ == ["The last good W is in the exception's `weights`."]
    assert np.isfinite(caught.value.weights).all()


def test_a_head_counts_what_it_holds_and_the_refusal_names_the_way_out():
    shape = (4, 32, 32)
    cfg = preset_paper()
    heavy = replace(cfg, head="attention", latent_shape=shape)
    linear, whole = (bytes_needed(c, 100, 4096) for c in (cfg, heavy))
    # 512 rows of 1,024 tokens, of which queries, keys and values alone are 192 numbers.
    assert whole - linear > 512 * 1024 * 192 * 4
    parts = bytes_needed(replace(heavy, accumulate=8), 100, 4096)
    assert parts - linear < (whole - linear) / 3
    rng = np.random.default_rng(0)
    source = ArraySource(rng.standard_normal((200, 4096), dtype=np.float32), np.repeat(np.arange(100), 2))
    with pytest.raises(SolverMemoryError, match=r"more parts than 1 \(accumulate\)"):
        train(replace(heavy, device="cpu"), source, free_bytes=int(0.5e9))
