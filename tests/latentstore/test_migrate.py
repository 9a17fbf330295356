"""A store of schema 1, made by the version that wrote it, reads, migrates and goes on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from store_worlds import encode_patch, photo_folder

from latentstore import files
from latentstore.encoders import PatchEncoder
from latentstore.errors import StoreFormatError
from latentstore.migrate import migrate
from latentstore.schema import SCHEMA_VERSION, STATUS_NAMES
from latentstore.store import open_store, writing
from latentstore.verify import verify

OLD = Path(__file__).with_name("data") / "store-v1.tar.gz"


@pytest.fixture
def root(tmp_path):
    with tarfile.open(OLD) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "latents.zarr"


def test_it_reads_as_it_is(tmp_path, root):
    store = open_store(root)
    assert store.schema == 1
    assert store.todo() == []
    assert store.counts() == {"ok": 99, "unreadable": 1}
    assert verify(store).damages == []
    folder = photo_folder(tmp_path / "images", 100)
    (folder / "0007.png").write_bytes(b"not a picture")
    encode_patch(folder, tmp_path / "new.zarr", encoder=PatchEncoder(16))
    assert np.array_equal(store.reader.read(0, 100), open_store(tmp_path / "new.zarr").reader.read(0, 100))


def test_migration_changes_metadata_alone(root):
    def contents():
        return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}

    before = contents()
    with writing(root):
        assert migrate(root) == (1, SCHEMA_VERSION)
        assert migrate(root) == (SCHEMA_VERSION, SCHEMA_VERSION)
    after = contents()
    changed = {str(p.relative_to(root)) for p in after if after[p] != before.get(p)}
    assert changed == {"zarr.json", "status/zarr.json", "done/seal.json", "done/lock"}
    store = open_store(root)
    assert store.schema == SCHEMA_VERSION
    assert verify(store).damages == []
    attrs = json.loads((root / "status" / "zarr.json").read_bytes())["attributes"]
    assert attrs["flag_meanings"].split() == list(STATUS_NAMES)


def test_a_migration_that_is_killed_is_done_again(root, monkeypatch):
    real, calls = files.write_atomic, []

    def write(path, data):
        calls.append(path.name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        real(path, data)

    for stop in (1, 2, 3):  # noqa: B007 (the closure reads it)
        calls.clear()
        for module in ("latentstore.migrate", "latentstore.seal"):
            monkeypatch.setattr(f"{module}.write_atomic", write)
        with pytest.raises(KeyboardInterrupt):
            migrate(root)
        monkeypatch.undo()
        assert open_store(root).schema == 1
        assert open_store(root).counts() == {"ok": 99, "unreadable": 1}
    assert calls == ["zarr.json", "seal.json", "zarr.json"]
    migrate(root)
    assert verify(open_store(root)).damages == []


def test_encode_migrates_and_goes_on(tmp_path, root):
    folder = photo_folder(tmp_path / "images", 120)
    (folder / "0007.png").write_bytes(b"not a picture")
    path = root / "zarr.json"
    # The folder it was made from is gone; a store may be moved together with its images.
    assert not Path(json.loads(path.read_bytes())["attributes"]["latentstore"]["origin"]["root"]).exists()
    summary = encode_patch(folder, root, encoder=PatchEncoder(16))
    assert (summary.encoded, summary.appended) == (20, 20)
    assert open_store(root).schema == SCHEMA_VERSION
    assert verify(open_store(root)).damages == []


@pytest.mark.parametrize("schema", [0, SCHEMA_VERSION + 1, "2"])
def test_other_schemas_are_refused(root, schema):
    body = json.loads((root / "zarr.json").read_bytes())
    body["attributes"]["latentstore"]["schema"] = schema
    (root / "zarr.json").write_text(json.dumps(body))
    with pytest.raises(StoreFormatError, match=r"use the version of latentstore that wrote it"):
        open_store(root)
