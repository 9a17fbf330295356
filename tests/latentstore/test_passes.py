"""The pass over a store's pairs: the same sums, kept or not, killed and resumed, by workers, grown."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file
from store_worlds import make_store, rows_of

from cli import gallery, kept, merging
from cli.collection import Collection
from cli.gallery import gallery_sums
from cli.passes import PairPass
from cli.summing import run_moments
from latentstore.cluster import connect
from latentstore.errors import StoreWriteError, UsageError
from latentstore.removal import remove
from latentstore.store import open_store
from solvers.moments import Moments
from solvers.sums import RowSums

DIM, IDENTITIES, PER, SHARD = 24, 300, 2, 84
ROWS = IDENTITIES * (1 + PER)
SLOW = """
import sys, time
from pathlib import Path
from cli.collection import Collection
from solvers.sums import PairSums
whole = PairSums.add
PairSums.add = lambda self, *a: (time.sleep(0.2), whole(self, *a))[1]
Collection.open(Path(sys.argv[1])).pair_pass("train").run()
"""


def world(n=IDENTITIES, seed=0):
    """Origins, each followed by its translations, by two models in turn; all in the training split."""
    rng = np.random.default_rng(seed)
    o = rng.standard_normal((n, 1, DIM)) * np.linspace(2, 0.5, DIM) + 1
    t = 0.3 * rng.standard_normal((n, PER, DIM))
    latents = np.concatenate([o, o + t], axis=1).reshape(-1, DIM).astype(np.float16)
    k = np.arange(len(latents)) % (1 + PER)
    names = np.repeat([f"photo {i}" for i in range(n)], 1 + PER)
    inputs = rows_of(
        len(latents),
        identity=list(names),
        group=list(names),
        role=["translation" if i else "origin" for i in k],
        split=["train"] * len(latents),
        model=[["", "A", "B"][i] for i in k],
    )
    return latents, inputs


@pytest.fixture
def collection(tmp_path):
    latents, inputs = world()
    make_store(tmp_path / "s.zarr", latents, inputs=inputs)
    return Collection.open(tmp_path / "s.zarr")


def assert_same(a, b, tolerance=1e-6):
    """As the float32 tiles of half-precision latents allow, in units of the matrix's norm."""
    assert (a.pairs.n, a.origins.n) == (b.pairs.n, b.origins.n)
    for name in ("second_t", "cov_oo", "cov_og", "cov_gg", "mean_g"):
        x, y = getattr(a.pairs, name), getattr(b.pairs, name)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name
    assert np.linalg.norm(a.origins.cov - b.origins.cov) <= tolerance * np.linalg.norm(b.origins.cov)


def bits(plan):
    """Every number of every kept part. (The order of the facts in a file's head is the library's whim.)"""
    files = sorted(plan.folder.glob("*.safetensors"))
    return {f.name: {k: v.tobytes() for k, v in load_file(f).items()} for f in files}


def exact(collection, wanted=lambda model: True):
    """The same numbers by a plain float64 product over all rows."""
    o, g = collection.pairs("train")
    own = np.array([wanted(collection.model[row]) for row in g])
    x, y = collection.read(o[own]).astype(np.float64), collection.read(g[own]).astype(np.float64)
    t, first = y - x, collection.read(np.unique(o[own])).astype(np.float64)
    return {"second_t": t.T @ t / len(t), "origins": np.cov(first.T, bias=True), "n": len(t)}


