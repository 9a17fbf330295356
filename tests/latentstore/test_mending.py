"""Repairs, retries and takedowns lose no good row, and seal no damage."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from store_worlds import data_files, encode_patch, expected_latent, photo_folder, picture, png_claiming, tree
from typer.testing import CliRunner

from cli.app import app
from cli.keeping import mend
from latentstore import files
from latentstore.encode import Source, encode
from latentstore.encoders import PatchEncoder
from latentstore.errors import CorruptStoreError, UsageError
from latentstore.removal import find_rows, read_removed, remove
from latentstore.schema import STATUS_CODE
from latentstore.shards import record_file
from latentstore.store import open_store
from latentstore.verify import verify

N = 100


@pytest.fixture
def folder(tmp_path):
    return photo_folder(tmp_path / "images", N)


@pytest.fixture
def root(tmp_path, folder):
    encode_patch(folder, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def flip(path, at=1000, bit=4):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= bit
    path.write_bytes(data)


def small(folder, root, **options):
    return encode(Source(folder), root / "small", PatchEncoder(32), threads=2, **options)


def rows_of(root, name=""):
    return open_store(root / name if name else root).reader.read(0, N).copy()


# --- repair ------------------------------------------------------------------------------------------


def repair(root, *words):
    return CliRunner().invoke(app, ["verify", str(root), "--repair", *words])


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_repair_refuses_to_lose_rows(folder, root, what):
    """One flipped bit must not cost the rows whose files are gone; nothing is touched until that is known."""
    flip(root / "latents" / "c" / "0" / "0")
    if what == "gone":
        (folder / "0007.png").unlink()
    else:
        picture(999).save(folder / "0007.png", compress_level=1)
    before = tree(root)
    said = repair(root)
    assert (said.exit_code, "0007.png" in said.output, "--give-up-rows" in said.output) == (1, True, True)
    assert {k: v for k, v in tree(root).items() if k != "done/lock"} == {
        k: v for k, v in before.items() if k != "done/lock"
    }
    assert repair(root, "--give-up-rows").exit_code == 0
    counts = {"ok": 99, "missing": 1} if what == "gone" else {"ok": 100}
    assert open_store(root).counts() == counts


@pytest.mark.parametrize("file", ["status/c/0", "latents/c/0/0 padding"])
def test_whole_latents_are_kept_without_their_files(folder, root, file):
    """Statuses, padding and index are written again from the latents and the manifest."""
    before = data_files(root)
    name, _, padding = file.partition(" ")
    flip(root / name, at=-1 if padding else 5)
    shutil.rmtree(folder)
    folder.mkdir()
    said = repair(root)
    assert said.exit_code == 0, said.output
    assert data_files(root) == before


def test_a_repair_appends_nothing_and_keeps_the_pixel_bound(tmp_path, folder):
    root = tmp_path / "bound.zarr"
    encode_patch(folder, root, max_pixels=100)  # every picture has 480
    before = open_store(root).counts()
    assert before == {"too_large": N}
    picture(5).save(folder / "new.png", compress_level=1)
    flip(root / "latents" / "c" / "0" / "0")
    assert repair(root).exit_code == 0
    assert open_store(root).counts() == before
    assert verify(open_store(root)).damages == []


def test_what_a_writer_was_at_is_not_mended(root):
    """Damage that is gone when the lock is held was a writer's work."""
    path = root / "latents" / "c" / "0" / "0"
    whole = path.read_bytes()
    flip(path)
    found = verify(open_store(root))
    path.write_bytes(whole)
    before = data_files(root)
    assert mend(open_store(root), found) == 0
    assert data_files(root) == before


# --- retries -----------------------------------------------------------------------------------------


