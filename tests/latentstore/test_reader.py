"""The reader gives what zarr gives, or says that it cannot."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import zarr
from store_worlds import make_store

from latentstore import reader as reader_module
from latentstore.errors import CorruptStoreError, UsageError
from latentstore.schema import Layout
from latentstore.shards import index_bytes, latents_file, read_index_is_plain
from latentstore.store import open_store

N, DIM = 500, 24


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(5).standard_normal((N, DIM)).astype(np.float16)


@pytest.fixture
def store(tmp_path, latents):
    return make_store(tmp_path / "s.zarr", latents, shard_rows=168)


def rows_to_ask():
    rng = np.random.default_rng(6)
    return {
        "all": np.arange(N),
        "backwards": np.arange(N)[::-1],
        "shuffled": rng.permutation(N),
        "repeated": rng.integers(0, N, 2000),
        "one row often": np.full(1500, 168),
        "shard borders": np.array([167, 168, 169, 335, 336, 0, 499, 168, 167]),
        "few": np.array([3, 499]),
        "none": np.array([], np.int64),
    }


ROWS = rows_to_ask()


def assert_reads_like_zarr(store, latents, most=2000):
    """Compare whole, gathered (at most so many rows a time: zarr is slow row by row) and in blocks."""
    theirs = zarr.open_array(store.root / "latents", mode="r")[:]
    np.testing.assert_array_equal(theirs, latents)
    reader = open_store(store.root).reader
    for rows in ROWS.values():
        np.testing.assert_array_equal(reader.gather(rows[:most]), theirs[rows[:most]])
    for start, stop in ((0, N), (0, 0), (N, N), (160, 180), (168, 336), (335, 337), (499, 500)):
        np.testing.assert_array_equal(reader.read(start, stop), theirs[start:stop])
    for size in (100, 167, 168, 1000):
        starts, blocks = zip(*((s, b.copy()) for s, b in reader.blocks(size)), strict=True)
        assert starts == tuple(range(0, N, size))
        np.testing.assert_array_equal(np.concatenate(blocks), theirs)


def test_plain_shards(store, latents):
    assert all(read_index_is_plain(latents_file(store.root, s), store.layout, s) for s in range(3))
    assert_reads_like_zarr(store, latents)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_gather_into_the_callers_memory(store, latents, name):
    rows = ROWS[name]
    out = np.full((len(rows), DIM), 7, np.float16)
    assert store.reader.gather(rows, out) is out
    np.testing.assert_array_equal(out, latents[rows])
    np.testing.assert_array_equal(store.reader.gather(rows.tolist()), latents[rows])


def test_more_neighbours_than_one_call_takes(tmp_path):
    wide = np.random.default_rng(7).standard_normal((3000, 4)).astype(np.float32)
    store = make_store(tmp_path / "s.zarr", wide, shard_rows=2520, batch=1000)
    assert reader_module._IOV_MAX < 2520
    np.testing.assert_array_equal(store.reader.gather(np.arange(3000)), wide)


def recreate(store, **options):
    """Write the same rows again through zarr, by other settings."""
    values = zarr.open_array(store.root / "latents", mode="r")[:]
    kept = zarr.open_array(store.root / "latents", mode="r").attrs.asdict()
    shutil.rmtree(store.root / "latents")
    settings = {
        "shape": values.shape,
        "dtype": values.dtype,
        "chunks": (84, DIM),
        "shards": (168, DIM),
        "compressors": None,
        "filters": None,
        "fill_value": 0,
        "attributes": kept,
    } | options
    array = zarr.create_array(store.root / "latents", **settings)
    array[:] = values


@pytest.mark.parametrize(
    "options",
    [
        {"compressors": zarr.codecs.ZstdCodec(level=1)},
        {"shards": None},
        {"shards": None, "chunks": (100, 7)},
        {"chunks": (21, DIM)},
        {"shards": {"shape": (168, DIM), "index_location": "start"}},
        {"serializer": zarr.codecs.BytesCodec(endian="big")},
    ],
    ids=["zstd", "no shards", "other chunks", "smaller chunks", "index first", "big-endian"],
)
def test_other_settings_go_through_zarr(store, latents, options):
    recreate(store, **options)
    assert_reads_like_zarr(store, latents, 20)


def test_a_shard_in_another_order_goes_through_zarr(store, latents):
    path = latents_file(store.root, 1)
    data = bytearray(path.read_bytes())
    size = 84 * DIM * 2
    # The second chunk first, with an index that says so: valid Zarr, but not plain rows.
    import google_crc32c

    index = np.array([[size, size], [0, size]], "<u8").tobytes()
    crc = int(google_crc32c.value(index)).to_bytes(4, "little")
    path.write_bytes(bytes(data[size : 2 * size] + data[:size]) + index + crc)
    assert not read_index_is_plain(path, store.layout, 1)
    assert_reads_like_zarr(store, latents, 20)


def test_unwritten_shards_are_zeros(tmp_path, latents):
    store = make_store(tmp_path / "s.zarr", latents, shard_rows=168, only=(0, 2))
    expected = latents.copy()
    expected[168:336] = 0
    assert_reads_like_zarr(store, expected, 20)
    assert np.flatnonzero(store.status() == 0).tolist() == list(range(168, 336))
    # A reader opened before the shard was written sees it afterwards.
    assert store.todo() == [1]


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, N + 1), (5, 4), (N, N + 1)])
def test_blocks_outside_are_refused(store, start, stop):
    with pytest.raises(UsageError, match=str(N)):
        store.reader.read(start, stop)


@pytest.mark.parametrize("rows", [[-1], [N], [0, N, 1], [-N]])
def test_rows_outside_are_refused(store, rows):
    with pytest.raises(UsageError, match=str(N)):
        store.reader.gather(rows)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((10, DIM), np.float32),
        np.empty((9, DIM), np.float16),
        np.empty((10, 2 * DIM), np.float16)[:, ::2],
        np.empty((DIM, 10), np.float16).T,
    ],
    ids=["dtype", "shape", "stride", "order"],
)
def test_memory_that_does_not_fit_is_refused(store, out):
    with pytest.raises(UsageError, match="C-contiguous"):
        store.reader.read(0, 10, out)
    with pytest.raises(UsageError, match="C-contiguous"):
        store.reader.gather(range(10), out)


FULL = 168 * DIM * 2 + index_bytes(2)


@pytest.mark.parametrize("size", [0, 1, 4, 35, 36, 37, 1000, 84 * DIM * 2, FULL - 37, FULL - 36, FULL - 1])
def test_a_truncated_shard_is_not_read_as_garbage(store, latents, size):
    path = latents_file(store.root, 1)
    assert path.stat().st_size == FULL
    os.truncate(path, size)
    for read in (lambda r: r.read(160, 200), lambda r: r.gather([3, 200]), lambda r: list(r.blocks(300))):
        with pytest.raises(CorruptStoreError, match="done-record"):
            read(open_store(store.root).reader)
    np.testing.assert_array_equal(open_store(store.root).reader.read(0, 168), latents[:168])


def test_a_shard_truncated_under_an_open_reader(store, latents):
    reader = store.reader
    np.testing.assert_array_equal(reader.read(168, 336), latents[168:336])
    os.truncate(latents_file(store.root, 1), 50 * DIM * 2 + 3)
    np.testing.assert_array_equal(reader.gather([168, 217, 169]), latents[[168, 217, 169]])
    for rows in ([218], [335], list(range(168, 336))):
        with pytest.raises(CorruptStoreError, match="shard 1"):
            reader.gather(rows)
    with pytest.raises(CorruptStoreError, match="shard 1"):
        reader.read(200, 336)


def test_a_broken_index_is_not_trusted(store):
    path = latents_file(store.root, 0)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptStoreError):
        store.reader.read(0, 10)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "_MAX_OPEN", 3)
    many = np.random.default_rng(8).standard_normal((84 * 12, 4)).astype(np.float16)
    store = make_store(tmp_path / "s.zarr", many, shard_rows=84)
    reader = open_store(store.root).reader
    for rows in (np.random.default_rng(9).permutation(len(many)), np.arange(len(many))[::-1]):
        np.testing.assert_array_equal(reader.gather(rows), many[rows])
    np.testing.assert_array_equal(reader.read(0, len(many)), many)
    assert 1 <= len(reader._open) <= 3


def test_files_are_closed_with_the_reader(store):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    reader = open_store(store.root).reader
    reader.read(0, N)
    assert len(os.listdir("/proc/self/fd")) == before + 3  # noqa: PTH208
    del reader
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_longer_layout_reads_the_short_tail(tmp_path, latents):
    """Between an append's commit and its tail shard: old rows as they were, new rows zeros."""
    store = make_store(tmp_path / "s.zarr", latents, shard_rows=168)
    grown = Layout(rows=504, dim=DIM, shard_rows=168)
    zarr.open_array(store.root / "latents", mode="r+").resize((504, DIM))
    reader = reader_module.Reader(store.root, grown)
    np.testing.assert_array_equal(reader.read(0, 500), latents)
    assert not reader.read(500, 504).any()
