"""A killed run goes on to where the undisturbed one ends; a checkpoint is whole or refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from solvers.checkpoint import Checkpoint
from solvers.errors import CheckpointError, DivergedError, SolverUsageError, SolverWriteError, StoppedError
from solvers.sgd import ArraySource, CosFace, train

D, CLASSES = 24, 30
CFG = CosFace(
    rank=6,
    steps=40,
    batch_identities=8,
    per_identity=3,
    validate_every=10,
    schedule_every=7,
    weight_init="random",
    device="cpu",
)
# Run as a child: for every step given, a process trains and is killed without warning after that step.
CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch._dynamo  # once, before the forks: its optimisers import it at their first step
torch.set_num_threads(1)
from test_checkpoint import CFG, judge, make_source
from solvers.checkpoint import Checkpoint
from solvers.sgd import train

def kill(step, steps, loss):
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)

for last in map(int, sys.argv[3:]):
    child = os.fork()
    if child == 0:
        ours = Checkpoint(sys.argv[2], every_steps=3, key="k")
        train(CFG, make_source(), validate=judge, progress=kill, checkpoint=ours)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    assert os.path.exists(sys.argv[2]) == (last > 3), last
"""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_source(seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), 4)
    rows = rng.standard_normal((CLASSES, D))[labels] + rng.standard_normal((len(labels), D))
    return ArraySource(rows.astype(np.float16), labels)


def judge(snapshot):
    # Any function of W will do; this one prefers a step in the middle.
    return -abs(float(np.abs(snapshot.weights).sum()) - 27.0) - 0.01 * abs(snapshot.step - 20)


def same(one, other):
    return (
        np.array_equal(one.weights, other.weights)
        and one.history == other.history
        and (one.best_step, one.best_map, one.start_map, one.steps, one.weight_init)
        == (other.best_step, other.best_map, other.start_map, other.steps, other.weight_init)
    )


class Kill(BaseException):
    pass


def killed_at(last, cfg, path, **how):
    """Train, and end abruptly after a step; nothing is cleaned up by the loop."""

    def raise_at(step, steps, loss):
        if step == last:
            raise Kill

    with pytest.raises(Kill):
        train(
            cfg, make_source(), progress=raise_at, checkpoint=Checkpoint(path, every_steps=3, key="k"), **how
        )


def test_sigkill_at_several_steps_and_the_weights_are_the_same_to_the_bit(tmp_path):
    path = tmp_path / "run.safetensors"
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(path), "2", "11", "21", "30"]
    done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr.decode()
    went_on = train(CFG, make_source(), validate=judge, checkpoint=Checkpoint(path, every_steps=3, key="k"))
    undisturbed = train(CFG, make_source(), validate=judge)
    assert same(went_on, undisturbed)
    assert 0 < undisturbed.best_step < CFG.steps, "the best W must have been carried by the checkpoint"


@pytest.mark.parametrize(
    "knobs",
    [
        {"ema": False},
        {"accumulate": 3, "loss": "circle", "scale": 32.0},
        {"loss": "softmax", "scale": 1.0, "margin": 0.0, "class_init": "random"},
        {"head": "mlp", "layers": 3},
        {"precision": "bf16"},
        {"relative_lr": False, "lr": 1e-3},
    ],
    ids=lambda k: next(iter(k)),
)
def test_every_recipe_goes_on_to_the_same_bits(tmp_path, knobs):
    cfg = replace(CFG, steps=12, validate_every=4, **knobs)
    for last in (1, 4, 8, 12):
        killed_at(last, cfg, tmp_path / "run")
    went_on = train(cfg, make_source(), checkpoint=Checkpoint(tmp_path / "run", every_steps=3, key="k"))
    undisturbed = train(cfg, make_source())
    probe = make_source(1).rows
    assert np.array_equal(went_on.snapshot.embed(probe), undisturbed.snapshot.embed(probe))
    assert went_on.history == undisturbed.history


def test_what_the_checkpoint_holds_is_needed(tmp_path):
    """The opposite: with any one part of the state spoiled, the run ends elsewhere."""
    from solvers.files import read_safetensors, write_safetensors

    path = tmp_path / "run"
    undisturbed = train(CFG, make_source()).weights
    for spoiled in (
        "adam.classes.exp_avg",
        "adam.head.weight.exp_avg_sq",
        "average.weight",
        "weights.classes",
    ):
        killed_at(32, CFG, path)
        tensors, metadata = read_safetensors(path, "latentstore.checkpoint")
        tensors[spoiled] = tensors[spoiled] * 0.9
        write_safetensors(path, tensors, metadata)
        other = train(CFG, make_source(), checkpoint=Checkpoint(path, key="k")).weights
        assert not np.array_equal(other, undisturbed), spoiled
        path.unlink()


def test_a_warm_start_and_patience_survive(tmp_path):
    init = np.random.default_rng(3).standard_normal((D, CFG.rank))
    cfg = replace(CFG, patience=2, validate_every=5)
    how = {"init": init, "validate": lambda snapshot: float(snapshot.step == 5)}
    undisturbed = train(cfg, make_source(), **how)
    assert (undisturbed.steps, undisturbed.best_step, undisturbed.stopped_early) == (15, 5, "patience")
    assert undisturbed.weight_init == "init"
    for last in (6, 12, 15):
        killed_at(last, cfg, tmp_path / "run", **how)
    went_on = train(cfg, make_source(), checkpoint=Checkpoint(tmp_path / "run", key="k"), **how)
    assert same(went_on, undisturbed)
    assert went_on.stopped_early == "patience"
    with pytest.raises(CheckpointError, match="init"):
        train(cfg, make_source(), init=2 * init, checkpoint=Checkpoint(tmp_path / "run", key="k"))


