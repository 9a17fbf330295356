"""Processes that share a batch learn the W of one process; only the first speaks."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint import CFG, judge, make_source

from solvers.checkpoint import Checkpoint
from solvers.distributed import World
from solvers.errors import SolverUsageError
from solvers.files import read_safetensors
from solvers.sgd import train

HERE = Path(__file__).parent
# Every scenario in one start, since a start costs an import of torch; that is also why the second process is
# forked from the first, in the environment that torchrun gives (tests/cli starts torchrun itself).
CHILD = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import torch._dynamo  # its optimisers import it at their first step
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_checkpoint import CFG, judge, make_source
from solvers.checkpoint import Checkpoint
from solvers.distributed import World
from solvers.errors import DivergedError, SolverUsageError, StoppedError
from solvers.sgd import ArraySource, train
from test_distributed import BREAKS_AT, SCENARIOS

child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "1" if child == 0 else "0"
out, world = Path(sys.argv[2]), World.from_environment("cpu")
lead, said, calls = world.rank == 0, {}, []
validate = judge if lead else None
for name, knobs in SCENARIOS.items():
    result = train(
        replace(CFG, **knobs), make_source(), world=world, validate=validate,
        progress=lambda *a: calls.append("p"), observe=lambda r: calls.append("o"),
    )
    np.save(out / f"{name}-{world.rank}.npy", result.weights)
    said[name] = [result.best_step, result.steps, result.stopped_early, result.weight_init]
said["calls"] = len(calls)

class Counted(Checkpoint):
    asked = 0
    def overdue(self):
        Counted.asked += 1
        return super().overdue()

path = out / "run"
try:
    stop = (lambda: steps.append(1) or len(steps) == BREAKS_AT) if lead else None
    steps = []
    train(CFG, make_source(), world=world, validate=validate, stop=stop, checkpoint=Counted(path, key="k"))
except StoppedError as error:
    said["stopped"], said["overdue"] = error.step, Counted.asked
result = train(CFG, make_source(), world=world, validate=validate, checkpoint=Checkpoint(path, key="k"))
np.save(out / f"resumed-{world.rank}.npy", result.weights)

try:
    train(replace(CFG, batch_identities=7), make_source(), world=world)
except SolverUsageError as error:
    said["refused"] = str(error)

class Spoiled(ArraySource):
    calls = 0
    def gather(self, indices):
        Spoiled.calls += 1
        # Rows of one process only.
        return super().gather(indices) * np.float16(np.nan if Spoiled.calls > 5 and not lead else 1)

source = make_source()
try:
    train(replace(CFG, class_init="random"), Spoiled(source.rows, source.labels), world=world)
except DivergedError as error:
    said["diverged"] = [str(error).split(" of ")[1], bool(np.isfinite(error.weights).all())]
(out / f"said-{world.rank}.json").write_text(json.dumps(said))
world.close()
if lead:
    assert os.waitpid(child, 0)[1] == 0
"""
SCENARIOS = {
    "plain": {},
    "accumulated": {"accumulate": 2, "weight_init": "auto"},
    "patient": {"patience": 1, "validate_every": 4, "loss": "circle", "scale": 32.0},
}
BREAKS_AT = 9


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    script = out / "child.py"
    script.write_text(CHILD)
    root = str(HERE.parents[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, str(script), str(HERE), str(out)],
        capture_output=True,
        env=env,
        timeout=240,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = [json.loads((out / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    return out, said


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tolerance(W, steps):
    """How far two runs may drift apart whose gradients differ in the last bits alone.

    Adam divides by the gradient's own size, so that a difference of eps moves an entry by about eps times the
    step's length, lr, in units of the entries; the steps add up, and with them what earlier ones moved.
    Gradients are sums of cancelling parts, scale times as large as what remains.
    """
    eps = np.finfo(np.float32).eps
    return CFG.scale * steps * eps * np.abs(W).max()


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_learn_the_w_of_one(two, name):
    out, said = two
    alone = train(replace(CFG, **SCENARIOS[name]), make_source(), validate=judge)
    first, second = (np.load(out / f"{name}-{rank}.npy") for rank in (0, 1))
    assert np.array_equal(first, second)
    allowed = tolerance(alone.weights, alone.steps)
    assert np.abs(first - alone.weights).max() < allowed
    for words in said:
        expected = [alone.best_step, alone.steps, alone.stopped_early, alone.weight_init]
        assert words[name] == expected
    # The opposite: half of the batch is not the batch.
    half = replace(CFG, **SCENARIOS[name], batch_identities=CFG.batch_identities // 2)
    other = train(replace(half, patience=None, steps=max(alone.best_step, 1)), make_source())
    assert np.abs(other.weights - alone.weights).max() > 10 * allowed


def test_only_the_first_process_speaks(two):
    _, (first, second) = two
    assert first["calls"] > CFG.steps
    assert second["calls"] == 0


def test_all_stop_together_and_go_on(two):
    out, said = two
    assert [words["stopped"] for words in said] == [BREAKS_AT, BREAKS_AT]
    # Only the leader saves, and only its clock starts anew with a save.
    assert [words["overdue"] for words in said] == [BREAKS_AT, 0]
    first, second = (np.load(out / f"resumed-{rank}.npy") for rank in (0, 1))
    assert np.array_equal(first, second)
    assert np.array_equal(first, np.load(out / "plain-0.npy")), "interrupted or not, the same bits"
    # One process can go on with what two have begun.
    ours = Checkpoint(out / "run", key="k")
    assert read_safetensors(ours.path, "latentstore.checkpoint")
    alone = train(CFG, make_source(), validate=judge, checkpoint=ours)
    assert np.abs(alone.weights - first).max() < tolerance(first, CFG.steps)


def test_what_cannot_be_shared_is_refused_and_bad_rows_end_all(two):
    _, said = two
    for words in said:
        assert "batch of 7 identities cannot be shared equally by 2 processes" in words["refused"]
        assert words["diverged"] == ["step 6", True]


def test_alone_there_is_no_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() is None
    world = World()
    assert world.leads
    assert world.share(7, "identities") == slice(0, 7)
    assert world.agree("word") == "word"
    with pytest.raises(SolverUsageError, match=r"7 rows of a batch.*8 parts"):
        train(replace(CFG, batch_identities=7, per_identity=1, accumulate=8), make_source())