def test_retry_bad_reads_bad_rows_alone(tmp_path, folder):
    (folder / "0003.png").write_bytes(b"no picture")
    root = tmp_path / "bad.zarr"
    encode_patch(folder, root)
    before = rows_of(root)
    picture(3).save(folder / "0003.png", compress_level=1)
    (folder / "0004.png").unlink()
    summary = encode_patch(folder, root, retry_bad=True)
    assert summary.encoded == 1
    assert open_store(root).counts() == {"ok": N}
    assert np.flatnonzero((rows_of(root) != before).any(axis=1)).tolist() == [3]
    assert verify(open_store(root)).damages == []


@pytest.mark.parametrize("stop", range(5))
def test_a_retry_that_is_killed_loses_nothing(tmp_path, folder, monkeypatch, stop):
    (folder / "0003.png").write_bytes(b"no picture")
    root = tmp_path / "bad.zarr"
    encode_patch(folder, root)
    picture(3).save(folder / "0003.png", compress_level=1)
    shutil.copytree(root, tmp_path / "undisturbed.zarr")
    encode_patch(folder, tmp_path / "undisturbed.zarr", retry_bad=True)
    killed(monkeypatch, stop, lambda: encode_patch(folder, root, retry_bad=True))
    (folder / "0004.png").unlink()
    encode_patch(folder, root, retry_bad=True)
    assert data_files(root) == data_files(tmp_path / "undisturbed.zarr")


@pytest.mark.parametrize(
    ("codec", "stop"), [(None, None), ("zstd", None), *((None, stop) for stop in range(9)), ("zstd", 7)]
)
def test_a_run_that_appends_retries_the_last_shard_too(tmp_path, folder, monkeypatch, codec, stop):
    """One row mended, one changed and one file added in one run; nothing else is read, killed or not."""
    root, shown = tmp_path / "bad.zarr", folder / "0095.png"
    shown.write_bytes(b"no picture")
    encode_patch(folder, root, codec=codec)
    before = rows_of(root)
    picture(95).save(shown, compress_level=1)
    picture(999).save(folder / "0096.png", compress_level=1)
    picture(N).save(folder / "9999.png", compress_level=1)
    for i in range(84, 95):
        (folder / f"{i:04d}.png").unlink()

    def run():
        # The list is looked at only once: what is gone stays a row.
        return encode_patch(folder, root, retry_bad=True, retry_changed=True)

    if stop is None:
        assert (run().encoded, open_store(root).counts()) == (3, {"ok": N + 1})
    else:
        killed(monkeypatch, stop, run)
        run()
    store = open_store(root)
    assert store.counts() == {"ok": N + 1}
    assert verify(store).damages == []
    assert np.flatnonzero((rows_of(root) != before).any(axis=1)).tolist() == [95, 96]
    found = store.reader.read(95, N + 1)[[0, 1, -1]]
    expected = [expected_latent(picture(i)) for i in (95, 999, N)]
    # Neighbours in float16; near zero, what float32 products lose.
    assert np.allclose(found, expected, rtol=np.finfo(np.float16).eps, atol=1e-5)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_further_array_follows_a_last_shard_that_was_mended_and_grew(tmp_path, folder, root, at_once):
    small(folder, root)
    picture(999).save(folder / "0096.png", compress_level=1)
    if not at_once:
        encode_patch(folder, root, retry_changed=True)
    picture(N).save(folder / "9999.png", compress_level=1)
    encode_patch(folder, root, retry_changed=at_once)
    small(folder, root)
    fresh = tmp_path / "fresh.zarr"
    encode_patch(folder, fresh)
    small(folder, fresh)
    assert np.array_equal(rows_of(root, "small"), rows_of(fresh, "small"))
    assert verify(open_store(root)).damages == []


class Killed(BaseException):
    """No handler of ours catches it."""


def killed(monkeypatch, stop, run):
    """Run until just before the given rename; a killed process cleans nothing up."""
    from pathlib import Path

    real, left = Path.replace, [stop]

    def replace(path, target):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(files.Staged, "__exit__", lambda *_: None)
    try:
        run()
    except Killed:
        pass
    else:
        raise AssertionError(f"no rename {stop}")
    finally:
        monkeypatch.undo()