def test_parts_kept_or_not_are_the_pairs(collection):
    plan = collection.pair_pass("train")
    assert len(plan.tasks) == 10
    assert {row for task in plan.tasks for row in task.translations} == set(collection.pairs("train")[1])
    homes = {}
    for task in plan.tasks:
        for row in task.origins.tolist():
            assert homes.setdefault(collection.group[row], task.part) == task.part, "a photo is in one part"
    assert not plan.done()
    assert plan.run() == 10
    assert plan.done()
    assert plan.run() == 0, "what is kept is not made again"
    found, truth = plan.moments(), exact(collection)
    assert found.pairs.n == truth["n"] == IDENTITIES * PER
    assert found.origins.n == IDENTITIES
    assert np.linalg.norm(found.pairs.second_t - truth["second_t"]) < 1e-6 * np.linalg.norm(truth["second_t"])
    assert np.linalg.norm(found.origins.cov - truth["origins"]) < 1e-6 * np.linalg.norm(truth["origins"])
    assert_same(plan.in_memory(), found)
    one_out = plan.moments(without=[3])
    assert one_out.pairs.n == found.pairs.n - len(plan.tasks[3].translations)
    with pytest.raises(AssertionError):
        assert_same(one_out, found)


def test_each_model_and_the_pool_come_from_one_pass(collection):
    plan = collection.pair_pass("train", models=True, parts=4)
    plan.run()
    for model in ("A", "B"):
        truth, found = exact(collection, lambda m, model=model: m == model), plan.moments(model)
        assert found.pairs.n == truth["n"] == IDENTITIES
        assert np.linalg.norm(found.pairs.second_t - truth["second_t"]) < 1e-6 * np.linalg.norm(
            truth["second_t"]
        )
    pooled = plan.moments()
    assert pooled.origins.n == IDENTITIES, "an origin that both models translated counts once"
    assert_same(pooled, collection.pair_pass("train").in_memory())


