"""The proofs of `make prove`, scaled down: real kills, a real full disk, real flipped bytes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

# The repository's root, for the job that the proofs start.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import faults, flips
from latentstore.store import open_store
from latentstore.verify import Verification, verify

SMALL = {
    faults.job_killed: 2,
    faults.workers_killed: 1,
    faults.files_added: 1,
    faults.disk_full: 1,
    faults.poisoned: 1,
    faults.two_jobs: 2,
    faults.bytes_flipped: 250,
}


@pytest.mark.parametrize(
    ("prove", "size"), SMALL.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_proof(tmp_path, prove, size):
    proof = prove(tmp_path, size)
    assert len(proof.cases) >= min(proof.expected, 3)
    assert proof.holds, [case for case in proof.cases if not case.get("holds")]


def test_every_proof_is_run_at_both_sizes():
    assert SMALL.keys() == faults.FULL.keys()
    assert all(SMALL[prove] <= size for prove, size in faults.FULL.items())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    work = tmp_path_factory.mktemp("faults")
    faults.undisturbed(faults.photos(work / "in", 3 * faults.SHARD_ROWS), work / "s.zarr")
    return work / "s.zarr"


def test_same_sees_a_byte_a_file_and_a_partial(store, tmp_path):
    """The opposite of what the proofs claim is seen."""
    assert faults.same(store, store)
    for name in ("latents/c/1/0", "status/c/1", "done/000001.json", "inputs/part-000000.parquet"):
        copy = tmp_path / name.replace("/", " ")
        shutil.copytree(store, copy)
        data = bytearray((copy / name).read_bytes())
        data[-2] ^= 1
        (copy / name).write_bytes(data)
        assert faults.contents(copy) != faults.contents(store), name
    extra = tmp_path / "extra"
    shutil.copytree(store, extra)
    (extra / "latents" / "c" / "0" / "0.abc.partial").touch()
    assert not faults.same(extra, store)


def test_flips_that_nobody_sees_are_counted(store, monkeypatch):
    """With a blind verify every flip is missed."""
    monkeypatch.setattr(flips, "verify", lambda store: Verification())
    missed, kinds = flips.flip(store, 40, seed=0)
    # Unless a flip in the metadata keeps the store from being opened at all.
    assert 40 - kinds["metadata"] <= len(missed) <= 40
    assert not verify(open_store(store)).damages, "every byte was put back"


@pytest.mark.parametrize("name", ["done/000001.json", "done/seal.json"])
def test_a_byte_that_json_does_not_mind_is_found(store, tmp_path, name):
    copy = tmp_path / "s.zarr"
    shutil.copytree(store, copy)
    text = (copy / name).read_text()
    (copy / name).write_text(text.replace(": ", ":\t", 1))
    found = verify(open_store(copy)).damages
    assert [d.what for d in found] == ["seal" if "seal" in name else "record"]


def test_an_input_list_that_fails_its_checksum_is_not_read(store, tmp_path):
    copy = tmp_path / "s.zarr"
    shutil.copytree(store, copy)
    path = copy / "inputs" / "part-000000.parquet"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"000001.png", b"\xb800001.png") if b"000001.png" in data else data[:-9])
    assert [(d.what, d.shard) for d in verify(open_store(copy)).damages] == [("metadata", None)]