def test_a_further_array_follows_what_the_first_has_now(folder, root):
    """When a row of the first is another picture, or bad no more, the second's shard is open."""
    small(folder, root)
    picture(999).save(folder / "0003.png", compress_level=1)
    encode_patch(folder, root, retry_changed=True)
    assert open_store(root / "small").todo() == [0]
    small(folder, root)
    assert open_store(root / "small").todo() == []
    assert verify(open_store(root)).damages == []


@pytest.mark.parametrize("stop", range(4))
def test_a_coded_append_that_is_killed_loses_no_row(tmp_path, folder, monkeypatch, stop):
    root = tmp_path / "coded.zarr"
    encode_patch(folder, root, codec="zstd")
    remove(root, [90])
    before = rows_of(root)
    for i in range(N, N + 20):
        picture(i).save(folder / f"{i:04d}.png", compress_level=1)
    killed(monkeypatch, 4 + stop, lambda: encode_patch(folder, root))
    for i in range(N):
        (folder / f"{i:04d}.png").unlink()
    source = Source(folder)
    encode_patch(folder, root, source=source)
    assert open_store(root).counts() == {"ok": N + 19, "removed": 1}
    assert np.array_equal(rows_of(root), before)
    assert verify(open_store(root)).damages == []


# --- takedown ----------------------------------------------------------------------------------------


def test_rows_are_found_in_an_unfinished_store(root):
    """By the input list, not by place in a manifest that lacks open shards."""
    record_file(root, 0).unlink()
    assert find_rows(open_store(root), paths=["0090.png"]) == [90]
    assert find_rows(open_store(root), paths=["0003.png"]) == [3]
    done = remove(root, [90, 3])
    assert done.paths == ["0003.png", "0090.png"]
    assert open_store(root).status()[90] == STATUS_CODE["removed"]
    # The open shard's old files may hold the removed row: they are gone.
    assert not (root / "latents" / "c" / "0" / "0").exists()


def test_damaged_statuses_cost_no_row(folder, root):
    """A takedown, and every later run, refuses a shard whose statuses fail their checksum."""
    remove(root, [7])
    before = rows_of(root)
    data = bytearray((root / "status" / "c" / "0").read_bytes())
    data[20] = STATUS_CODE["too_large"]
    (root / "status" / "c" / "0").write_bytes(data)
    with pytest.raises(CorruptStoreError, match="--repair"):
        encode_patch(folder, root)
    assert np.array_equal(rows_of(root), before)
    assert repair(root).exit_code == 0
    assert np.array_equal(rows_of(root), before)
    assert open_store(root).counts() == {"ok": 99, "removed": 1}


def test_a_damaged_manifest_is_not_sealed_by_a_removal(root):
    part = next((root / "manifest").glob("part-000000-*"))
    flip(part, at=200)
    with pytest.raises(CorruptStoreError):
        remove(root, [7])
    assert "manifest" in {d.what for d in verify(open_store(root)).damages}


@pytest.mark.parametrize("stop", range(1, 6))
def test_removing_a_bad_row_survives_a_kill(tmp_path, folder, monkeypatch, stop):
    """Its latent is zeros before and after: nothing may be told from the latents alone."""
    (folder / "0003.png").write_bytes(b"no picture")
    root = tmp_path / "bad.zarr"
    encode_patch(folder, root)
    killed(monkeypatch, stop, lambda: remove(root, [3]))
    encode_patch(folder, root)
    assert open_store(root).counts() == {"ok": 99, "removed": 1}
    assert verify(open_store(root)).damages == []
    assert len(list((root / "manifest").glob("part-000000-*"))) == 1


def test_a_copy_that_came_meanwhile_goes_too(folder, root):
    shutil.copy(folder / "0007.png", folder / "late.png")
    encode_patch(folder, root)
    assert remove(root, [7]).rows == [7, 100]
    assert open_store(root).counts() == {"ok": 99, "removed": 2}


