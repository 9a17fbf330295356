"""The kept index: what the store holds, projected, whatever happened on the way there."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from slow_index import project
from store_worlds import make_store, rows_of, write_shard

from latentstore import approximate, indexing, removal
from latentstore.errors import CorruptStoreError, StoreFormatError, StoreWriteError, UsageError
from latentstore.index import Index, folder_of, kept
from latentstore.removal import remove
from latentstore.schema import OK, STATUS_CODE
from latentstore.search import has_faiss
from latentstore.store import open_store, writing

W = "f" * 16
DIM = 24
faiss_only = pytest.mark.skipif(not has_faiss(), reason="FAISS is not installed")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several commits in a store of a few shards."""
    monkeypatch.setattr(indexing, "PIECE", 64)
    monkeypatch.setattr(indexing, "BLOCK", 150)


def latents_of(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float16)


def a_store(root, n=500, *, status=None):
    inputs = rows_of(n, identity=[f"i{i}" for i in range(n)])
    return make_store(root, latents_of(n), status=status, inputs=inputs)


def grown(root, n):
    """Append images to a store, and write the shards that they change."""
    with writing(root):
        store = open_store(root)
        before = len(store)
        new = rows_of(n, identity=[f"i{i}" for i in range(n)]).slice(before)
        store = store.extend(new)
        for shard in store.todo():
            write_shard(store, shard, latents_of(n), np.full(n, OK, np.uint8), store.inputs())
    return open_store(root)


def wanted(store):
    return np.flatnonzero(store.status() == OK)


def update(store, folder=None, *, by=project, rows=None, **options):
    folder = folder or folder_of(store, W)
    indexing.prepare(store, folder)
    rows = wanted(store) if rows is None else rows
    done = indexing.update(store, folder, by, rows, fingerprint=W, **options)
    return Index.open(folder), done


def contents(index):
    """Row → the bytes of its vector; no row may be there twice."""
    found = [(r, v.tobytes()) for rows, block in index.blocks() for r, v in zip(rows, block, strict=True)]
    assert len(dict(found)) == len(found)
    return dict(found)


def expected(store):
    store = open_store(store.root)  # its reader may hold files that were replaced since
    rows = wanted(store)
    return {r: v.tobytes() for r, v in zip(rows, project(store.reader.gather(rows)), strict=True)}


def assert_current(index, store):
    assert index.data_hash == store.data_hash()
    assert contents(index) == expected(store)
    assert index.check() == []


@pytest.fixture
def store(tmp_path):
    return a_store(tmp_path / "s.zarr")


# --- made, searched -----------------------------------------------------------------------------------------


def test_an_index_holds_every_row_projected(store):
    seen = []
    index, done = update(store, on_start=lambda *a: seen.append(a), on_rows=lambda *a: seen.append(a))
    assert_current(index, store)
    assert (done.added, done.removed, done.kept) == (500, 0, 0)
    assert seen[0] == (500, 500)
    assert sum(n for n, _ in seen[1:]) == 500
    assert len(index) == 500
    assert index.references.shape == (500, DIM + 1)
    assert isinstance(index.references, np.memmap)
    assert not isinstance(next(index.blocks())[1], np.memmap)


def test_bad_rows_are_not_in_it(tmp_path):
    status = np.full(300, OK, np.uint8)
    status[5::7] = STATUS_CODE["unreadable"]
    store = a_store(tmp_path / "s.zarr", 300, status=status)
    index, _ = update(store)
    assert_current(index, store)
    assert len(index) == (status == OK).sum()


def test_searching_it_is_brute_force(store):
    index, _ = update(store)
    refs = project(store.reader.gather(np.arange(500))).astype(np.float64)
    queries = np.random.default_rng(1).standard_normal((9, DIM + 1)).astype(np.float32)
    exact = queries.astype(np.float64) @ refs.T
    scores, rows = index.search(queries, 7)
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1, kind="stable")[:, :7])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), rtol=1e-13)
    assert (np.linalg.norm(refs, axis=1) <= index.body["largest"]).all()


