"""Files that change after they were read: told apart, told of, and made anew only when asked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile

import fsspec
import numpy as np
import pytest
from store_worlds import data_files, encode_patch, file_bytes, photo_folder, picture, shard_facts, tree
from typer.testing import CliRunner

from cli.app import app
from latentstore.changes import changed_sources
from latentstore.encode import Source
from latentstore.encoders import PatchEncoder
from latentstore.errors import UsageError
from latentstore.simulate import Diffusion
from latentstore.store import open_store

N = 200  # shards of 84, 84 and 32 rows


def png(seed):
    return file_bytes(picture(seed), "PNG")


@pytest.fixture
def folder(tmp_path):
    return photo_folder(tmp_path / "in", N)


@pytest.fixture
def store(folder, tmp_path):
    encode_patch(folder, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def found(root, **options):
    return [(c.row, c.path, c.what) for c in changed_sources(open_store(root), **options)]


def change_all_ways(folder):
    """One file each way; return what is to be found, without and with reading."""
    (folder / "0001.png").unlink()
    (folder / "0002.png").write_bytes(png(999) + b"longer")
    touch(folder / "0003.png")
    same_size(folder / "0090.png")
    touch(folder / "0090.png")
    kept = (folder / "0091.png").stat()
    same_size(folder / "0091.png")
    os.utime(folder / "0091.png", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    seen = {1: "missing", 2: "size", 3: "mtime", 90: "mtime"}
    read = {1: "missing", 2: "size", 3: "touched", 90: "content", 91: "content"}
    return tuple([(row, f"{row:04d}.png", what) for row, what in w.items()] for w in (seen, read))


def touch(path):
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))


def same_size(path):
    """Other contents of the same length; still a picture, for a PNG ends before its last bytes."""
    data = path.read_bytes()
    path.write_bytes((png(999) + bytes(len(data)))[: len(data)])
    assert path.stat().st_size == len(data)
    assert path.read_bytes() != data


# --- what is found -----------------------------------------------------------------------------------


def test_nothing_changed(store):
    assert found(store) == found(store, content=True) == []


def test_each_change_has_its_name(folder, store):
    seen, read = change_all_ways(folder)
    assert found(store) == seen
    assert found(store, content=True) == read
    rows = []
    changed_sources(open_store(store), on_rows=lambda n, bad: rows.append((n, bad)))
    assert [sum(column) for column in zip(*rows, strict=True)] == [N, len(seen)]


def test_what_was_never_read_or_was_removed_is_passed_over(folder, tmp_path):
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "torn.png").write_bytes(b"no picture")
    encode_patch(folder, tmp_path / "s.zarr")
    words = ["remove", "0005.png", "--store", str(tmp_path / "s.zarr"), "--yes"]
    assert CliRunner().invoke(app, words).exit_code == 0
    (folder / "0005.png").unlink()
    (folder / "gone.png").unlink()
    (folder / "gone.png").write_bytes(png(1))
    assert found(tmp_path / "s.zarr", content=True) == []
    # A bad picture was read, and may be mended.
    (folder / "torn.png").write_bytes(png(1))
    assert [what for _, _, what in found(tmp_path / "s.zarr")] == ["size"]


def test_an_unfinished_store_is_looked_at_as_far_as_it_is(folder, store):
    (store / "done" / "000000.json").unlink()
    seen, _ = change_all_ways(folder)
    assert found(store) == [c for c in seen if c[0] >= 84]


def test_names_that_are_no_utf8(folder, tmp_path):
    name = os.fsencode(folder) + b"/z-\xe9.png"
    with open(name, "wb") as file:  # noqa: PTH123
        file.write(png(1))
    encode_patch(folder, tmp_path / "s.zarr")
    assert found(tmp_path / "s.zarr", content=True) == []
    os.utime(name, ns=(0, 0))
    assert found(tmp_path / "s.zarr") == [(N, "z-\\xe9.png", "mtime")]


def test_members_of_tars(tmp_path):
    def write(members, mtime=1_700_000_000):
        with tarfile.open(tmp_path / "in" / "x.tar", "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), mtime
                tar.addfile(info, io.BytesIO(data))

    (tmp_path / "in").mkdir()
    members = {f"{i}.png": png(i) for i in range(5)}
    write(members)
    encode_patch(tmp_path / "in", tmp_path / "s.zarr")
    # Written anew in another order: the members are what they were.
    write(dict(reversed(members.items())))
    assert found(tmp_path / "s.zarr", content=True) == []
    write({k: v for k, v in members.items() if k != "1.png"} | {"2.png": png(99) + b"-"})
    assert found(tmp_path / "s.zarr") == [(1, "x.tar/1.png", "missing"), (2, "x.tar/2.png", "size")]
    write(members, mtime=1_700_000_001)
    assert {what for _, _, what in found(tmp_path / "s.zarr")} == {"mtime"}
    assert {what for _, _, what in found(tmp_path / "s.zarr", content=True)} == {"touched"}


def test_files_behind_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    try:
        memory.pipe({f"/changes/{i}.png": png(i) for i in range(4)})
        encode_patch(None, tmp_path / "s.zarr", source=Source.of("memory://changes"))
        assert found(tmp_path / "s.zarr", content=True) == []
        memory.rm("/changes/0.png")
        memory.pipe("/changes/1.png", png(1) + b"-")
        memory.pipe("/changes/2.png", bytes(len(png(2))))
        assert [w for _, _, w in found(tmp_path / "s.zarr")] == ["missing", "size"]
        assert [w for _, _, w in found(tmp_path / "s.zarr", content=True)] == ["missing", "size", "content"]
        # Encoding again asks for none of them: each would cost a request.
        assert encode_patch(None, tmp_path / "s.zarr", source=Source.of("memory://changes")).changed == {}
    finally:
        memory.rm("/changes", recursive=True)


def test_simulated_stores_have_no_files(folder, store, tmp_path):
    from cli.workflows import run_simulate

    run_simulate(store, tmp_path / "sim.zarr", Diffusion())
    with pytest.raises(UsageError, match="simulated"):
        changed_sources(open_store(tmp_path / "sim.zarr"))


# --- the command line --------------------------------------------------------------------------------


def test_verify_tells(folder, store):
    runner = CliRunner()
    assert runner.invoke(app, ["verify", str(store), "--sources", "--check-sources"]).exit_code == 0
    touch(folder / "0003.png")
    by_time = runner.invoke(app, ["verify", str(store), "--sources"])
    assert (by_time.exit_code, "1 files have another time" in by_time.output) == (3, True)
    by_content = runner.invoke(app, ["verify", str(store), "--check-sources"])
    assert by_content.exit_code == 0, "only touched"
    assert "only touched" in by_content.output
    change_all_ways(folder)
    assert runner.invoke(app, ["verify", str(store)]).exit_code == 0, "the store itself is whole"
    said = runner.invoke(app, ["verify", str(store), "--check-sources", "--json"])
    assert said.exit_code == 3
    whats = [c["what"] for c in json.loads(said.output)["sources"]]
    assert whats == ["missing", "size", "touched", "content", "content"]
    said = runner.invoke(app, ["verify", str(store), "--sources"])
    assert "--retry-changed" in said.output
    assert "0002.png" in said.output


def test_rows_are_encoded_again_from_wherever_they_came(tmp_path):
    """`--sample` and `--repair` know tars, and paths that are relative to an old working folder."""
    photo_folder(tmp_path / "photos", 100)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "x.tar", "w") as tar:
        tar.add(tmp_path / "photos", ".")
    root = tmp_path / "s.zarr"
    encode_patch(None, root, source=Source.of(str(tmp_path / "tars" / "x.{tar,tar}")))
    assert '"sampled": 7' in CliRunner().invoke(app, ["verify", str(root), "--sample", "7", "--json"]).output
    before = data_files(root)
    (root / "latents" / "c" / "1" / "0").write_bytes(b"damage")
    repaired = CliRunner().invoke(app, ["verify", str(root), "--repair"])
    assert repaired.exit_code == 0, repaired.output
    assert data_files(root) == before


# --- encoding again ----------------------------------------------------------------------------------


def test_encode_warns_and_changes_nothing(folder, store):
    data = (folder / "0001.png").read_bytes()
    change_all_ways(folder)
    (folder / "0001.png").write_bytes(data)
    before = tree(store)
    summary = encode_patch(folder, store)
    assert (summary.encoded, summary.changed) == (0, {"mtime": 3, "size": 1})
    assert summary.changed_first[:2] == [("0001.png", "mtime"), ("0002.png", "size")]
    del before["done/lock"]
    assert {k: v for k, v in tree(store).items() if k != "done/lock"} == before
    words = ["encode", str(folder), "--store", str(store)]
    said = CliRunner().invoke(app, words).output
    assert "Warning: committed files are not as they were read: 3 mtime, 1 size (0001.png" in said
    by_content = encode_patch(folder, store, check_sources=True)
    assert by_content.changed == {"size": 1, "content": 2}


def test_a_damaged_manifest_stops_no_encoding(folder, store):
    part = next((store / "manifest").glob("part-000001-*"))
    body = bytearray(part.read_bytes())
    body[:4] = b"PARX"
    part.write_bytes(body)
    picture(7).save(folder / "z.png")
    assert encode_patch(folder, store).appended == 1
    said = CliRunner().invoke(app, ["verify", str(store), "--sources"])
    assert (said.exit_code, "DAMAGED shard 1" in said.output) == (3, True)


def test_retry_changed_makes_only_changed_contents_anew(folder, store, tmp_path):
    touch(folder / "0000.png")
    same_size(folder / "0090.png")
    touch(folder / "0090.png")
    before = shard_facts(store)
    summary = encode_patch(folder, store, retry_changed=True)
    assert (summary.encoded, summary.changed) == (1, {})
    after = shard_facts(store)
    assert {s for s in before if before[s] != after[s]} == {"1"}
    fresh = tmp_path / "fresh.zarr"
    encode_patch(folder, fresh)
    new, old = open_store(fresh), open_store(store)
    assert (new.reader.read(0, N) == old.reader.read(0, N)).all()
    columns = ["path", "sha256", "status"]
    assert new.manifest(columns).equals(old.manifest(columns))
    assert encode_patch(folder, store, retry_changed=True).encoded == 0
    # The same size and time: only reading tells.
    kept = (folder / "0199.png").stat()
    same_size(folder / "0199.png")
    os.utime(folder / "0199.png", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert encode_patch(folder, store, retry_changed=True).encoded == 0
    words = ["encode", str(folder), "--store", str(store), "--retry-changed", "--check-sources", "--json"]
    assert json.loads(CliRunner().invoke(app, words).output)["encoded"] == 1
    assert found(store, content=True) == [(0, "0000.png", "touched")]


def test_retry_changed_loses_no_row(folder, store):
    """Other rows of the shard stay as they are, also where their files are gone."""
    (folder / "0002.png").write_bytes(png(999) + b"-")
    (folder / "0083.png").unlink()
    old = open_store(store).reader.read(0, N).copy()
    was = open_store(store).manifest().to_pylist()
    summary = encode_patch(folder, store, retry_changed=True)
    assert (summary.encoded, summary.changed) == (1, {"missing": 1})
    now = open_store(store)
    assert now.counts() == {"ok": N}
    differ = np.flatnonzero((now.reader.read(0, N) != old).any(axis=1))
    assert differ.tolist() == [2]
    rows = now.manifest().to_pylist()
    assert [i for i in range(N) if rows[i] != was[i]] == [2]
    assert rows[2]["sha256"] == hashlib.sha256(png(999) + b"-").hexdigest()


def test_retry_changed_reaches_every_array(folder, store):
    """A row is one picture in all arrays: none may keep the old one's latent."""
    second = store / "second"
    encode_patch(folder, second, encoder=PatchEncoder(32))
    same_size(folder / "0090.png")
    touch(folder / "0090.png")
    with pytest.raises(UsageError, match="name it"):
        encode_patch(folder, second, encoder=PatchEncoder(32), retry_changed=True)
    encode_patch(folder, store, retry_changed=True)
    assert open_store(second).todo() == [1]
    encode_patch(folder, second, encoder=PatchEncoder(32))
    fresh = store.with_name("fresh.zarr")
    encode_patch(folder, fresh, encoder=PatchEncoder(32))
    assert (open_store(second).reader.read(0, N) == open_store(fresh).reader.read(0, N)).all()
    assert open_store(second).counts() == {"ok": N}