def test_removed_content_gets_in_by_no_side_door(tmp_path, folder):
    """A copy that is refused for another reason leaves no hash of the removed picture, either."""
    (folder / "0003.png").write_bytes(png_claiming(20_000, 20_000))
    root = tmp_path / "large.zarr"
    encode_patch(folder, root)
    sha256 = open_store(root).manifest().to_pylist()[3]["sha256"]
    assert sha256
    remove(root, [3])
    shutil.copy(folder / "0003.png", folder / "again.png")
    encode_patch(folder, root)
    assert open_store(root).manifest().to_pylist()[100]["status"] == "removed"
    held = [name for name, data in tree(root).items() if sha256.encode() in data]
    assert held == ["inputs/removed.json"]


def test_takedown_names_the_near_duplicates_that_stay(tmp_path):
    folder = photo_folder(tmp_path / "images", 60)
    picture(7).save(folder / "near.jpg", quality=90)
    root = tmp_path / "near.zarr"
    encode_patch(folder, root)
    words = ["remove", "near.jpg", "--store", str(root), "--yes"]
    assert CliRunner().invoke(app, ["duplicates", str(root)]).exit_code == 0
    assert verify(open_store(root)).damages == []
    said = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(said.stdout)["near_left"] == ["0007.png"]
    assert CliRunner().invoke(app, ["duplicates", str(root)]).exit_code == 0


# --- the seal ----------------------------------------------------------------------------------------


def test_growing_seals_no_damage(folder, root):
    flip(root / "manifest" / "zarr.json", at=3, bit=1)
    assert "metadata" in {d.what for d in verify(open_store(root)).damages}
    picture(500).save(folder / "new.png", compress_level=1)
    encode_patch(folder, root)
    small(folder, root)
    assert "metadata" in {d.what for d in verify(open_store(root)).damages}


def test_an_array_whose_creation_was_killed_is_sealed_by_the_next_run(folder, root, monkeypatch):
    def no_seal(*_, **__):
        raise Killed

    monkeypatch.setattr("latentstore.create.write_seal", no_seal)
    with pytest.raises(Killed):
        small(folder, root)
    monkeypatch.undo()
    small(folder, root)
    flip(root / "small" / "zarr.json", at=-3, bit=1)
    assert "metadata" in {d.what for d in verify(open_store(root)).damages}


def test_a_damaged_seal_is_mended(root):
    flip(root / "done" / "seal.json", at=40)
    assert repair(root).exit_code == 0
    assert verify(open_store(root)).damages == []


def test_lossy_codecs_make_no_infinity(tmp_path, folder):
    from store_worlds import make_store

    latents = np.full((10, 8), 60000, np.float16)
    store = make_store(tmp_path / "inf.zarr", latents, codec="bitround:1")
    assert store.counts() == {"not_finite": 10}
    assert np.isfinite(store.reader.read(0, 10)).all()


def test_links_stay_followed(tmp_path, folder):
    """Once --follow-links was given, a later run and a repair read what was read."""
    farm = tmp_path / "farm"
    farm.mkdir()
    for i in range(5):
        (farm / f"{i}.png").symlink_to(folder / f"{i:04d}.png")
    root = tmp_path / "farm.zarr"
    encode_patch(farm, root)
    assert open_store(root).counts() == {"link_outside": 5}
    encode_patch(farm, root, source=Source(farm, follow_links=True), retry_bad=True)
    assert open_store(root).counts() == {"ok": 5}
    flip(root / "latents" / "c" / "0" / "0")
    assert repair(root).exit_code == 0
    assert open_store(root).counts() == {"ok": 5}
    assert verify(open_store(root)).damages == []


def test_lists_that_are_not_there(root):
    assert read_removed(root).rows == {}
    with pytest.raises(UsageError):
        remove(root, [N])