def test_a_killed_pass_goes_on_and_changes_nothing(collection, tmp_path):
    root = collection.store.path
    undisturbed = collection.pair_pass("train")
    undisturbed.run()
    expected = bits(undisturbed)
    kept.drop(collection.store)
    assert not undisturbed.done()
    job = subprocess.Popen([sys.executable, "-c", SLOW, str(root)])
    deadline = time.monotonic() + 60
    while not list(undisturbed.folder.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    done = len(list(undisturbed.folder.glob("*.safetensors")))
    assert 1 <= done < 10
    told = []
    assert undisturbed.run(on_rows=lambda rows, bad: told.append(rows)) == 10 - done
    assert 0 < sum(told) < IDENTITIES * PER, "finished parts are not read again"
    assert bits(undisturbed) == expected
    # What the kill left is swept once it cannot be anybody's.
    left = undisturbed.folder / ".left.1.partial"
    left.touch()
    os.utime(left, (1, 1))
    next(undisturbed.folder.glob("*.safetensors")).unlink()
    undisturbed.run()
    assert not left.exists()


def test_workers_make_the_same_parts(collection):
    alone = collection.pair_pass("train")
    alone.run()
    expected = bits(alone)
    assert len(expected) == 11, "ten parts and their total"
    kept.drop(collection.store)
    with connect(workers=2) as client:
        assert alone.run(client=client) == 10
    assert bits(alone) == expected
    assert not list(alone.folder.glob("*.partial")), "what was merged on the way is gone"


@pytest.mark.parametrize("models", [False, True])
def test_the_total_is_the_parts_and_stands_in_for_them(collection, models):
    plan = collection.pair_pass("train", models=models, parts=7)
    plan.run()
    kept_total = plan.moments()
    plan.total.unlink()
    assert_same(plan.moments(), kept_total, 1e-14)  # the order of float64 additions alone
    assert plan.run() == 0
    assert plan.total.is_file(), "a pass that was stopped before its end makes it"
    data = bytearray(plan.total.read_bytes())
    data[-9] ^= 1
    plan.total.write_bytes(bytes(data))
    assert_same(plan.moments(), kept_total, 1e-14)
    assert plan.run() == 0
    assert_same(Moments.load(plan.total)[0], kept_total, 0.0)  # made anew
    for task in plan.tasks:
        plan.path(task).unlink()
    with pytest.raises(UsageError, match="no pairs"):
        plan.moments(without=range(7))


@pytest.mark.parametrize("again", [True, False])
def test_a_pass_that_is_stopped_at_its_total_is_taken_up(collection, monkeypatch, again):
    """What was asked is known as soon as all parts are kept; where it is not, the next run writes it down."""

    def stopped(*args, **options):
        raise KeyboardInterrupt

    plan = collection.pair_pass("train", models=True, parts=7)
    monkeypatch.setattr("cli.passes.merge_tree", stopped)
    with pytest.raises(KeyboardInterrupt):
        plan.run()
    monkeypatch.undo()
    assert not plan.total.exists()
    if again:
        plan.folder.joinpath("plan-7-models.json").unlink()
        assert plan.run() == 0
    monkeypatch.setattr(PairPass, "in_memory", lambda *a: pytest.fail("read again"))
    assert Collection.open(collection.store.path).data.moments.pairs.n == IDENTITIES * PER


@pytest.mark.parametrize("workers", [0, 2])
def test_a_merge_that_fails_leaves_nothing_behind(collection, monkeypatch, workers):
    plan = collection.pair_pass("train", models=True, parts=4)
    plan.run()
    plan.total.unlink()
    shared = next(plan.path(t) for t in plan.tasks if t.model is None)
    shared.write_bytes(b"torn")
    monkeypatch.setattr(plan, "_all_origins", lambda tasks: RowSums.load(shared))
    if workers:
        with connect(workers=workers) as client:
            assert plan.run(client=client) == 0
    else:
        assert plan.run() == 0
    assert not plan.total.exists()
    assert not list(plan.folder.glob(".*"))


def test_a_merge_counts_its_matrices(collection, monkeypatch):
    need = kept.MERGE_MATRICES * 8 * DIM**2
    monkeypatch.setattr(kept, "free_memory", lambda: need - 1)
    with pytest.raises(UsageError, match=r"\(8 matrices of 24 x 24"):
        collection.pair_pass("train").run()
    asked = []
    whole = merging.merge_tree
    monkeypatch.setattr("cli.passes.free_memory", lambda: 3 * need)
    monkeypatch.setattr("cli.passes.merge_tree", lambda *a, **k: asked.append(k) or whole(*a, **k))
    monkeypatch.setattr(kept, "free_memory", lambda: need)
    collection.pair_pass("train").run()
    assert asked == [{"at_once": 3}]


def test_solve_takes_up_what_is_kept(collection, monkeypatch):
    plan = collection.pair_pass("train")
    assert not plan.pays, "sums larger than the latents are not kept unasked"
    assert collection.data.moments.pairs.n == IDENTITIES * PER
    assert not plan.folder.exists()
    plan.run()
    monkeypatch.setattr(PairPass, "in_memory", lambda *a: pytest.fail("read again"))
    again = Collection.open(collection.store.path)
    assert_same(again.data.moments, plan.moments())
    monkeypatch.undo()
    monkeypatch.setattr("cli.passes.SHARE", 1e9)
    kept.drop(collection.store)
    unasked = Collection.open(collection.store.path)
    assert unasked.data.moments.pairs.n == IDENTITIES * PER
    assert plan.done()


@pytest.mark.parametrize("how", ["torn", "flipped", "gone"])
def test_a_damaged_part_is_summed_anew(collection, how):
    plan = collection.pair_pass("train", parts=2)
    plan.run()
    expected = plan.moments(without=[1])
    path = plan.path(plan.tasks[0])
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[-9] ^= 1
    path.write_bytes(bytes(data if how == "flipped" else data[:100]))
    if how == "gone":
        path.unlink()
    assert_same(plan.moments(without=[1]), expected, 0.0)
    assert not path.exists()
    assert plan.run() == 1


def test_whatever_parts_are_kept_are_taken_up(collection, monkeypatch):
    kept_now = run_moments(collection.store.path, parts=3, models=True)
    assert (kept_now.made, kept_now.models) == (9, ["A", "B"])
    monkeypatch.setattr(PairPass, "in_memory", lambda *a: pytest.fail("read again"))
    again = Collection.open(collection.store.path)
    assert (again.data.moments.pairs.n, again.data.moments.origins.n) == (IDENTITIES * PER, IDENTITIES)


def test_what_nobody_asked_to_be_kept_may_fail_to_be(collection, monkeypatch):
    def full(*args):
        raise StoreWriteError("no room")

    monkeypatch.setattr("cli.passes.SHARE", 1e9)
    monkeypatch.setattr("cli.gallery.SHARE", 1e9)
    for module in ("passes", "gallery"):
        monkeypatch.setattr(f"cli.{module}.prepare_folder", full)
    assert collection.data.moments.pairs.n == IDENTITIES * PER
    assert collection.data.gallery_spectrum.n == IDENTITIES
    with pytest.raises(StoreWriteError):  # asked for, it is told
        collection.pair_pass("train").run()


def test_latents_that_change_while_they_are_summed_are_refused(collection, monkeypatch):
    """A takedown in between must not come back in kept sums."""
    plan = collection.pair_pass("train", parts=2)
    told = []

    def take_down(rows, bad):
        if not told:
            remove(collection.store.path, [0, 1, 2], reason="asked")
        told.append(rows)

    with pytest.raises(UsageError, match="was changed"):
        plan.run(on_rows=take_down)
    assert not list(collection.store.root.rglob("moments/**/*.safetensors"))
    other = Collection.open(collection.store.path)
    told.clear()
    monkeypatch.setattr(gallery, "SHARDS", 2)

    def take_more_down(rows, bad):
        if not told:
            remove(collection.store.path, [3, 4, 5], reason="asked")
        told.append(rows)

    with pytest.raises(UsageError, match="was changed"):
        gallery_sums(other.store, other.gallery, keep=True, on_rows=take_more_down)
    assert not list(collection.store.root.rglob("moments/**/*.safetensors"))


def test_an_identity_of_several_groups_counts_once(tmp_path):
    latents, inputs = world(40)
    own = inputs.set_column(
        inputs.schema.get_field_index("group"), "group", pa.array([f"g{i}" for i in range(len(latents))])
    )
    make_store(tmp_path / "s.zarr", latents, inputs=own)
    plan = Collection.open(tmp_path / "s.zarr").pair_pass("train")
    plan.run()
    assert plan.moments().origins.n == plan.in_memory().origins.n == 40


def test_other_latents_have_other_parts(collection, tmp_path):
    plan = collection.pair_pass("train", parts=2)
    plan.run()
    latents, inputs = world(seed=1)
    make_store(tmp_path / "t.zarr", latents, inputs=inputs)
    other = Collection.open(tmp_path / "t.zarr").pair_pass("train", parts=2)
    assert other.folder.name != plan.folder.name
    # In one store, old parts go when new ones come, once nobody can be at them.
    old, fresh, finished = (plan.folder.parent / f"pairs-{digit * 16}" for digit in "012")
    for folder in (old, fresh, finished):
        folder.mkdir()
    os.utime(old, (1, 1))
    (finished / "plan-2.json").write_text("{}")
    plan.run()
    assert {p.name for p in plan.folder.parent.glob("pairs-*")} == {plan.folder.name, fresh.name}


def test_a_changed_latent_changes_its_block_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SHARDS", 2)
    latents, inputs = world()
    first = make_store(tmp_path / "a.zarr", latents[: 6 * SHARD], inputs=inputs.slice(0, 6 * SHARD))
    rows = np.arange(len(first))
    gallery_sums(first, rows, keep=True)
    latents[0, 0] += 1
    other = make_store(tmp_path / "b.zarr", latents[: 6 * SHARD], inputs=inputs.slice(0, 6 * SHARD))
    shutil.copytree(first.root / "moments", other.root / "moments", dirs_exist_ok=True)
    made = []
    whole = gallery.sum_rows
    monkeypatch.setattr(gallery, "sum_rows", lambda *a, **k: made.append(len(a[1])) or whole(*a, **k))
    sums = gallery_sums(other, rows, keep=True)
    assert made == [2 * SHARD]
    exact_cov = np.cov(latents[: 6 * SHARD].astype(np.float64).T, bias=True)
    assert np.linalg.norm(sums.cov - exact_cov) < 1e-6 * np.linalg.norm(exact_cov)
    # Kept blocks are read also where nothing can be written.
    made.clear()
    monkeypatch.setattr(kept, "writable", lambda store: False)
    gallery_sums(other, rows)
    assert made == []


def test_a_gallery_that_grew_sums_its_new_end_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SHARDS", 2)
    latents, inputs = world()
    small = make_store(tmp_path / "small.zarr", latents[: 6 * SHARD], inputs=inputs.slice(0, 6 * SHARD))
    rows = np.arange(len(small))

    def read_rows(store, rows):
        told = []
        sums = gallery_sums(store, rows, keep=True, on_rows=lambda n, bad: told.append(n))
        return sums, told

    made = []
    whole = gallery.sum_rows
    monkeypatch.setattr(gallery, "sum_rows", lambda *a, **k: made.append(len(a[1])) or whole(*a, **k))
    first, told = read_rows(small, rows)
    assert (made, sum(told)) == ([2 * SHARD] * 3, 6 * SHARD)
    again, told = read_rows(small, rows)
    assert (len(made), sum(told)) == (3, 6 * SHARD), "kept blocks are not read again"
    assert np.array_equal(first.xx, again.xx)
    # The collection grows: its new end alone is summed.
    made.clear()
    grown = make_store(tmp_path / "grown.zarr", latents[: 8 * SHARD], inputs=inputs.slice(0, 8 * SHARD))
    shutil.copytree(small.root / "moments", grown.root / "moments", dirs_exist_ok=True)
    read_rows(grown, np.arange(len(grown)))
    assert made == [2 * SHARD]
    # A row fewer in the first block: that block alone is summed again.
    made.clear()
    fewer, _ = read_rows(small, rows[1:])
    assert made == [2 * SHARD - 1]
    exact_cov = np.cov(latents[1 : 6 * SHARD].astype(np.float64).T, bias=True)
    assert np.linalg.norm(fewer.cov - exact_cov) < 1e-6 * np.linalg.norm(exact_cov)
    assert len(list((small.root / "moments" / "latents" / "gallery").glob("*.safetensors"))) == 3
    # A damaged block is made again.
    block = next((small.root / "moments" / "latents" / "gallery").glob("*.safetensors"))
    block.write_bytes(b"\x00" * 40)
    repaired, _ = read_rows(small, rows[1:])
    assert np.allclose(repaired.cov, fewer.cov, rtol=0, atol=1e-6)


def test_kept_sums_leave_the_store_a_zarr_group(collection):
    import zarr

    collection.pair_pass("train", parts=2).run()
    gallery_sums(collection.store, collection.gallery, keep=True)
    names = {name for name, _ in zarr.open_group(collection.store.root, mode="r").members()}
    assert "moments" in names  # and no warning, which would be an error here
    assert open_store(collection.store.path).counts() == {"ok": ROWS}


def test_what_memory_cannot_hold_is_refused_with_its_bytes(collection, monkeypatch):
    need = kept.PAIR_MATRICES * 8 * DIM**2
    monkeypatch.setattr(kept, "free_memory", lambda: need)
    assert collection.data.moments.pairs.n == IDENTITIES * PER
    monkeypatch.setattr(kept, "free_memory", lambda: need - 1)
    with pytest.raises(UsageError, match=r"24 numbers take .*\(13 matrices of 24 x 24 in float64"):
        _ = Collection.open(collection.store.path).data.moments
    monkeypatch.undo()
    assert 0 < kept.free_memory() < 1 << 50
