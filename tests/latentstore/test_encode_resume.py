"""Encoding: right rows, and the same bytes whatever happened on the way."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image
from store_worlds import (
    SIZE,
    data_files,
    done_shards,
    encode_patch,
    expected_latent,
    kill_in_the_middle,
    make_store,
    partials,
    photo_folder,
    picture,
    shard_facts,
    tree,
)

from latentstore.encode import Source, encode
from latentstore.encoders import PatchEncoder
from latentstore.errors import SpaceMismatchError, StoreWriteError, UsageError
from latentstore.schema import STATUS_CODE
from latentstore.store import open_store


class Counting(PatchEncoder):
    """The patch encoder, with a list of the rows it was asked for."""

    def __init__(self, fail_at=None):
        super().__init__(SIZE)
        self.rows, self.fail_at = [], fail_at

    def encode(self, images, rows):
        if self.fail_at is not None and rows[0] >= self.fail_at:
            raise RuntimeError("the accelerator fell off the bus")
        self.rows += rows.tolist()
        return super().encode(images, rows)


# --- right rows --------------------------------------------------------------------------------------


def test_rows_are_what_the_code_says(photos, undisturbed):
    store = open_store(undisturbed)
    assert (len(store), store.layout.dim, store.layout.n_shards) == (800, 256, 10)
    names = store.manifest()["path"].to_pylist()
    assert names == sorted(p.name for p in photos.iterdir())
    got = store.reader.read(0, 800)
    for row in (0, 1, 83, 84, 419, 799):
        with Image.open(photos / names[row]) as image:
            expected = expected_latent(image, dtype=np.float64)
        # The encoder computes in float32 (errors of order 192 eps32 of the products' sum, below 1e-4 here)
        # and the store rounds to float16: half a unit in the last of 11 bits.
        np.testing.assert_allclose(got[row], expected, rtol=2.0**-11, atol=1e-4)
    # and the rows differ by far more than that
    assert np.abs(np.diff(got.astype(np.float64), axis=0)).max(axis=1).min() > 0.05


def test_the_manifest_says_what_was_read(photos, undisturbed):
    import hashlib

    store = open_store(undisturbed)
    table = store.manifest()
    assert table["row"].to_pylist() == list(range(800))
    for row in (0, 500, 799):
        said = table.slice(row, 1).to_pylist()[0]
        path = photos / said["path"]
        assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (said["bytes"], said["mtime"]) == (path.stat().st_size, path.stat().st_mtime_ns)
        assert (said["width"], said["height"], said["status"], said["reason"]) == (24, 20, "ok", "")
        assert (said["role"], said["source"], said["identity"]) == ("reference", "file", path.name)


def test_the_summary_counts(photos, tmp_path):
    started, progress = [], []
    summary = encode_patch(
        photos,
        tmp_path / "s.zarr",
        on_start=lambda todo, rows: started.append((todo, rows)),
        on_rows=lambda rows, bad: progress.append((rows, bad)),
    )
    assert (summary.rows, summary.encoded, summary.appended, summary.bad) == (800, 800, 0, [])
    assert summary.counts == {"ok": 800}
    assert started == [(800, 800)]
    assert sum(rows for rows, _ in progress) == 800
    assert {"total", "wait", "encode", "write"} <= set(summary.seconds)


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 7}, {"shard_rows": 168}])
def test_threads_and_shards_do_not_change_rows(photos, undisturbed, tmp_path, options):
    encode_patch(photos, tmp_path / "s.zarr", **options)
    ours, theirs = open_store(tmp_path / "s.zarr"), open_store(undisturbed)
    np.testing.assert_array_equal(ours.reader.read(0, 800), theirs.reader.read(0, 800))
    assert ours.manifest().equals(theirs.manifest())
    if "threads" in options:
        assert data_files(ours.root) == data_files(undisturbed)


def test_a_rerun_of_a_complete_store_does_nothing(photos, tmp_path):
    root = tmp_path / "s.zarr"
    encode_patch(photos, root)
    before, facts = tree(root), shard_facts(root)
    encoder = Counting()
    summary = encode_patch(photos, root, encoder=encoder)
    assert (encoder.rows, summary.encoded, summary.appended) == ([], 0, 0)
    assert (tree(root), shard_facts(root)) == (before, facts)


@pytest.mark.full
def test_full_size_rows(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(100):
        picture(i, 320, 240).save(folder / f"{i:03d}.jpg")
    encode(Source(folder), tmp_path / "s.zarr", PatchEncoder(), shard_rows=84)
    store = open_store(tmp_path / "s.zarr")
    assert (store.layout.dim, store.counts()) == (4096, {"ok": 100})
    with Image.open(folder / "090.jpg") as image:
        expected = expected_latent(image, 256, np.float64)
    np.testing.assert_allclose(store.reader.gather([90])[0], expected, rtol=2.0**-11, atol=1e-4)


# --- killed ------------------------------------------------------------------------------------------


def test_kill_and_rerun_gives_the_same_bytes(photos, undisturbed, tmp_path):
    root = tmp_path / "s.zarr"
    kill_in_the_middle(photos, root, done=3)
    done, facts = done_shards(root), shard_facts(root)
    assert 3 <= len(done) < 10
    assert len(partials(root)) >= 1
    encoder = Counting()
    summary = encode_patch(photos, root, encoder=encoder)
    assert summary.encoded == 800 - 84 * len(done)
    assert min(encoder.rows) == 84 * len(done)
    now = shard_facts(root)
    for shard in done:
        assert now[str(int(shard))] == facts[str(int(shard))]  # not written again: same inode, same time
    assert partials(root) == []
    assert data_files(root) == data_files(undisturbed)


def test_kill_twice(photos, undisturbed, tmp_path):
    root = tmp_path / "s.zarr"
    kill_in_the_middle(photos, root, done=1)
    first = len(done_shards(root))
    kill_in_the_middle(photos, root, done=first + 2)
    assert first + 2 <= len(done_shards(root)) < 10
    encode_patch(photos, root)
    assert data_files(root) == data_files(undisturbed)


def test_files_added_after_a_kill_go_behind(tmp_path):
    folder, root = photo_folder(tmp_path / "images", 300), tmp_path / "s.zarr"
    kill_in_the_middle(folder, root, done=2)
    done, facts = done_shards(root), shard_facts(root)
    before = {s: (root / "latents" / "c" / str(int(s)) / "0").read_bytes() for s in done}
    # They sort before all others, and must not shift them.
    picture(900).save(folder / "000-new.png")
    picture(901).save(folder / "0000-new.png")
    summary = encode_patch(folder, root)
    assert (summary.rows, summary.appended) == (302, 2)
    store = open_store(root)
    names = store.manifest()["path"].to_pylist()
    assert names == [f"{i:04d}.png" for i in range(300)] + ["000-new.png", "0000-new.png"]
    for shard in done:
        assert shard_facts(root)[str(int(shard))] == facts[str(int(shard))]
        assert (root / "latents" / "c" / str(int(shard)) / "0").read_bytes() == before[shard]
    for row in (0, 299, 300, 301):
        with Image.open(folder / names[row]) as image:
            expected = expected_latent(image, dtype=np.float64)
        np.testing.assert_allclose(store.reader.gather([row])[0], expected, rtol=2.0**-11, atol=1e-4)


def test_a_failing_encoder_keeps_what_is_done(photos, undisturbed, tmp_path):
    root = tmp_path / "s.zarr"
    with pytest.raises(RuntimeError, match="fell off the bus"):
        encode_patch(photos, root, encoder=Counting(fail_at=300))
    assert done_shards(root) == {"000000", "000001", "000002"}
    assert partials(root) == []
    encode_patch(photos, root)
    assert data_files(root) == data_files(undisturbed)


@pytest.mark.parametrize(
    "file", ["done/000004.json", "status/c/4", "latents/c/4/0", "manifest/part-000004-84.parquet"]
)
def test_a_lost_file_costs_its_shard_alone(photos, undisturbed, tmp_path, file):
    root = tmp_path / "s.zarr"
    shutil.copytree(undisturbed, root)
    facts = shard_facts(root)
    (root / file).unlink()
    encoder = Counting()
    encode_patch(photos, root, encoder=encoder)
    # The shard's rows are three whole batches: nothing is padded.
    assert sorted(set(encoder.rows)) == list(range(336, 336 + 84))
    assert {k: v for k, v in shard_facts(root).items() if k != "4"} == {
        k: v for k, v in facts.items() if k != "4"
    }
    assert data_files(root) == data_files(undisturbed)


# --- growing -----------------------------------------------------------------------------------------


@pytest.fixture
def grown(tmp_path):
    """A store of 200 rows (two shards of 84 and a tail of 32), and the folder with 70 pictures more."""
    folder, root = photo_folder(tmp_path / "images", 200), tmp_path / "s.zarr"
    picture(1).save(folder / "0150.png")
    (folder / "0190.png").write_text("no picture")
    encode_patch(folder, root)
    shutil.copytree(root, tmp_path / "before.zarr")
    for i in range(200, 270):
        picture(i).save(folder / f"{i:04d}.png")
    return folder, root, tmp_path / "before.zarr"


def test_append_to_a_partial_tail(grown, tmp_path):
    folder, root, before = grown
    old = open_store(before)
    rows = old.reader.read(0, 200)
    facts = shard_facts(root)
    encoder = Counting()
    summary = encode_patch(folder, root, encoder=encoder)
    assert (summary.rows, summary.appended, summary.encoded) == (270, 70, 70)
    assert min(encoder.rows) == 200  # old rows of the tail are copied
    store = open_store(root)
    assert store.reader.read(0, 200).tobytes() == rows.tobytes()
    np.testing.assert_array_equal(store.status()[:200], old.status())
    assert store.manifest().slice(0, 200).equals(old.manifest())
    assert {k: shard_facts(root)[k] for k in ("0", "1")} == {k: facts[k] for k in ("0", "1")}
    assert store.status()[190] == STATUS_CODE["unreadable"]
    assert store.counts() == {"ok": 269, "unreadable": 1}
    # The same order in a fresh store: the same files.
    fresh = tmp_path / "fresh.zarr"
    encode_patch(folder, fresh)
    skip = ("inputs/",)  # two parts or one, the same rows
    assert {k: v for k, v in data_files(root).items() if not k.startswith(skip)} == {
        k: v for k, v in data_files(fresh).items() if not k.startswith(skip)
    }
    assert open_store(fresh).inputs().equals(store.inputs())
    assert len(list((root / "manifest").glob("part-000002-*"))) == 1


@pytest.mark.parametrize("renamed", ["latents", "latents and status", "all but the record"])
def test_append_killed_before_its_record(grown, renamed):
    folder, root, before = grown
    encode_patch(folder, root)
    after = data_files(root)
    # Put back what a kill would not have replaced yet.
    shutil.copy2(before / "done" / "000002.json", root / "done")
    shutil.copy2(before / "manifest" / "part-000002-32.parquet", root / "manifest")
    (root / "done" / "000003.json").unlink()
    shutil.rmtree(root / "latents" / "c" / "3")
    (root / "status" / "c" / "3").unlink()
    (root / "manifest" / "part-000003-18.parquet").unlink()
    if renamed != "all but the record":
        (root / "manifest" / "part-000002-84.parquet").unlink()
    if renamed == "latents":
        shutil.copy2(before / "status" / "c" / "2", root / "status" / "c" / "2")
    encoder = Counting()
    encode_patch(folder, root, encoder=encoder)
    assert min(encoder.rows) == 200  # the old rows are known from the longer file
    assert data_files(root) == after


def test_append_over_a_damaged_tail_encodes_it_again(grown):
    folder, root, before = grown
    path = root / "latents" / "c" / "2" / "0"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    encoder = Counting()
    encode_patch(folder, root, encoder=encoder)
    assert min(encoder.rows) == 168
    np.testing.assert_array_equal(
        open_store(root).reader.read(0, 200), open_store(before).reader.read(0, 200)
    )


def test_killed_while_appending(grown, tmp_path):
    folder, root, _ = grown
    for i in range(270, 600):
        picture(i).save(folder / f"{i:04d}.png")
    kill_in_the_middle(folder, root, done=5)
    assert len(open_store(root)) == 600
    encode_patch(folder, root)
    fresh = tmp_path / "fresh.zarr"
    encode_patch(folder, fresh)
    ours, theirs = data_files(root), data_files(fresh)
    assert {k: v for k, v in ours.items() if not k.startswith("inputs/")} == {
        k: v for k, v in theirs.items() if not k.startswith("inputs/")
    }


def test_grow_row_by_row(tmp_path):
    folder, root = photo_folder(tmp_path / "images", 82), tmp_path / "s.zarr"
    for i in range(82, 87):  # over the shard's border
        encode_patch(folder, root)
        picture(i).save(folder / f"{i:04d}.png")
    encode_patch(folder, root)
    fresh = tmp_path / "fresh.zarr"
    encode_patch(folder, fresh)
    np.testing.assert_array_equal(open_store(root).reader.read(0, 87), open_store(fresh).reader.read(0, 87))
    assert open_store(root).manifest().equals(open_store(fresh).manifest())


def test_files_deleted_later_keep_their_rows(tmp_path):
    folder, root = photo_folder(tmp_path / "images", 100), tmp_path / "s.zarr"
    encode_patch(folder, root)
    before = data_files(root)
    (folder / "0000.png").unlink()
    encode_patch(folder, root)
    assert data_files(root) == before


def test_a_file_deleted_before_its_turn_is_missing(tmp_path):
    folder, root = photo_folder(tmp_path / "images", 200), tmp_path / "s.zarr"

    def delete(rows, bad):
        (folder / "0180.png").unlink(missing_ok=True)

    summary = encode_patch(folder, root, on_rows=delete)
    store = open_store(root)
    assert summary.counts == {"missing": 1, "ok": 199}
    assert store.status()[180] == STATUS_CODE["missing"]
    assert not store.reader.gather([180]).any()
    assert store.manifest()["path"].to_pylist() == [f"{i:04d}.png" for i in range(200)]
    with Image.open(folder / "0181.png") as image:
        expected = expected_latent(image, dtype=np.float64)
    np.testing.assert_allclose(store.reader.gather([181])[0], expected, rtol=2.0**-11, atol=1e-4)


# --- refused -----------------------------------------------------------------------------------------


def refused(root, error, match, **options):
    before = tree(root)
    with pytest.raises(error, match=match) as caught:
        encode_patch(options.pop("folder"), root, **options)
    assert tree(root) == before
    return str(caught.value)


def test_another_folder_is_refused(undisturbed, tmp_path):
    other = photo_folder(tmp_path / "other", 3)
    text = refused(undisturbed, UsageError, "A store has one source", folder=other)
    assert str(other) in text


def test_a_folder_that_moved_is_accepted(tmp_path):
    folder, root = photo_folder(tmp_path / "images", 90), tmp_path / "s.zarr"
    encode_patch(folder, root)
    folder.rename(tmp_path / "moved")
    picture(90).save(tmp_path / "moved" / "0090.png")
    assert encode_patch(tmp_path / "moved", root).appended == 1


def test_another_space_is_refused(photos, undisturbed):
    class Other(PatchEncoder):
        def __init__(self):
            super().__init__(SIZE)
            self.space = dataclasses.replace(self.space, weights="0" * 64)

    encoder = Other()
    text = refused(undisturbed, SpaceMismatchError, "patch", folder=photos, encoder=encoder)
    assert encoder.space.id in text
    assert open_store(undisturbed).space.id in text
    refused(undisturbed, SpaceMismatchError, "image size", folder=photos, encoder=PatchEncoder(128))


def test_a_simulated_store_is_refused(photos, tmp_path):
    import json

    root = make_store(tmp_path / "s.zarr", np.ones((3, 4), np.float16)).root
    body = json.loads((root / "zarr.json").read_text())
    body["attributes"]["latentstore"]["kind"] = "simulated"
    (root / "zarr.json").write_text(json.dumps(body))
    refused(root, UsageError, "simulated latents", folder=photos)


def test_nothing_to_encode_is_said(tmp_path):
    with pytest.raises(UsageError, match="There is no folder"):
        encode_patch(tmp_path / "none", tmp_path / "s.zarr")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="holds no image files"):
        encode_patch(tmp_path / "empty", tmp_path / "s.zarr")
    with pytest.raises(UsageError, match="not a folder"):
        encode_patch(tmp_path / "empty" / "notes.txt", tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_subfolders_and_hidden_files(tmp_path):
    folder = tmp_path / "images"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("z.png", "b/a.png", "b/c/T000001_2.png", "A.PNG", ".hidden.png", ".cache/x.png"):
        picture(len(name)).save(folder / name)
    (folder / "notes.txt").write_text("x")
    encode_patch(folder, tmp_path / "s.zarr")
    table = open_store(tmp_path / "s.zarr").manifest()
    assert table["path"].to_pylist() == ["A.PNG", "b/a.png", "b/c/T000001_2.png", "z.png"]
    assert table["role"].to_pylist() == ["reference", "reference", "translation", "reference"]


def test_an_unwritable_place_is_said(photos, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreWriteError, match="Could not write"):
        encode_patch(photos, tmp_path / "file" / "s.zarr")
    assert (tmp_path / "file").read_text() == "in the way"