def test_zarr_lists_the_store_without_a_warning(store):
    update(store)
    assert W in dict(zarr.open_group(store.root / "index", mode="r").members())
    assert "index" in dict(zarr.open_group(store.root, mode="r").members())


# --- added, removed, changed --------------------------------------------------------------------------------


def counting(seen):
    def counted(latents):
        seen.append(int(latents.any(axis=1).sum()))
        return project(latents)

    return counted


def test_added_images_alone_are_projected(store):
    update(store)
    seen = []
    store = grown(store.root, 600)
    index, done = update(store, by=counting(seen))
    assert_current(index, store)
    # Rows 420 to 499 stood in a shard that was not full: it is another one now.
    assert sum(seen) == done.added == 600 - 5 * 84
    assert len(index.rows) == 600, "the places of the rows made again are used again"


def test_nothing_is_done_when_nothing_changed(store):
    before, _ = update(store)
    index, done = update(store, by=None)
    assert (done.added, done.kept) == (0, 500)
    assert contents(index) == contents(before)


def test_rows_that_are_no_longer_wanted_are_taken_out(store):
    update(store)
    index, done = update(store, rows=wanted(store)[100:], by=None)
    assert (done.added, done.removed) == (0, 100)
    assert min(contents(index)) == 100
    assert not index.references[:100].any()
    again, done = update(store)
    assert done.added == 168, "their two shards"
    assert_current(again, store)


def test_a_removal_takes_the_bytes_out_at_once_and_no_image_is_projected_again(store, tmp_path):
    index, _ = update(store)
    gone = [3, 250, 251]
    secret = [index.references[r].tobytes() for r in gone]
    copy, _ = update(store, tmp_path / "elsewhere")
    remove(store.root, gone)
    bytes_now = (index.folder / "references.f32").read_bytes()
    assert not any(s in bytes_now for s in secret)
    assert not index.references[gone].any(), "a map that was open before sees it, too"
    index = Index.open(index.folder)
    assert set(gone).isdisjoint(contents(index))
    assert_current(index, open_store(store.root))
    assert update(open_store(store.root), by=None)[1].added == 0
    # What is kept elsewhere is out of reach, and no longer current.
    assert contents(copy).keys() > contents(index).keys()
    assert copy.data_hash != open_store(store.root).data_hash()


def test_it_knows_that_it_was_changed_since_it_was_opened(store):
    index, _ = update(store)
    assert not index.changed()
    remove(store.root, [7])
    assert index.changed()
    index = Index.open(index.folder)
    assert not index.changed()
    # While it is being changed, too: before the first reference is.
    seen = []
    update(grown(store.root, 600), by=lambda x: (seen.append(index.changed()), project(x))[1])
    assert all(seen)
    index = Index.open(index.folder)
    indexing.drop(index.folder)
    assert index.changed()


