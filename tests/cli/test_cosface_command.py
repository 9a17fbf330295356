"""``solve --method cosface``: every number an option, its course shown, kills and stops survived."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from cli_helpers import pair_store, paragraph
from cli_helpers import solve as invoke
from PIL import Image

from cli import guard
from cli.collection import Collection
from cli.curves import COSINE, LOSS, RETRIEVAL, STRANGERS, TRAINING, Course, Sample, samples
from latentstore.results import load
from solvers.projection import Projection

RANK, STEPS = 8, 30
SHORT = ("--rank", RANK, "--steps", STEPS, "--weight-init", "random", "--lr", 0.02)
"""A run whose best W is of a step in the middle."""
CHECKPOINT = "W.checkpoint.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_store(tmp_path_factory.mktemp("cosface"), 0.5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "W.safetensors"
    invoke(*SHORT, "--store", store, "--out", out, "--plot", out.with_suffix(".png"))
    return out


# --- what is shown and kept ---------------------------------------------------------------------------------


def test_the_course_is_in_log_results_and_plot(undisturbed: Path) -> None:
    lines = [json.loads(t) for t in undisturbed.with_suffix(".log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == sorted({r["step"] for r in lines})
    assert lines[0]["step"] == 0
    assert lines[-1]["step"] <= STEPS
    report = load(undisturbed.with_suffix(".results.json"))
    curves = {(c.plot, c.label): c for c in report.curves}
    assert {plot for plot, _ in curves} == {LOSS, RETRIEVAL, COSINE}
    assert curves[RETRIEVAL, "mAP"].y == [100 * r["map"] for r in lines]
    own, other = curves[COSINE, TRAINING], curves[COSINE, TRAINING + STRANGERS]
    assert (own.role, other.role) == ("method", "control")
    assert own.y == [r["cosine"][TRAINING] for r in lines]
    assert min(own.y) > max(other.y), "translations lie nearer to their origins than to others"
    assert report.data["latents"].startswith("Latents: ")
    assert Image.open(undisturbed.with_suffix(".png")).size[0] > 1000
    assert not undisturbed.with_name(CHECKPOINT).exists()


def test_a_cosine_is_that_of_its_pairs_and_its_control_leaves_copies_out() -> None:
    rng = np.random.default_rng(0)
    o, g, W = rng.standard_normal((5, 12)), rng.standard_normal((5, 12)), rng.standard_normal((12, 3))
    names = np.array(["a", "a", "b", "c", "d"])
    found = Sample("x", o, g, names).cosines(Projection(W, W))
    y, z = (v @ W / np.linalg.norm(v @ W, axis=1, keepdims=True) for v in (g, o))
    every = y @ z.T
    # W is kept in float32, whose rounding passes through sums of 12 numbers and a norm.
    close = 32 * float(np.finfo(np.float32).eps)
    assert found["x"] == pytest.approx(np.diagonal(every).mean(), abs=close)
    others = [every[i, j] for i in range(5) for j in range(5) if names[i] != names[j]]
    assert found["x" + STRANGERS] == pytest.approx(np.mean(others), abs=close)
    alone = Sample("x", o[:2], g[:2], names[:2]).cosines(Projection(W, W))
    assert set(alone) == {"x"}, "copies of one origin have no control"


def test_seen_and_unseen_models_are_told_apart(store: Path) -> None:
    collection = Collection.open(store)
    own = samples(collection, collection.queries("validation"))
    assert [s.label for s in own] == ["training identities", "new identities, seen models"]
    asked = Collection.open(store)
    asked.model = np.where(asked.split == "validation", "another", asked.model)
    other = samples(asked, asked.queries("validation"))
    new = ["new identities, seen models", "new identities, unseen models"]
    assert [s.label for s in other] == ["training identities", new[1]]
    # With queries of another store both are followed, each against the origins of the gallery.
    both = samples(collection, asked.queries("validation"))
    assert [s.label for s in both] == ["training identities", *new]


def test_a_resumed_course_has_every_step_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    kept = [{"step": s, "loss": 1.0, "map": None} for s in (10, 20, 30)]
    log.write_text("".join(json.dumps(r) + "\n" for r in kept) + '{"step": 4')
    course = Course(None, [], log=log, resumed=True)
    for step in (20, 30, 40):
        course.observe({"step": step, "loss": 2.0, "map": None})
    found = [json.loads(t) for t in log.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in found] == [(10, 1.0), (20, 2.0), (30, 2.0), (40, 2.0)]
    Course(None, [], log=log, resumed=False).observe({"step": 5, "loss": 3.0, "map": None})
    assert len(log.read_text().splitlines()) == 1


def test_a_run_stopped_before_its_first_validation_takes_up_its_own_start_alone(tmp_path: Path) -> None:
    class Judged:
        def ranking(self, W: Projection) -> Any:
            return type("Ranking", (), {"map": float(abs(W.query_map[0, 0])), "acc": 0.5})

    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0, "loss": null, "map": 0.9}\n{"step": 40, "loss": 1.0, "map": 0.95}\n')
    first = Course(Judged(), [], log=log)  # type: ignore[arg-type]
    for start in (0.25, 0.5):  # two starts are tried, and the better one is taken
        first.validate(type("Snapshot", (), {"step": 0, "weights": np.full((2, 1), start, np.float32)}))
    again = Course(None, [], log=log, resumed=True)
    again.observe({"step": 60, "loss": 2.0, "map": 0.6})
    found = [json.loads(t) for t in log.read_text().splitlines()]
    assert [(r["step"], r["map"]) for r in found] == [(0, 0.5), (60, 0.6)]


# --- stopped, killed, gone on with --------------------------------------------------------------------------

# Where the tests run in a shell's background, their processes inherit that Ctrl-C is ignored.
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["latentstore", *sys.argv[1:]]
from cli.app import main
main()
"""
SLOW = """
import time
from solvers.state import State
whole = State.step
State.step = lambda self, *a: (time.sleep(0.05), whole(self, *a))[1]
"""


