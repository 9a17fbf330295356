"""The store's bytes, creation, commit and lock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr
from store_worlds import (
    SLOW,
    data_files,
    done_shards,
    encode_patch,
    make_store,
    partials,
    photo_folder,
    rows_of,
    shard_facts,
    slow_encode,
    space_of,
    tree,
    write_shard,
)

from latentstore.create import create
from latentstore.errors import (
    CorruptStoreError,
    StoreFormatError,
    StoreIncompleteError,
    StoreLockedError,
    StoreNotFoundError,
    StoreWriteError,
    UsageError,
)
from latentstore.files import check_room, write_atomic
from latentstore.manifest import manifest_table
from latentstore.schema import CHUNK_ROWS, OK, SCHEMA_VERSION, STATUS_CODE, STATUS_NAMES, Layout, StoreSpec
from latentstore.shards import Record, ShardWriter, is_done, latents_file, status_file
from latentstore.store import open_store, settle, writing


def numbers(n, dim=24, dtype="float16", seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(dtype)


# --- the bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shard_rows", [84, 252])
@pytest.mark.parametrize("n", [1, 84, 85, 252, 253, 700])
def test_files_are_those_that_zarr_writes(tmp_path, n, shard_rows, dtype):
    latents = numbers(n, dtype=dtype)
    latents[84:168] = 0  # a whole chunk of zeros
    status = np.full(n, OK, np.uint8)
    status[84:168] = STATUS_CODE["unreadable"]
    ours = make_store(tmp_path / "ours.zarr", latents, status=status, shard_rows=shard_rows)
    group = zarr.create_group(tmp_path / "theirs.zarr")
    array = group.create_array(
        "latents",
        shape=latents.shape,
        dtype=dtype,
        chunks=(CHUNK_ROWS, 24),
        shards=(shard_rows, 24),
        compressors=None,
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[:] = latents
    flags = group.create_array(
        "status",
        shape=(n,),
        dtype="uint8",
        chunks=(shard_rows,),
        compressors=None,
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    flags[:] = status
    for name in ("latents/c", "status/c"):
        theirs = tree(tmp_path / "theirs.zarr" / name)
        assert len(theirs) == -(-n // shard_rows)
        assert tree(ours.root / name) == theirs
    assert partials(ours.root) == []


def test_rows_lie_at_a_computable_byte(tmp_path):
    latents = numbers(300)
    store = make_store(tmp_path / "s.zarr", latents, shard_rows=168)
    for row in (0, 83, 84, 167, 168, 251, 299):
        data = latents_file(store.root, row // 168).read_bytes()
        start = (row % 168) * 48
        assert data[start : start + 48] == latents[row].tobytes()


def test_other_readers_see_the_same_rows(tmp_path):
    latents = numbers(300)
    status = np.full(300, OK, np.uint8)
    status[7] = STATUS_CODE["missing"]
    root = make_store(tmp_path / "s.zarr", latents, status=status).root
    latents[7] = 0  # a bad row is stored as zeros
    group = zarr.open_group(root, mode="r")
    array = group["latents"]
    assert array.shape == (300, 24)  # exactly the rows: padding is in the file alone
    assert array.metadata.dimension_names == ("row", "latents_dim")
    assert group["status"].metadata.dimension_names == ("row",)
    np.testing.assert_array_equal(array[:], latents)
    np.testing.assert_array_equal(group["status"][:], status)
    assert group["status"].attrs["flag_meanings"].split() == list(STATUS_NAMES)
    assert list(group["status"].attrs["flag_values"]) == list(range(len(STATUS_NAMES)))
    # Every folder is a group, so a walk over the hierarchy meets nothing unknown.
    folders = {"manifest", "inputs", "done", "projections", "duplicates", "moments", "index"}
    assert set(dict(group.groups())) == folders

    import dask.array

    lazy = dask.array.from_zarr(str(root), component="latents")
    assert lazy.shape == (300, 24)
    np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), latents)


def test_tensorstore_sees_the_same_rows(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    latents = numbers(300)
    root = make_store(tmp_path / "s.zarr", latents, shard_rows=168).root
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / "latents") + "/"}}
    array = tensorstore.open(spec, read=True).result()
    assert array.domain.labels == ("row", "latents_dim")
    np.testing.assert_array_equal(array[:].read().result(), latents)


@pytest.mark.full
def test_full_size_store(tmp_path):
    latents = numbers(300, dim=4096)
    store = make_store(tmp_path / "s.zarr", latents, shard_rows=None)
    assert store.layout.shard_rows == 84
    np.testing.assert_array_equal(zarr.open_array(store.root / "latents", mode="r")[:], latents)
    rows = np.random.default_rng(1).integers(0, 300, 500)
    np.testing.assert_array_equal(store.reader.gather(rows), latents[rows])


# --- creation ----------------------------------------------------------------------------------------


def spec_of(n, dim=24):
    return StoreSpec("images", space_of(dim), Layout.plan(n, dim, shard_rows=84))


@pytest.mark.parametrize("kind", ["folder", "file", "link to an empty folder", "dangling link"])
def test_create_leaves_what_is_there(tmp_path, kind):
    root = tmp_path / "mine"
    if kind == "folder":
        root.mkdir()
        (root / "thesis.tex").write_text("dear")
    elif kind == "file":
        root.write_text("dear")
    else:
        if kind != "dangling link":
            (tmp_path / "elsewhere").mkdir()
        root.symlink_to(tmp_path / "elsewhere")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    content = tree(tmp_path)
    with pytest.raises(UsageError, match="not a latentstore store"):
        create(root, spec_of(10), rows_of(10))
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert tree(tmp_path) == content


def test_create_takes_an_empty_folder(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    store = create(tmp_path / "s.zarr", spec_of(10), rows_of(10))
    assert len(open_store(store.root)) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_create_over_a_store_is_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", numbers(10))
    before = tree(store.root)
    with pytest.raises(UsageError):
        create(store.root, spec_of(10), rows_of(10))
    assert tree(store.root) == before


def test_create_counts_its_inputs(tmp_path):
    with pytest.raises(UsageError, match="9 inputs for 10 rows"):
        create(tmp_path / "s.zarr", spec_of(10), rows_of(9))
    assert list(tmp_path.iterdir()) == []


def test_a_store_says_what_it_is(tmp_path):
    made = make_store(tmp_path / "s.zarr", numbers(100))
    store = open_store(made.root)
    assert (store.kind, len(store), store.layout) == ("images", 100, made.layout)
    assert store.space == space_of(24)
    assert store.provenance == {"made": "by a test"}
    assert store.inputs().equals(rows_of(100))
    assert store.counts() == {"ok": 100}
    assert store.todo() == []
    store.require_complete()


def test_what_is_no_store_is_named(tmp_path):
    with pytest.raises(StoreNotFoundError, match="no store at"):
        open_store(tmp_path / "none.zarr")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(StoreFormatError, match="not a latentstore store"):
        open_store(tmp_path / "other.zarr")
    root = make_store(tmp_path / "s.zarr", numbers(10)).root
    body = json.loads((root / "zarr.json").read_text())
    body["attributes"]["latentstore"]["schema"] = SCHEMA_VERSION + 1
    (root / "zarr.json").write_text(json.dumps(body))
    with pytest.raises(StoreFormatError, match=f"schema {SCHEMA_VERSION + 1}"):
        open_store(root)


def test_room_is_checked_first(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path / "not" / "yet", free // 2)
    with pytest.raises(StoreWriteError, match="are free there"):
        check_room(tmp_path / "not" / "yet", free * 2)
    huge = StoreSpec("images", space_of(24), Layout(rows=10**14, dim=24, shard_rows=4032 * 10**6))
    with pytest.raises(StoreWriteError, match="are free there"):
        create(tmp_path / "s.zarr", huge, _Rows(10**14))
    assert list(tmp_path.iterdir()) == []


class _Rows:
    """Stands for a list too long to make; creation must not get so far as to read it."""

    def __init__(self, n):
        self.num_rows = n


# --- commit ------------------------------------------------------------------------------------------


def test_a_shard_is_done_by_its_record_alone(tmp_path):
    store = make_store(tmp_path / "s.zarr", numbers(200))
    assert store.todo() == []
    record = store.root / "done" / "000001.json"
    kept = record.read_bytes()
    record.unlink()
    assert store.todo() == [1]
    with pytest.raises(StoreIncompleteError, match="1 of 3 shards"):
        store.require_complete()
    record.write_bytes(kept)
    assert store.todo() == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body.update(ok=83),
        lambda body: body.update(latents_crc32=body["latents_crc32"] ^ 1),
        lambda body: body.update(crc32=body["crc32"] ^ 1),
        lambda body: body.pop("crc32"),
        lambda body: body.pop("rows"),
        lambda body: body.update(more=1),
    ],
)
def test_a_record_checks_itself(tmp_path, damage):
    store = make_store(tmp_path / "s.zarr", numbers(200))
    path = store.root / "done" / "000000.json"
    body = json.loads(path.read_text())
    damage(body)
    path.write_text(json.dumps(body))
    assert Record.read(store.root, 0) is None
    assert store.todo() == [0]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"crc32": 1}'])
def test_a_torn_record_is_no_record(tmp_path, data):
    store = make_store(tmp_path / "s.zarr", numbers(100))
    (store.root / "done" / "000000.json").write_bytes(data)
    assert store.todo() == [0]


def test_a_record_of_another_space_or_size_does_not_count(tmp_path):
    store = make_store(tmp_path / "s.zarr", numbers(100))
    assert is_done(store.root, store.layout, 1, store.space.id)
    assert not is_done(store.root, store.layout, 1, "0" * 16)
    grown = Layout(rows=101, dim=24, shard_rows=84)
    assert not is_done(store.root, grown, 1, store.space.id)
    assert is_done(store.root, grown, 0, store.space.id)


@pytest.mark.parametrize("which", ["latents", "status", "manifest"])
@pytest.mark.parametrize("how", ["gone", "short"])
def test_files_must_be_there_in_full(tmp_path, which, how):
    store = make_store(tmp_path / "s.zarr", numbers(100))
    path = {
        "latents": latents_file(store.root, 0),
        "status": status_file(store.root, 0),
        "manifest": store.root / "manifest" / "part-000000-84.parquet",
    }[which]
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    assert store.todo() == [0]


def fresh(tmp_path, n=100):
    return make_store(tmp_path / "s.zarr", numbers(n), only=())


@pytest.mark.parametrize(("latents", "listed"), [(83, 84), (85, 84), (84, 83), (84, 85), (0, 0)])
def test_commit_counts(tmp_path, latents, listed):
    store = fresh(tmp_path)
    before = tree(store.root)
    with ShardWriter(store.root, store.layout, 0, store.space.id) as writer:
        writer.append(numbers(latents), np.full(latents, OK, np.uint8))
        with pytest.raises(CorruptStoreError, match=f"{latents} latents and {listed} manifest rows for 84"):
            writer.commit(manifest_table([{"row": i} for i in range(listed)]))
    assert tree(store.root) == before


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failing_writer_leaves_nothing(tmp_path, failure):
    store = fresh(tmp_path)
    before = tree(store.root)
    seen = []

    def work():
        with ShardWriter(store.root, store.layout, 0, store.space.id) as writer:
            writer.append(numbers(50), np.full(50, OK, np.uint8))
            seen.extend(partials(store.root))
            raise failure

    with pytest.raises(failure):
        work()
    assert len(seen) == 1
    assert tree(store.root) == before
    assert store.todo() == [0, 1]


def test_a_shard_written_twice_has_the_same_bytes(tmp_path):
    store = make_store(tmp_path / "s.zarr", numbers(100))
    before = data_files(store.root)
    with writing(store.root):
        # Other batches, the same rows.
        write_shard(store, 0, numbers(100), np.full(100, OK, np.uint8), rows_of(100), batch=7)
    assert data_files(store.root) == before


def test_not_finite_in_the_stored_dtype_becomes_zeros(tmp_path):
    wide = numbers(10, dtype="float32")
    wide[2, 3] = np.nan
    wide[4, 5] = 1e5  # above float16's 65504
    wide[6, 0] = -np.inf
    wide[8, 1] = 65504
    for dtype, bad in (("float16", [2, 4, 6]), ("float32", [2, 6])):
        store = make_store(tmp_path / dtype, numbers(10, dtype=dtype), only=())
        with ShardWriter(store.root, store.layout, 0, store.space.id) as writer:
            status = writer.append(wide, np.full(10, OK, np.uint8))
            writer.commit(manifest_table([{"row": i} for i in range(10)]))
        assert np.flatnonzero(status == STATUS_CODE["not_finite"]).tolist() == bad
        expected = wide.copy()
        expected[bad] = 0
        expected = expected.astype(dtype)
        np.testing.assert_array_equal(store.reader.read(0, 10), expected)
        assert Record.read(store.root, 0).ok == 10 - len(bad)


def test_the_data_hash_follows_the_data(tmp_path):
    latents = numbers(100)
    first = make_store(tmp_path / "a.zarr", latents).data_hash()
    assert make_store(tmp_path / "b.zarr", latents, batch=9).data_hash() == first
    status = np.full(100, OK, np.uint8)
    status[0] = STATUS_CODE["missing"]
    assert make_store(tmp_path / "c.zarr", latents, status=status).data_hash() != first
    latents[99, 23] += 1
    assert make_store(tmp_path / "d.zarr", latents).data_hash() != first


def test_write_atomic_replaces_or_keeps(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    (tmp_path / "folder" / "file").mkdir(parents=True)
    with pytest.raises(StoreWriteError, match="Finished shards are kept"):
        write_atomic(tmp_path / "folder", b"three")
    assert partials(tmp_path) == []
    assert (tmp_path / "folder" / "file").is_dir()


@pytest.mark.parametrize("resized", [0, 1])
def test_a_growth_that_stops_halfway_is_finished(tmp_path, monkeypatch, resized):
    store = make_store(tmp_path / "s.zarr", numbers(100))
    resize, calls = zarr.Array.resize, []

    def stopping(self, shape):
        if len(calls) == resized:
            raise KeyboardInterrupt
        calls.append(shape)
        resize(self, shape)

    with monkeypatch.context() as patch, writing(store.root):
        patch.setattr(zarr.Array, "resize", stopping)
        with pytest.raises(KeyboardInterrupt):
            store.extend(rows_of(50, path=[f"x{i}.png" for i in range(50)]))
    with writing(store.root):
        grown = settle(open_store(store.root))
    assert len(grown) == 150
    group = zarr.open_group(store.root, mode="r")
    assert (group["latents"].shape, group["status"].shape) == ((150, 24), (150,))


@pytest.mark.parametrize("obstacle", ["latents/c/0/0", "status/c/0", "manifest/part-000000-84.parquet"])
def test_the_record_comes_last(tmp_path, obstacle):
    """Whichever file cannot be put in place, there is no record that says it was."""
    store = fresh(tmp_path)
    (store.root / obstacle / "in the way").mkdir(parents=True)
    with pytest.raises(StoreWriteError, match="Could not write"):
        write_shard(store, 0, numbers(100), np.full(100, OK, np.uint8), rows_of(100))
    assert done_shards(store.root) == set()
    assert partials(store.root) == []
    shutil.rmtree(store.root / obstacle)
    write_shard(store, 0, numbers(100), np.full(100, OK, np.uint8), rows_of(100))
    assert store.todo() == [1]


# --- one writer --------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_a_dead_ones_lock_does_not_last(tmp_path):
    folder, root = photo_folder(tmp_path / "images", 200), tmp_path / "s.zarr"
    holder = slow_encode(folder, root, "--sleep", 30)
    try:
        deadline = time.monotonic() + 60
        while not list(root.glob("latents/c/*/*.partial")) and time.monotonic() < deadline:
            assert holder.poll() is None, holder.communicate()[1]
            time.sleep(0.01)
        before = tree(root)
        with pytest.raises(StoreLockedError, match=f"process {holder.pid}"):
            encode_patch(folder, root)
        second = subprocess.run(
            [sys.executable, SLOW, folder, root], capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 1
        assert "StoreLockedError" in second.stderr
        assert tree(root) == before  # also the holder's partial is still there
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert len(partials(root)) == 1
    with writing(root):
        assert partials(root) == []  # swept by the next writer
        with pytest.raises(StoreLockedError), writing(root):
            pass
    with writing(root):
        pass


# --- a full disk -------------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_is_done(photos, undisturbed, tmp_path):
    root = tmp_path / "s.zarr"
    # Files may not grow past 20 kB from row 252 on: the kernel then fails the write of the fourth shard.
    run = subprocess.run(
        [sys.executable, SLOW, photos, root, "--full-from", "252"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert run.stderr.startswith("StoreWriteError: Could not write")
    assert "disk is full" in run.stderr
    assert "Finished shards are kept" in run.stderr
    assert done_shards(root) == {"000000", "000001", "000002"}
    assert partials(root) == []
    before = shard_facts(root)
    summary = encode_patch(photos, root)
    assert summary.encoded == 800 - 252
    assert {k: v for k, v in shard_facts(root).items() if k in before} == before
    assert data_files(root) == data_files(undisturbed)


def test_a_full_disk_at_creation_leaves_nothing(photos, tmp_path):
    run = subprocess.run(
        [sys.executable, SLOW, photos, tmp_path / "s.zarr", "--file-limit", "2000"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert "disk is full" in run.stderr
    assert run.stderr.count("Could not write") == 1
    assert list(tmp_path.iterdir()) == []


def test_two_first_time_writers(tmp_path):
    """Both start on a path where nothing is: one makes the store, the other is told that it is being written,
    or finds it finished; neither is told to move the other's store away."""
    import subprocess
    import sys

    from store_worlds import photo_folder

    folder = tmp_path / "in"
    photo_folder(folder, 200)
    script = (
        "import sys\nfrom pathlib import Path\nfrom latentstore.encode import Source, encode\n"
        "from latentstore.encoders import PatchEncoder\nfrom latentstore.errors import LatentStoreError\n"
        "try: encode(Source(Path(sys.argv[1])), Path(sys.argv[2]), PatchEncoder(64))\n"
        "except LatentStoreError as e: print(type(e).__name__, e); sys.exit(1)\n"
    )
    for attempt in range(3):
        root = tmp_path / f"{attempt}.zarr"
        jobs = [
            subprocess.Popen([sys.executable, "-c", script, folder, root], stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        said = [job.communicate(timeout=120)[0] for job in jobs]
        assert 0 in [job.returncode for job in jobs]
        for text in said:
            assert text == "" or text.startswith("StoreLockedError"), text
        store = open_store(root)
        assert store.todo() == []
        assert store.counts() == {"ok": 200}


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_finite_rows_are_what_isfinite_says(dtype):
    """Every float16 there is, and random bits of float32, one odd value a row."""
    from latentstore.shards import _finite_rows

    size = np.dtype(dtype).itemsize
    if size == 2:
        values = np.arange(2**16, dtype="<u2").view(dtype)
    else:
        values = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype="<u4")
        values[::3] |= 0x7F800000  # the exponents of infinities and NaNs
        values = values.view(dtype)
    for filler in (0, -1, np.finfo(dtype).max, -np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal):
        block = np.full((len(values), 3), filler, dtype)
        block[:, 1] = values
        np.testing.assert_array_equal(_finite_rows(block), np.isfinite(block).all(axis=1))
    assert _finite_rows(np.empty((0, 4), dtype)).shape == (0,)