def test_a_removal_takes_the_bytes_out_before_it_turns_to_the_shards(store, monkeypatch):
    index, _ = update(store)
    monkeypatch.setattr(removal, "finish", lambda root: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remove(store.root, [7])
    assert not index.references[7].any()
    assert not Index.open(index.folder).data_hash, "until the shards are without it, too"


def test_a_removal_reaches_an_index_that_is_not_current(store):
    update(store)
    store = grown(store.root, 600)
    remove(store.root, [7])
    index = Index.open(folder_of(store, W))
    assert not index.data_hash
    assert not index.references[7].any()
    assert_current(update(open_store(store.root))[0], open_store(store.root))


@pytest.mark.parametrize("name", ["index.json", "references.f32", "rows.i64"])
def test_a_removal_deletes_an_index_that_is_damaged(store, name):
    index, _ = update(store)
    (index.folder / name).write_bytes(b"?")
    remove(store.root, [7])
    assert not index.folder.exists()


def test_a_removal_during_an_update(store):
    """The update holds the lock for a block at a time; what it wrote of the row before is taken out."""
    threads = []

    def removing(latents):
        if not threads:
            threads.append(threading.Thread(target=remove, args=(store.root, [7])))
            threads[0].start()
            time.sleep(0.3)
        return project(latents)

    with suppress(UsageError):  # "was changed", if a shard that is read later had lost the row by then
        update(store, by=removing)
    threads[0].join()
    assert 7 not in Index.open(folder_of(store, W)).rows
    store = open_store(store.root)
    assert_current(update(store)[0], store)


def encoded_again(store):
    """Replace shard 1 (rows 84 to 167) by other latents; return those of all rows."""
    latents = latents_of(500)
    latents[84:168] = latents_of(84, seed=9)
    with writing(store.root):
        (store.root / "done" / "000001.json").unlink()
        write_shard(store, 1, latents, np.full(500, OK, np.uint8), store.inputs())
    return latents


def test_a_changed_shard_is_made_again(store):
    index, _ = update(store)
    store.reader.gather([90])  # its reader has the shard open
    encoded_again(store)
    assert index.data_hash != store.data_hash()
    index, done = update(store)
    assert done.added == 84
    assert_current(index, store)


def test_an_index_made_step_by_step_is_the_one_made_at_once(tmp_path):
    """Products of blocks of one size: a vector depends on its row alone, not on how it came here."""
    rng = np.random.default_rng(0)
    M = rng.standard_normal((DIM, 16)).astype(np.float32)
    store = a_store(tmp_path / "s.zarr", 333)
    update(store, by=lambda x: x.astype(np.float32) @ M)
    store = grown(store.root, 700)
    index, _ = update(store, by=lambda x: x.astype(np.float32) @ M)
    once, _ = update(store, tmp_path / "once", by=lambda x: x.astype(np.float32) @ M)
    assert contents(index) == contents(once)


# --- interrupted --------------------------------------------------------------------------------------------


class PowerError(Exception):
    """It failed."""


def power_for(monkeypatch, writes):
    """Let so many writes succeed; of the next one half reaches the disk. Returns what mends it."""
    real, left = {name: getattr(indexing, name) for name in ("_put", "write_body")}, [writes]

    def written(name, *words):
        left[0] -= 1
        if left[0] >= 0:
            return real[name](*words)
        if name == "_put" and len(words[1]):
            half = len(words[1]) // 2
            real[name](words[0], words[1][:half], words[2][:half])
        raise PowerError

    def mend():
        for name, function in real.items():
            monkeypatch.setattr(indexing, name, function)

    for name in real:
        monkeypatch.setattr(indexing, name, lambda *words, name=name: written(name, *words))
    return mend


def prepared(root, what):
    """A store before a change to its index, and the change."""
    store = a_store(root, 330)
    if what == "make":
        return store, lambda: update(store)
    update(store)
    if what == "remove":
        return store, lambda: remove(root, [3, 200])
    if what == "fewer":
        return store, lambda: update(store, rows=wanted(store)[40:])
    if what == "more":
        update(store, rows=wanted(store)[40:])
        return store, lambda: update(store)
    larger = grown(root, 420)
    return larger, lambda: update(larger)


@pytest.mark.parametrize("what", ["make", "grow", "fewer", "more", "remove"])
def test_a_failure_at_any_write_is_made_good(tmp_path, monkeypatch, what):
    """Every write in turn is the last one. What is removed next is nowhere, whatever had been written."""
    for writes in range(100):
        store, change = prepared(tmp_path / f"{writes}.zarr", what)
        mend = power_for(monkeypatch, writes)
        try:
            change()
            ended = True
        except PowerError:
            ended = False
        mend()
        store, folder = open_store(store.root), folder_of(store, W)
        if kept(store.root) and not ended:
            assert_never_wrong(Index.open(folder), store)
        gone = [3, 200] if what == "remove" else [5, 329, len(store) - 1]
        secrets = project(latents_of(len(store))[gone])
        remove(store.root, [] if what == "remove" else gone)
        store, written = open_store(store.root), (folder / "references.f32").read_bytes()
        assert not any(secret.tobytes() in written for secret in secrets)
        if kept(store.root):
            assert_never_wrong(Index.open(folder), store)
        index, _ = update(store)
        assert_current(index, store)
        assert not index.references[index.rows < 0].any()
        if ended:
            assert writes > 3
            return
    raise AssertionError("it never ended")


def assert_never_wrong(index, store):
    """An index that says it is current is; one that does not has no row twice, and none with another's."""
    assert contents(index).keys() <= set(range(len(store)))
    assert not any("differ" in finding for finding in index.check())
    if index.data_hash == store.data_hash():
        whole = expected(store)
        # Of all rows, or of those from 40 on, where these were asked for.
        assert contents(index) in (whole, {row: vector for row, vector in whole.items() if row >= 40})


def test_a_kill_in_the_middle(tmp_path):
    store = a_store(tmp_path / "s.zarr", 800)
    folder = folder_of(store, W)
    indexing.prepare(store, folder)
    script = Path(__file__).with_name("slow_index.py")
    process = subprocess.Popen([sys.executable, str(script), str(store.root), str(folder)])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "rows.i64").exists() and (folder / "rows.i64").stat().st_size >= 8 * 200:
            break
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -9
    left = Index.open(folder)
    assert 0 < len(left) < 800
    assert not left.data_hash
    seen = []
    index, done = update(store, by=counting(seen))
    assert_current(index, store)
    assert sum(seen) == done.added == 800 - len(left), "what was committed is kept"