@contextmanager
def started(folder: Path, store: Path, *words: Any) -> Iterator[subprocess.Popen[str]]:
    """A slowed run in a process of its own, once it has a checkpoint and two validations."""
    out = folder / "W.safetensors"
    options = [
        "solve",
        "--method",
        "cosface",
        *SHORT,
        "--store",
        store,
        "--out",
        out,
        "--checkpoint-every",
        0,
    ]
    job = subprocess.Popen(
        [sys.executable, "-c", SLOW + MAIN, *map(str, [*options, *words])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, deadline = out.with_suffix(".log.jsonl"), time.monotonic() + 100
    while time.monotonic() < deadline and job.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > 3 and (folder / CHECKPOINT).exists():
            break
        time.sleep(0.01)
    try:
        yield job
    finally:
        job.kill()
        job.communicate()


def same_w(one: Path, other: Path) -> bool:
    a, b = Projection.load(one), Projection.load(other)
    return all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in ("query_map", "spectrum"))


def course(out: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(t) for t in out.with_suffix(".log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["map"], r["acc"], r["cosine"]) for r in lines]


def test_kill_9_and_the_same_command_again_ends_with_the_same_bytes(
    folder: Path, store: Path, undisturbed: Path
) -> None:
    with started(folder, store) as job:
        job.send_signal(signal.SIGKILL)
        assert job.wait(timeout=30) == -9
    assert not (folder / "W.safetensors").exists()
    done = invoke(*SHORT, "--store", store, "--out", "W.safetensors")
    assert "Going on from W.checkpoint.safetensors" in done.stderr
    assert same_w(folder / "W.safetensors", undisturbed)
    assert not (folder / CHECKPOINT).exists()
    # The last losses and figures follow from the whole state: they are the same to the last bit.
    assert course(folder / "W.safetensors") == course(undisturbed)
    assert 0 < load(folder / "W.results.json").settings["steps"] == STEPS
    invoke(*SHORT, "--store", store, "--out", "V.safetensors", "--seed", "1")
    assert not same_w(folder / "V.safetensors", undisturbed), "else any run would pass"


def test_the_checkpoint_stands_until_the_results_are_written(
    folder: Path, store: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "W.safetensors"
    stale = out.with_suffix(".results.json")
    stale.write_text("{}")
    with monkeypatch.context() as stopped:
        stopped.setattr("cli.measure.fit_controls", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        invoke(*SHORT, "--store", store, "--out", out, code=130)
    assert (folder / CHECKPOINT).exists()
    assert not stale.exists(), "the results of another W"
    monkeypatch.setattr("solvers.state.State.step", lambda *a: pytest.fail("a step was taken again"))
    invoke(*SHORT, "--store", store, "--out", out)
    assert same_w(out, undisturbed)
    assert stale.exists()
    assert not (folder / CHECKPOINT).exists()


def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path, store: Path, undisturbed: Path) -> None:
    with started(folder, store) as job:
        job.send_signal(signal.SIGINT)
        out, said = job.communicate(timeout=60)
    assert (out, job.returncode) == ("", 130)
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"Stopped after step \d+ of {STEPS}\. .*{CHECKPOINT} holds the run: "
        r"run the same command again to go on from there\.",
        last,
    )
    invoke(*SHORT, "--store", store, "--out", "W.safetensors")
    assert same_w(folder / "W.safetensors", undisturbed)


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, guard.INTERRUPTED), (signal.SIGTERM, guard.TERMINATED)]
)
def test_a_signal_is_held_back_once(sent: signal.Signals, code: int) -> None:
    heard: list[str] = []

    @guard.guarded
    def command(times: int) -> None:
        with guard.stoppable(heard.append) as came:
            assert came() is None
            for _ in range(times):
                signal.raise_signal(sent)
            heard.append("went on")
            found = came()
            assert found is not None
            raise type(found)("Stopped by itself.")

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for times, words in ((1, ["Stopping at", "went on"]), (2, ["Stopping at"])):
            heard.clear()
            with pytest.raises(typer.Exit) as ended:
                command(times)
            assert ended.value.exit_code == code
            assert [h[:11].strip() for h in heard] == [w[:11] for w in words]
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert signal.getsignal(signal.SIGTERM) is before[1]


