"""Several encoders' latents of the same rows in one store."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from store_worlds import data_files, encode_patch, partials, photo_folder, picture, tree

from latentstore.encode import Source, encode
from latentstore.encoders import PatchEncoder
from latentstore.errors import StoreIncompleteError, StoreNotFoundError, UsageError
from latentstore.schema import STATUS_CODE
from latentstore.shards import record_file
from latentstore.store import open_store
from latentstore.verify import verify


@pytest.fixture
def folder(tmp_path):
    return photo_folder(tmp_path / "images", 100)


@pytest.fixture
def root(tmp_path, folder):
    encode_patch(folder, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def add(folder, root, name="small", size=32, **options):
    """A further encoder: the same code at another size is another space."""
    return encode(Source(folder), root / name, PatchEncoder(size), threads=2, **options)


def test_a_second_array_holds_what_a_store_of_its_own_would(tmp_path, folder, root):
    before = tree(root)
    add(folder, root)
    alone = encode_patch(folder, tmp_path / "alone.zarr", encoder=PatchEncoder(32))
    assert alone.rows == 100
    one, two = open_store(root / "small"), open_store(tmp_path / "alone.zarr")
    assert one.space.id == two.space.id != open_store(root).space.id
    assert np.array_equal(one.reader.read(0, 100), two.reader.read(0, 100))
    assert one.manifest().equals(open_store(root).manifest())
    after = tree(root)
    assert {k: v for k, v in after.items() if k in before and k != "done/seal.json"} == {
        k: v for k, v in before.items() if k != "done/seal.json"
    } | {"done/lock": after["done/lock"]}
    assert open_store(root).arrays() == ["latents", "small"]
    assert verify(open_store(root)).damages == []


def test_any_zarr_reader_sees_both(folder, root):
    add(folder, root)
    group = zarr.open_group(root, mode="r")
    assert group["latents"].shape == (100, 256)
    assert group["small"].shape == (100, 64)
    assert group["small"].metadata.dimension_names == ("row", "small_dim")
    assert np.array_equal(group["small"][:], open_store(root / "small").reader.read(0, 100))
    assert set(group["small_status"][:].tolist()) == {1}


def test_rows_follow_the_first_array(folder, root):
    """A bad image stays bad, a file that changed since is not the row's image."""
    (folder / "0003.png").write_bytes(b"no picture")
    encode_patch(folder, root, retry_bad=True)  # no bad row yet: nothing happens
    store = open_store(root)
    assert store.counts() == {"ok": 100}
    summary = add(folder, root)
    assert summary.counts == {"ok": 99, "changed": 1}
    picture(77).save(folder / "0004.png", compress_level=1)
    summary = add(folder, root, name="later", size=16)
    assert open_store(root / "later").status()[4] == STATUS_CODE["changed"]
    assert not open_store(root / "later").reader.read(4, 5).any()
    assert summary.bad[-1][1] == "changed"


def test_an_image_that_was_bad_at_first_is_not_tried_again(tmp_path, folder):
    (folder / "0003.png").write_bytes(b"no picture")
    root = tmp_path / "bad.zarr"
    encode_patch(folder, root)
    picture(3).save(folder / "0003.png", compress_level=1)
    add(folder, root)
    assert open_store(root / "small").counts() == {"ok": 99, "unreadable": 1}


def test_growth_reaches_the_second_array(tmp_path, folder, root):
    """Appending to the first opens the second; encoding it again copies its old rows and adds the new."""
    add(folder, root)
    old = open_store(root / "small").reader.read(0, 100).copy()
    for i in range(100, 130):
        picture(i).save(folder / f"{i:04d}.png", compress_level=1)
    encode_patch(folder, root)
    grown = open_store(root / "small")
    assert len(grown) == 130
    assert grown.todo() == [1]
    summary = add(folder, root)
    assert summary.encoded == 30
    store = open_store(root / "small")
    assert store.todo() == []
    assert np.array_equal(store.reader.read(0, 100), old)
    encode_patch(folder, tmp_path / "alone.zarr", encoder=PatchEncoder(32))
    assert np.array_equal(store.reader.read(0, 130), open_store(tmp_path / "alone.zarr").reader.read(0, 130))
    assert verify(open_store(root)).damages == []
    assert partials(root) == []


def test_the_first_array_must_be_whole(folder, root):
    record_file(root, 0).unlink()
    with pytest.raises(StoreIncompleteError, match=r"not finished"):
        add(folder, root)
    assert open_store(root).arrays() == ["latents"]


def test_damage_in_one_array_is_that_arrays(folder, root):
    add(folder, root)
    path = root / "small" / "c" / "1" / "0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert verify(open_store(root)).damaged_shards == [("small", 1)]


@pytest.mark.parametrize(
    "name", ["Small", "manifest", "status", "x_status", "a/b/c", ".hidden", "a b", "x" * 41]
)
def test_names_that_cannot_be(folder, root, name):
    before = data_files(root)
    with pytest.raises((UsageError, StoreNotFoundError)):
        add(folder, root, name=name)
    assert data_files(root) == before


def test_an_array_that_is_not_there(root):
    with pytest.raises(StoreNotFoundError, match=r"has no array 'sd2'; it has latents"):
        open_store(root / "sd2")


def test_another_encoder_is_refused_in_an_array(folder, root):
    add(folder, root)
    with pytest.raises(Exception, match="belongs to space"):
        add(folder, root, size=64)