def test_a_full_disk_is_said(store, monkeypatch):
    def full(fd, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(indexing.os, "pwrite", full)
    with pytest.raises(StoreWriteError, match="full"):
        update(store)


def test_two_updates_at_once(store):
    errors = []

    def run():
        try:
            update(store)
        except Exception as exc:  # told below
            errors.append(exc)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_current(Index.open(folder_of(store, W)), store)


# --- damaged, or another's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["references.f32", "rows.i64", "sums.u32"])
def test_a_flipped_bit_is_found(store, name):
    index, _ = update(store)
    path = index.folder / name
    for at in (0, path.stat().st_size // 2, path.stat().st_size - 1):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        assert "differ from their checksums" in Index.open(index.folder).check()[0]
        data[at] ^= 1
        path.write_bytes(data)
    assert Index.open(index.folder).check() == []


def test_what_is_left_of_a_removed_row_is_found(store):
    index, _ = update(store)
    remove(store.root, [7])
    with (index.folder / "references.f32").open("r+b") as file:
        file.seek(7 * 4 * (DIM + 1))
        file.write(b"left")
    assert "not zeroed" in Index.open(index.folder).check()[0]
    index, _ = update(open_store(store.root))
    assert index.check() == []


def test_damage_is_refused_and_rebuilt(store):
    index, _ = update(store)
    body = (index.folder / "index.json").read_text()
    for text, error in (
        (body.replace('"n": 500', '"n": 501'), CorruptStoreError),
        ("{", CorruptStoreError),
        ("[]", CorruptStoreError),
        (json.dumps(json.loads(body) | {"schema": "latentstore.index/9"}), StoreFormatError),
    ):
        (index.folder / "index.json").write_text(text)
        with pytest.raises(error, match="--rebuild"):
            Index.open(index.folder)
        with pytest.raises(error):
            update(store)
    index, done = update(store, rebuild=True)
    assert done.added == 500
    assert_current(index, store)
    (index.folder / "references.f32").write_bytes(b"")
    with pytest.raises(CorruptStoreError, match="cut off"):
        Index.open(index.folder)


def test_another_index_is_refused(store, tmp_path):
    index, _ = update(store)
    with pytest.raises(UsageError, match="map"):
        indexing.update(store, index.folder, project, wanted(store), fingerprint="other")
    other = a_store(tmp_path / "o.zarr")
    other.space = replace(other.space, weights="1" * 64)
    with pytest.raises(UsageError, match="space"):
        indexing.update(other, index.folder, project, wanted(other), fingerprint=W)
    with pytest.raises(UsageError, match="no index"):
        Index.open(tmp_path)


def test_a_map_that_gives_what_is_not_finite_is_refused(store):
    with pytest.raises(UsageError, match="not finite"):
        update(store, by=lambda x: np.full((len(x), 3), np.nan))
    assert kept(store.root) == [folder_of(store, W)]
    assert_current(update(store)[0], store)


# --- approximate --------------------------------------------------------------------------------------------


@pytest.fixture
def fast(store):
    if not has_faiss():
        pytest.skip("FAISS is not installed")
    index, _ = update(store)
    return approximate.make(index, "IVF4,Flat", "nprobe=4")


def queries_of(index, n=12):
    return np.asarray(index.references[:n]) + 0.01


def test_all_cells_are_exact_search(fast):
    queries = queries_of(fast)
    scores, rows = fast.approximate(queries, 5)
    exact = fast.search(queries, 5)
    np.testing.assert_array_equal(rows, exact[1])
    np.testing.assert_array_equal(scores, exact[0])
    measured = approximate.measure(fast, queries, "near copies").body["approximate"]["recall"]
    assert (measured["at_1"], measured["at_10"], measured["n"]) == (1, 1, 12)
    assert measured["seconds"] > 0


def test_one_cell_of_many_finds_less_and_the_recall_says_so(fast):
    queries = np.random.default_rng(0).standard_normal((40, DIM + 1)).astype(np.float32)
    index = approximate.make(fast, "IVF32,Flat", "nprobe=1")
    recall = approximate.measure(index, queries, "noise").body["approximate"]["recall"]
    rows, exact = index.approximate(queries, 10)[1], index.search(queries, 10)[1]
    shared = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), exact.tolist(), strict=True)]
    assert recall["at_10"] == pytest.approx(np.mean(shared) / 10)
    assert recall["at_10"] < 0.9
    assert recall["at_1"] == (rows[:, 0] == exact[:, 0]).mean()