def left_over(folder: Path, store: Path) -> None:
    """A checkpoint as a stopped run leaves it, made in this process."""
    from cli import training

    whole = training.stoppable

    @contextmanager
    def stop_at_once(say: Any) -> Iterator[Any]:
        yield KeyboardInterrupt

    training.stoppable = stop_at_once  # type: ignore[assignment]
    try:
        invoke(*SHORT, "--store", store, "--out", folder / "W.safetensors", code=130)
    finally:
        training.stoppable = whole
    assert (folder / CHECKPOINT).exists()


def test_another_runs_checkpoint_and_a_damaged_one_are_refused_until_fresh(
    folder: Path, store: Path, undisturbed: Path
) -> None:
    left_over(folder, store)
    words = (*SHORT, "--store", store, "--out", "W.safetensors")
    said = paragraph(invoke(*words, "--seed", 1, code=2))
    assert "seed is 1 now and was 0" in said
    assert "--fresh starts anew" in said
    invoke("--rank", RANK, "--store", store, "--out", "P.safetensors", method="pca")
    said = paragraph(invoke(*words[:4], *words[6:], "--init", "P.safetensors", code=2))
    assert "weight_init" in said or "init is" in said
    checkpoint = folder / CHECKPOINT
    bad = bytearray(checkpoint.read_bytes())
    bad[-100] ^= 1
    checkpoint.write_bytes(bad)
    said = paragraph(invoke(*words, code=2))
    assert "checksum" in said
    assert checkpoint.exists()
    invoke(*words, "--fresh")
    assert same_w(folder / "W.safetensors", undisturbed)


# --- several processes --------------------------------------------------------------------------------------


def test_two_processes_find_the_w_of_one_and_the_first_alone_speaks(
    folder: Path, store: Path, undisturbed: Path
) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "cli", "solve", "--method", "cosface", *SHORT, "--store", store, "--out", "W.safetensors",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("W by cosface") == 1
    assert done.stderr.count("Latents: ") == 1
    assert not (folder / CHECKPOINT).exists()
    found, whole = (Projection.load(p).query_map for p in (folder / "W.safetensors", undisturbed))
    # Sums in another order differ by eps32 a step, and each step carries the errors before it on.
    assert 0 < np.abs(found - whole).max() <= 1000 * np.finfo(np.float32).eps * np.abs(whole).max()
    assert (
        load(folder / "W.results.json").reproduce[0].startswith("torchrun --standalone --nproc-per-node 2 -m")
    )
