"""Coded stores: Zarr reads what was written, within the codec's bound; and faults are found there, too."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from store_worlds import data_files, encode_patch, partials, photo_folder, picture

from latentstore.encoders import PatchEncoder
from latentstore.errors import UsageError
from latentstore.removal import remove
from latentstore.schema import STATUS_CODE
from latentstore.store import open_store
from latentstore.verify import verify

CODECS = ["zstd", "blosc", "bitround:5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = photo_folder(tmp_path_factory.mktemp("codecs") / "images", 100)
    (folder / "0003.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    encode_patch(folder, folder.parent / "plain.zarr")
    return open_store(folder.parent / "plain.zarr").reader.read(0, 100).astype(np.float64)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_within_the_codecs_bound(tmp_path, folder, plain, codec):
    """Lossless codecs give the same numbers; bitround:K errs by at most 2^-(K+1) of each number."""
    root = tmp_path / "s.zarr"
    encode_patch(folder, root, codec=codec)
    store = open_store(root)
    assert store.layout.codec == codec
    got = store.reader.read(0, 100).astype(np.float64)
    bound = 2.0**-6 if codec == "bitround:5" else 0.0
    # Subnormal float16 numbers have fewer bits than BitRound counts on.
    assert (np.abs(got - plain) <= bound * np.maximum(np.abs(plain), 2.0**-14)).all()
    assert (codec == "bitround:5") == bool((got != plain).any())
    assert store.counts() == {"ok": 99, "unreadable": 1}
    rows = np.array([99, 3, 50, 84])
    assert np.array_equal(store.reader.gather(rows), got[rows].astype(np.float16))
    assert verify(store).damages == []
    assert partials(root) == []


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
def test_zarr_itself_reads_them(tmp_path, folder, plain, codec):
    encode_patch(folder, tmp_path / "s.zarr", codec=codec)
    assert np.array_equal(
        zarr.open_group(tmp_path / "s.zarr", mode="r")["latents"][:], plain.astype(np.float16)
    )


@pytest.mark.parametrize("codec", CODECS)
def test_append_and_removal_keep_the_other_rows(tmp_path, codec):
    folder = photo_folder(tmp_path / "images", 100)
    root = tmp_path / "s.zarr"
    encode_patch(folder, root, codec=codec)
    before = open_store(root).reader.read(0, 100).copy()
    for i in range(100, 120):
        picture(i).save(folder / f"{i:04d}.png", compress_level=1)
    assert encode_patch(folder, root).encoded == 20
    remove(root, [7])
    store = open_store(root)
    now = store.reader.read(0, 120)
    assert np.array_equal(np.delete(now[:100], 7, 0), np.delete(before, 7, 0))
    assert not now[7].any()
    assert store.status()[7] == STATUS_CODE["removed"]
    assert verify(store).damages == []
    encode_patch(folder, tmp_path / "once.zarr", codec=codec)
    once = open_store(tmp_path / "once.zarr").reader.read(0, 120)
    assert np.array_equal(np.delete(now, 7, 0), np.delete(once, 7, 0))


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_byte_of_a_coded_shard_is_found(tmp_path, folder, codec):
    root = tmp_path / "s.zarr"
    encode_patch(folder, root, codec=codec)
    path = root / "latents" / "c" / "1" / "0"
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert verify(open_store(root)).damaged_shards == [("latents", 1)]
    path.write_bytes(whole + b"\0")
    assert open_store(root).todo() == [1]


def test_a_coded_store_is_made_the_same_twice(tmp_path, folder):
    for name in ("one", "two"):
        encode_patch(folder, tmp_path / name, codec="blosc")
    assert data_files(tmp_path / "one") == data_files(tmp_path / "two")


@pytest.mark.parametrize("codec", ["gzip", "bitround:0", "bitround:10", "bitround:x", "bitround"])
def test_unknown_codecs_are_refused_before_anything_is_made(tmp_path, folder, codec):
    with pytest.raises(UsageError, match="--codec"):
        encode_patch(folder, tmp_path / "s.zarr", codec=codec, encoder=PatchEncoder(64))
    assert not (tmp_path / "s.zarr").exists()
