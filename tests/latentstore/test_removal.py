"""Takedown: gone everywhere, for good, whatever is killed in between; and nothing else is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from store_worlds import data_files, encode_patch, partials, photo_folder, picture, tree

from latentstore import files
from latentstore.encode import Source, encode
from latentstore.encoders import PatchEncoder
from latentstore.errors import CorruptStoreError, UsageError
from latentstore.removal import find_rows, read_removed, remove, with_copies
from latentstore.schema import STATUS_CODE
from latentstore.shards import PENDING
from latentstore.store import open_store, writing
from latentstore.verify import verify

GONE = [7, 90, 91]


@pytest.fixture
def folder(tmp_path):
    return photo_folder(tmp_path / "images", 100)


@pytest.fixture
def root(tmp_path, folder):
    root = tmp_path / "s.zarr"
    encode_patch(folder, root)
    encode(Source(folder), root / "small", PatchEncoder(32), threads=2)
    return root


def test_removed_rows_are_zero_everywhere_and_no_other_row_changes(root):
    before = {n: open_store(root / n if n else root).reader.read(0, 100).copy() for n in ("", "small")}
    manifest = open_store(root).manifest().to_pylist()
    sums = [manifest[r]["sha256"] for r in GONE]
    done = remove(root, GONE, reason="request 12")
    assert (done.rows, done.shards) == (GONE, 4)
    kept = np.setdiff1d(np.arange(100), GONE)
    for name, rows in before.items():
        store = open_store(root / name if name else root)
        now = store.reader.read(0, 100)
        assert not now[GONE].any()
        assert np.array_equal(now[kept], rows[kept])
        assert set(store.status()[GONE].tolist()) == {STATUS_CODE["removed"]}
        assert store.counts() == {"ok": 97, "removed": 3}
    now = open_store(root).manifest().to_pylist()
    for row, (old, new) in enumerate(zip(manifest, now, strict=True)):
        if row not in GONE:
            assert new == old
        else:
            assert (new["status"], new["reason"]) == ("removed", "request 12")
            assert new["sha256"] is new["bytes"] is new["width"] is None
            assert (new["path"], new["identity"]) == (old["path"], old["identity"])
    # Nothing of their content is left in any file but the list that keeps it from coming back.
    kept_in = [n for n, data in tree(root).items() if any(s.encode() in data for s in sums)]
    assert kept_in == ["inputs/removed.json"]
    assert verify(open_store(root)).damages == []
    assert partials(root) == []
    assert len(list((root / "manifest").glob("part-*.parquet"))) == 2


def test_what_was_removed_does_not_come_back(tmp_path, folder, root):
    """Not by encoding again, not by a repair, not by its content under another name."""
    remove(root, GONE)
    after = data_files(root)
    assert encode_patch(folder, root, retry_bad=True).encoded == 0
    assert data_files(root) == after
    (root / "done" / "000000.json").unlink()
    assert encode_patch(folder, root).encoded == 84
    assert data_files(root) == after
    shutil.copy(folder / "0007.png", folder / "copy.png")
    picture(500).save(folder / "new.png", compress_level=1)
    encode_patch(folder, root)
    store = open_store(root)
    assert store.counts() == {"ok": 98, "removed": 4}
    assert store.manifest().to_pylist()[100]["sha256"] is None
    assert store.manifest().to_pylist()[101]["status"] == "ok"


def test_copies_are_found_by_content(folder, tmp_path):
    shutil.copy(folder / "0007.png", folder / "copy.png")
    root = tmp_path / "copies.zarr"
    encode_patch(folder, root)
    store = open_store(root)
    assert find_rows(store, paths=["0007.png"]) == [7]
    assert find_rows(store, identities=["copy.png"]) == [100]
    assert with_copies(store, [7]) == with_copies(store, [100]) == [7, 100]
    assert with_copies(store, [], [store.manifest(["sha256"])["sha256"][7].as_py()]) == [7, 100]
    assert with_copies(store, [], ["0" * 64]) == []
    assert remove(root, [7]).rows == [7, 100]
    with pytest.raises(UsageError, match=r"no row whose path is 'nowhere.png'"):
        find_rows(store, paths=["nowhere.png"])


def test_removing_twice_and_removing_more(root):
    remove(root, [7])
    assert remove(root, [7]).shards == 0
    remove(root, [8])
    assert sorted(read_removed(root).rows) == [7, 8]
    assert open_store(root).counts() == {"ok": 98, "removed": 2}
    assert verify(open_store(root)).damages == []


def test_derived_files_go(root):
    (root / "projections" / "analytic-8-x.safetensors").write_bytes(b"map")
    (root / "duplicates").mkdir(exist_ok=True)
    (root / "duplicates" / "groups.parquet").write_bytes(b"groups")
    remove(root, [7])
    assert [p.name for p in (root / "projections").iterdir()] == ["zarr.json"]
    assert [p.name for p in (root / "duplicates").iterdir()] == ["zarr.json"]


class Killed(BaseException):
    """No handler of ours catches it."""


def test_a_kill_at_any_rename_is_finished_by_the_next_run(tmp_path, folder, root, monkeypatch):
    """Stop before each rename in turn: the next writer ends at the same bytes."""
    undisturbed = tmp_path / "undisturbed.zarr"
    shutil.copytree(root, undisturbed)
    remove(undisturbed, GONE)
    expected = data_files(undisturbed)
    real, stops = Path.replace, 0
    for stop in range(60):
        copy = tmp_path / f"{stop}.zarr"
        shutil.copytree(root, copy)
        left = [stop]

        def replace(path, target, left=left):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(path, target)

        monkeypatch.setattr(Path, "replace", replace)
        # A killed process cleans nothing up.
        monkeypatch.setattr(files.Staged, "__exit__", lambda *_: None)
        try:
            remove(copy, GONE)
        except Killed:
            stops += 1
        monkeypatch.undo()
        if left[0]:
            break
        assert encode_patch(folder, copy).encoded == 0
        asked = bool(read_removed(copy).rows)
        assert data_files(copy) == (expected if asked else data_files(root)), f"stopped before rename {stop}"
        assert list(copy.rglob(f"*{PENDING}")) == []
        assert partials(copy) == []
        shutil.rmtree(copy)
    # The list; then of two arrays and two shards each: what is to come, (part,) status, latents, record.
    assert stops == 1 + 2 * 5 + 2 * 4


def test_an_interrupted_removal_is_told(root, monkeypatch):
    monkeypatch.setattr("latentstore.removal.finish", lambda root: 0)
    remove(root, [7])
    monkeypatch.undo()
    found = verify(open_store(root)).damages
    assert {d.what for d in found} == {"removal"}
    remove(root, [])
    assert verify(open_store(root)).damages == []


def test_a_damaged_or_missing_list_is_told(folder, root):
    remove(root, [7])
    path = root / "inputs" / "removed.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"7"', b'"8"'))
    assert [d.what for d in verify(open_store(root)).damages][:1] == ["removed list"]
    with pytest.raises(CorruptStoreError, match="Restore it"):
        encode_patch(folder, root)
    path.unlink()
    assert {d.what for d in verify(open_store(root)).damages} == {"removed list"}


def test_a_damaged_shard_is_not_sealed_by_a_removal(root):
    path = root / "latents" / "c" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="--repair"):
        remove(root, [7])


def test_rows_outside_and_simulated_stores_are_refused(root):
    with pytest.raises(UsageError, match="of a store of 100"):
        remove(root, [100])
    assert read_removed(root).rows == {}
    with writing(root):
        pass  # the lock was let go