def test_stop_saves_and_says_so(tmp_path):
    path, polls = tmp_path / "run", iter([False] * 6 + [True])
    with pytest.raises(StoppedError, match=r"step 7 of 40.*again") as caught:
        train(CFG, make_source(), checkpoint=Checkpoint(path, key="k"), stop=lambda: next(polls))
    assert caught.value.step == 7
    assert caught.value.weights.shape == (D, CFG.rank)
    assert same(train(CFG, make_source(), checkpoint=Checkpoint(path, key="k")), train(CFG, make_source()))
    with pytest.raises(StoppedError, match="Nothing of it was kept"):
        train(CFG, make_source(), stop=lambda: True)


def test_seconds_of_earlier_runs_count(tmp_path):
    cfg = replace(CFG, max_seconds=60.0)
    killed_at(6, cfg, tmp_path / "run")
    ours = Checkpoint(tmp_path / "run", key="k")
    recipe = _recipe(ours.path)
    tensors, state = ours.load(recipe)
    assert 0 < state["seconds"] < 60
    ours.save(tensors, {**state, "seconds": 61.0}, recipe)
    result = train(cfg, make_source(), checkpoint=ours)
    assert (result.steps, result.stopped_early) == (4, "max_seconds")
    assert result.seconds > 61


def test_another_key_recipe_or_data_is_refused(tmp_path):
    path = tmp_path / "run"
    killed_at(6, CFG, path)
    before = path.read_bytes()
    others = [
        (CFG, make_source(), "other", "key"),
        (replace(CFG, lr=0.5), make_source(), "k", r"lr is 0\.5 now and was 0\.004"),
        (CFG, ArraySource(make_source().rows[:-1], make_source().labels[:-1]), "k", "rows is 119 now"),
    ]
    for cfg, source, key, said in others:
        with pytest.raises(CheckpointError, match=said) as caught:
            train(cfg, source, checkpoint=Checkpoint(path, key=key))
        assert isinstance(caught.value, SolverUsageError)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_a_run_of_another_device_is_refused_and_auto_is_what_it_chose(tmp_path, monkeypatch):
    path = tmp_path / "run"
    killed_at(6, replace(CFG, device="auto"), path)
    recipe = _recipe(path)
    ran = "cuda" if torch.cuda.is_available() else "cpu"
    assert recipe["device"] == ran
    ours = Checkpoint(path, key="k")
    ours.save(*ours.load(recipe), {**recipe, "device": "xpu"})
    with pytest.raises(CheckpointError, match=f"device is '{ran}' now and was 'xpu'"):
        train(replace(CFG, device="auto"), make_source(), checkpoint=ours)


def test_a_torn_or_flipped_file_is_refused(tmp_path):
    path = tmp_path / "run"
    killed_at(6, CFG, path)
    whole = path.read_bytes()
    recipe = _recipe(path)
    state = Checkpoint(path, key="k").load(recipe)[1]
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    torn = [whole[:n] for n in (0, 5, 8, header // 2, header, header + 1, len(whole) - 1)]
    for content in [*torn, whole + b"x"]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot be used.*Delete it"):
            train(CFG, make_source(), checkpoint=Checkpoint(path, key="k"))
    for at in [*range(0, header, 3), *rng.integers(header, len(whole), 50)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            train(CFG, make_source(), checkpoint=Checkpoint(path, key="k"), stop=lambda: True)
        except CheckpointError:
            continue
        except StoppedError:
            # A flip that changes nothing that is read: the padding, a capital letter of an escape.
            words = Checkpoint(path, key="k").load(recipe)[1]
            assert words["keeper"] == state["keeper"], at


def test_half_written_files_are_swept_and_the_disk_may_be_full(tmp_path):
    path = tmp_path / "run"
    killed_at(6, CFG, path)
    left = tmp_path / ".run.0123.partial"
    left.write_bytes(b"half")
    # A name that a pattern would read otherwise.
    brackets = tmp_path / ".W[1].0123.partial"
    brackets.write_bytes(b"half")
    assert Checkpoint(tmp_path / "W[1]").load({}) is None
    assert not brackets.exists()
    stranger = tmp_path / ".other.0123.partial"
    stranger.write_bytes(b"not ours")
    train(CFG, make_source(), checkpoint=Checkpoint(path, key="k"))
    assert not left.exists()
    assert stranger.exists()
    with pytest.raises(SolverWriteError):
        train(CFG, make_source(), checkpoint=Checkpoint(tmp_path / "absent" / "run", every_steps=1, key="k"))
    Checkpoint(path).remove()
    Checkpoint(path).remove()
    assert not path.exists()


def test_divergence_leaves_the_last_good_checkpoint(tmp_path):
    class Spoiled(ArraySource):
        calls = 0

        def gather(self, indices):
            Spoiled.calls += 1
            return super().gather(indices) * (np.float16(np.nan) if Spoiled.calls > 7 else np.float16(1))

    cfg = replace(CFG, class_init="random")
    path, source = tmp_path / "run", make_source()
    with pytest.raises(DivergedError, match="step 8 of 40") as caught:
        train(cfg, Spoiled(source.rows, source.labels), checkpoint=Checkpoint(path, every_steps=3, key="k"))
    assert np.isfinite(caught.value.weights).all()
    tensors, state = Checkpoint(path, key="k").load(_recipe(path))
    assert state["taken"] == 6
    assert all(np.isfinite(t).all() for t in tensors.values())
    # The rows repaired, the run goes on as if nothing had been.
    assert same(train(cfg, source, checkpoint=Checkpoint(path, key="k")), train(cfg, source))


def _recipe(path):
    """What the run in the file was made with, as the file has it."""
    from solvers.files import read_safetensors

    return json.loads(read_safetensors(path, "latentstore.checkpoint")[1]["run"])["recipe"]