def test_rows_that_came_later_are_found_and_those_that_went_are_not(fast, store):
    store = grown(store.root, 640)
    index, _ = update(store)
    assert index.body["approximate"]["n"] == 500
    queries = project(latents_of(640)[[10, 430, 630]])
    assert index.approximate(queries, 5)[1].tolist() == index.search(queries, 5)[1].tolist()
    assert index.approximate(queries, 1)[1].ravel().tolist() == index.search(queries, 1)[1].ravel().tolist()
    index, _ = update(store, rows=np.arange(600, 640))
    scores, rows = index.approximate(queries, 100)
    assert set(rows.ravel().tolist()) == {-1, *range(600, 640)}
    assert np.isneginf(scores[rows < 0]).all()


def test_rows_that_changed_are_found_as_they_are_now(fast, store):
    queries = project(encoded_again(store)[84:168])
    queries[:, -1] = 0  # each is then nearest to itself
    index, _ = update(store)
    np.testing.assert_array_equal(index.approximate(queries, 2)[1], index.search(queries, 2)[1])


def test_a_removal_deletes_the_approximate_part(fast, store):
    path = fast.folder / fast.body["approximate"]["file"]
    assert path.exists()
    remove(store.root, [7])
    assert not path.exists()
    with pytest.raises(UsageError, match="no approximate part"):
        Index.open(fast.folder).approximate(queries_of(fast), 3)


def test_an_approximate_part_of_an_index_that_changed_meanwhile_is_not_kept(fast, store):
    update(store, rows=np.arange(400))
    with pytest.raises(UsageError, match="changed meanwhile"):
        approximate.make(fast, "Flat")
    assert not list(fast.folder.glob(".approximate*"))


def test_damage_to_the_approximate_part_is_found(fast):
    path = fast.folder / fast.body["approximate"]["file"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "missing or damaged" in fast.check()[0]
    path.write_bytes(data[:-9])
    with pytest.raises(CorruptStoreError, match="--factory"):
        fast.approximate(queries_of(fast), 3)


@faiss_only
@pytest.mark.parametrize(
    "words", [("Bogus", ""), ("IVF4,Flat", "nonsense=3"), ("PQ7", ""), ("IVF9000,Flat", "")]
)
def test_what_faiss_cannot_make_is_said(store, words):
    index, _ = update(store)
    with pytest.raises(UsageError, match="FAISS cannot"):
        approximate.make(index, *words)
    assert Index.open(index.folder).body["approximate"] is None
