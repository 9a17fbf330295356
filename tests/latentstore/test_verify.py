"""verify: whatever byte is flipped, wherever, it is found; and only what is damaged is made anew."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from store_worlds import data_files, encode_patch, photo_folder
from typer.testing import CliRunner

from cli.app import app
from latentstore.errors import LatentStoreError
from latentstore.store import open_store
from latentstore.verify import verify

N = 400


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store and, beside it, the pictures that it was made from. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    photo_folder(folder / "in", N)
    encode_patch(folder / "in", folder / "s.zarr")
    return folder / "s.zarr"


@pytest.fixture
def store(whole, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(whole, tmp_path / "s.zarr")


def found(root):
    """What a check says; a store that will not even open is found too."""
    try:
        return verify(open_store(root)).damages
    except LatentStoreError as exc:
        return [exc]


def test_a_whole_store_is_whole(store):
    result = verify(open_store(store))
    assert (result.damages, result.open_shards, result.shards) == ([], 0, 5)
    assert result.bytes > N * 512


def test_every_flipped_byte_is_found(tmp_path):
    """Bytes spread over arrays, records, manifest parts, lists and metadata; one at a time, then put back."""
    store = tmp_path / "s.zarr"
    encode_patch(photo_folder(tmp_path / "in", 180), store)  # three shards, the last one short
    rng = np.random.default_rng(0)
    files = [p for p in sorted(store.rglob("*")) if p.is_file() and p.name != "lock"]
    kinds = {p.relative_to(store).parts[0] for p in files}
    assert {"latents", "status", "done", "manifest", "inputs", "zarr.json"} <= kinds
    missed = []
    for path in files:
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 8):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            if not found(store):
                missed.append((path.name, int(at)))
        path.write_bytes(whole)
    assert missed == []
    assert not found(store)


@pytest.mark.parametrize("name", ["latents/c/3/0", "status/c/3", "done/000003.json", "manifest"])
def test_repair_makes_only_the_damaged_shard_anew(store, name):
    before = data_files(store)
    kept = {s: (store / f"latents/c/{s}/0").stat().st_ino for s in (0, 1, 2, 4)}
    path = next((store / "manifest").glob("part-000003-*")) if name == "manifest" else store / name
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 255
    path.write_bytes(body)
    runner = CliRunner()
    said = runner.invoke(app, ["verify", str(store)])
    assert said.exit_code == 3
    assert "DAMAGED shard 3" in said.output
    said = runner.invoke(app, ["verify", str(store), "--repair"])
    assert said.exit_code == 0, said.output
    assert "damaged shards that were made anew: 1" in said.output
    assert data_files(store) == before
    assert {s: (store / f"latents/c/{s}/0").stat().st_ino for s in kept} == kept


def test_rows_encoded_again_agree_and_changed_weights_would_not(store):
    said = CliRunner().invoke(app, ["verify", str(store), "--sample", "9", "--json"])
    assert said.exit_code == 0
    assert '"sampled": 9' in said.output
    # A row that is well recorded, but is another picture's latent: only encoding again can tell.
    from latentstore.encoders import PatchEncoder
    from latentstore.verify import Verification, sample_again

    class Other(PatchEncoder):
        def encode(self, images, rows):
            return super().encode(images, rows) * 1.1

    result = Verification()
    sample_again(open_store(store), Other(64), result, rows=5)
    assert result.sampled == 5
    assert len(result.damages) == 5


def test_an_unfinished_store_is_open_not_damaged(store):
    (store / "done" / "000002.json").unlink()
    result = verify(open_store(store))
    assert (result.damages, result.open_shards) == ([], 1)


def test_growing_keeps_the_seal(tmp_path):
    store = tmp_path / "s.zarr"
    encode_patch(photo_folder(tmp_path / "in", 100), store)
    for i in range(3):
        (tmp_path / "in" / f"z{i}.png").write_bytes((tmp_path / "in" / "0001.png").read_bytes())
    encode_patch(tmp_path / "in", store)
    assert not found(store)
    # Killed between the last resize and the seal: the next run seals, verify is content.
    from latentstore.seal import read_seal, write_seal
    from latentstore.store import settle

    assert "inputs/part-000001.parquet" in read_seal(store)
    part = store / "inputs" / "part-000001.parquet"
    aside = part.read_bytes()
    part.unlink()
    write_seal(store)
    part.write_bytes(aside)
    settle(open_store(store))
    assert not found(store)


def test_info(store):
    import json

    facts = json.loads(CliRunner().invoke(app, ["info", str(store), "--json"]).output)
    assert facts["rows"] == N
    assert facts["statuses"] == {"ok": N}
    assert facts["committed shards"] == facts["shards"] == 5
    assert sum(facts["splits"].values()) == N
    assert facts["space"]["id"] == open_store(store).space.id
    assert "rows: 400" in CliRunner().invoke(app, ["info", str(store)]).output
