"""plan: what it says is what encode then does, the model's theorems, and nothing is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_worlds import SIZE, encode_patch, photo_folder, picture, tree

from latentstore import trial
from latentstore.encode import Source
from latentstore.encoders import PatchEncoder
from latentstore.errors import SpaceMismatchError, StoreWriteError, UsageError
from latentstore.plan import pace_of, plan
from latentstore.schema import Layout, Space
from latentstore.shards import record_file
from latentstore.trial import Costs


def plan_patch(folder, root, **options):
    return plan(Source(folder), root, PatchEncoder(SIZE), **{"shard_rows": 84, "sample": 8} | options)


def costs(**changed):
    """One image: 1 ms to read, 4 to decode, 6 (of CPU: 10) to encode; a disk of 100 MB/s."""
    given = {
        "sampled": 32, "bad": 0, "bad_named": [], "file_bytes": 1e5, "read_ms": 1.0, "decode_ms": 4.0,
        "spread_ms": 0.1, "encode_ms": 6.0, "encode_cpu_ms": 10.0, "manifest_row_bytes": 80.0,
        "manifest_shard_bytes": 1500.0, "write_rate": 1e8,
    }  # fmt: skip
    return Costs(**given | changed)


LAYOUT = Layout.plan(84_000, 5000, shard_rows=84)  # 10 kB a row
MACHINE = {"batch": 84, "threads": 2, "cores": 2, "on_cpu": True}


# --- what it says is what encode does ----------------------------------------------------------------


def test_a_new_store_as_planned(photos, tmp_path):
    root = tmp_path / "latents.zarr"
    found = plan_patch(photos, root)
    assert not list(tmp_path.iterdir()), "nothing appears, not even for a moment beside the store"
    summary = encode_patch(photos, root)
    assert (found.new, found.rows, found.rows_left) == (True, summary.rows, summary.encoded)
    files = [p for p in root.rglob("*") if p.is_file()]
    actual = sum(p.stat().st_size for p in files)
    # Not planned: a few kB of metadata; and the sample's rows compress a little otherwise.
    assert found.bytes_left == pytest.approx(actual, rel=0.02, abs=10_000)
    assert found.shards_left == len(list((root / "latents" / "c").iterdir()))


@pytest.mark.parametrize("open_shards", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("added", [0, 3, 100])
def test_what_is_left_is_what_encode_then_does(tmp_path, open_shards, added):
    folder = photo_folder(tmp_path / "images", 200)  # shards of 84, 84 and 32 rows
    root = tmp_path / "latents.zarr"
    encode_patch(folder, root)
    for shard in open_shards:
        record_file(root, shard).unlink()
    for i in range(added):
        picture(1000 + i).save(folder / f"new {i:03d}.png")
    before = tree(tmp_path)
    found = plan_patch(folder, root, shard_rows=None, sample=0)
    assert tree(tmp_path) == before
    assert found.rows_left == encode_patch(folder, root).encoded
    assert (found.new, found.rows) == (False, 200 + added)
    after = tree(root)
    names = {f"latents/c/{s}/0" for s in range(found.rows // 84 + 1)}
    written = sum(len(after[n]) for n in names if after[n] != before.get(f"latents.zarr/{n}"))
    written += sum(len(after[f"latents/c/{s}/0"]) for s in open_shards if s < 2 or not added)
    # Only the lists and records around the latents are estimated: some hundred bytes a row.
    assert written <= found.bytes_left <= written + 5000 + 700 * found.rows_left
    assert plan_patch(folder, root, shard_rows=None, sample=0).rows_left == 0


def test_a_further_array_has_the_rows_of_the_first(photos, undisturbed):
    found = plan(Source(photos), undisturbed / "other", PatchEncoder(SIZE * 2), sample=4)
    assert (found.new, found.rows, found.shard_rows) == (True, 800, 84)
    assert not (undisturbed / "other").exists()


def test_refused_as_encode_would(photos, undisturbed, tmp_path):
    with pytest.raises(SpaceMismatchError):
        plan(Source(photos), undisturbed, PatchEncoder(SIZE * 2))
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").touch()
    inside = undisturbed / "latents" / "store.zarr"
    for root in (occupied, inside):
        with pytest.raises(UsageError):
            plan_patch(photos, root)
        with pytest.raises(UsageError):
            encode_patch(photos, root)
    with pytest.raises(UsageError, match="1 or more"):
        plan_patch(photos, tmp_path / "new.zarr", machines=(1, 0))
    with pytest.raises(UsageError):
        plan_patch(tmp_path / "nowhere", tmp_path / "new.zarr")


class Huge:
    """An encoder whose latents fit on no disk."""

    space = Space("huge", "0", 8, (10**12, 1, 1))
    facts = {"name": "huge", "device": "cpu"}  # noqa: RUF012
    batch = 1

    def encode(self, images, rows):
        raise AssertionError("refused before anything is encoded")


def test_what_cannot_fit_is_refused_before_anything_is_measured(photos, tmp_path):
    with pytest.raises(StoreWriteError, match=r"needs [0-9.]+ GB, but [0-9.]+ GB are free"):
        plan(Source(photos), tmp_path / "new.zarr", Huge())
    found = plan(Source(photos), tmp_path / "new.zarr", Huge(), sample=0, rows=[5])
    assert not any(e.fits for e in found.extents), "asked for other sizes: said, not refused"
    assert not list(tmp_path.iterdir())


# --- the model ---------------------------------------------------------------------------------------


def test_on_a_cpu_decoding_and_encoding_add_up():
    pace = pace_of(costs(), LAYOUT, **MACHINE)
    assert pace.bottleneck == "the cores"
    assert pace.seconds == pytest.approx((0.004 + 0.010) / 2)


def test_a_gpu_works_beside_the_cores():
    pace = pace_of(costs(), LAYOUT, **MACHINE | {"on_cpu": False})
    assert pace.bottleneck == "encoding and writing"
    assert pace.seconds == pytest.approx(0.006 + 10_000 / 1e8)
    slow_reads = pace_of(costs(read_ms=50.0), LAYOUT, **MACHINE | {"on_cpu": False})
    assert slow_reads.bottleneck == "reading and decoding"
    more_threads = pace_of(costs(read_ms=50.0), LAYOUT, **MACHINE | {"on_cpu": False, "threads": 16})
    assert more_threads.bottleneck == "encoding and writing", "threads help against waiting, and only so far"


def test_a_batch_that_does_not_divide_a_shard_costs_its_padding():
    even, odd = (pace_of(costs(), LAYOUT, **MACHINE | {"batch": b, "on_cpu": False}) for b in (42, 64))
    assert (even.padding, odd.padding) == (1.0, 128 / 84)
    disk = 10_000 / 1e8
    assert odd.seconds - disk == pytest.approx((even.seconds - disk) * 128 / 84)
    few = pace_of(costs(), Layout.plan(10, 5000), **MACHINE | {"batch": 64})
    assert few.padding == 6.4


def test_more_machines_share_the_shards_but_not_the_disk(photos, tmp_path):
    found = plan_patch(photos, tmp_path / "new.zarr", rows=[100_000], machines=(1, 3, 10**6))
    new = {e.machines: e for e in found.extents if e.what == "new store"}
    disk = new[1].bytes / found.costs.write_rate / 3600
    assert new[1].hours / 3 <= new[3].hours <= new[1].hours / 2.9
    assert new[10**6].hours == pytest.approx(max(disk, 84 * found.pace.seconds / 3600), rel=0.35)
    assert len({e.bytes for e in new.values()}) == 1


# --- what is measured --------------------------------------------------------------------------------


def test_bad_images_are_counted_and_named(tmp_path):
    folder = photo_folder(tmp_path / "images", 20)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    found = plan_patch(folder, tmp_path / "new.zarr", sample=100)
    assert (found.costs.sampled, found.costs.bad) == (21, 1)
    assert [(p, s) for p, s, _ in found.costs.bad_named] == [("broken.png", "unreadable")]
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "a.png").write_bytes(b"no image")
    found = plan_patch(only_bad, tmp_path / "new.zarr")
    assert (found.costs.bad, found.costs.read_ms) == (1, 0.0)
    assert found.hours > 0, "bad rows are encoded as zeros, and take their time"


def test_without_a_sample_the_bytes_are_known_and_the_hours_are_not(photos, tmp_path):
    known, unknown = (plan_patch(photos, tmp_path / "new.zarr", sample=n) for n in (8, 0))
    assert unknown.costs is unknown.hours is unknown.pace is unknown.lost_seconds is None
    assert all(e.hours is None for e in unknown.extents)
    assert 0.8 * known.bytes_left < unknown.bytes_left <= known.bytes_left


@pytest.mark.parametrize("rows", [1, 5, 31, 32, 33, 1000])
def test_the_sample_is_seeded_and_spread(rows):
    first = list(trial._spread(rows, 32, seed=1))
    assert first == list(trial._spread(rows, 32, seed=1))
    assert len(first) == len(set(first)), "none twice"
    assert set(first) <= set(range(rows))
    strata = min(32, rows)
    edges = np.linspace(0, rows, strata + 1).astype(int)
    assert sorted(np.searchsorted(edges, first[:strata], side="right") - 1) == list(range(strata))
    if rows == 1000:
        assert first != list(trial._spread(rows, 32, seed=2))


class Counting(PatchEncoder):
    calls = 0

    def encode(self, images, rows):
        self.calls += 1
        assert len(images) == len(rows) == self.batch, "always the real batch"
        return super().encode(images, rows)


def test_the_spread_is_that_of_what_limits():
    """Reading hides behind encoding: its uncertainty shows only where it may become the limit."""
    gpu = MACHINE | {"on_cpu": False}
    none = {"spread_ms": 0.0, "encode_spread_ms": 0.0}
    assert pace_of(costs(**none), LAYOUT, **gpu).spread == 0
    assert pace_of(costs(**none | {"spread_ms": 0.5}), LAYOUT, **gpu).spread == 0
    # 6 ms of encoding and 0.1 ms of writing, of which 1.5 ms are uncertain.
    found = pace_of(costs(**none | {"encode_spread_ms": 1.5}), LAYOUT, **gpu).spread
    assert found == pytest.approx(1.5 / 6.1)
    # 5 ms of reading and decoding on two threads may be 15: 7.5 against 6.1 ms.
    found = pace_of(costs(**none | {"spread_ms": 10.0}), LAYOUT, **gpu).spread
    assert found == pytest.approx(7.5 / 6.1 - 1)


def test_a_slow_encoder_is_called_once(monkeypatch):
    pictures = np.zeros((PatchEncoder(SIZE).batch, SIZE, SIZE, 3), np.uint8)
    quick, slow = Counting(SIZE), Counting(SIZE)
    trial._encode_seconds(quick, pictures)
    assert quick.calls > 2
    monkeypatch.setattr(trial, "_ENCODE_LIMIT", 0.0)
    seconds, cpu, error = trial._encode_seconds(slow, pictures)
    assert slow.calls == 1
    assert min(seconds, cpu) > 0
    assert error == 0, "one call has no spread"


def test_the_disk_is_measured_without_a_trace(tmp_path):
    assert trial.write_rate(tmp_path) > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreWriteError, match="/proc"):
        trial.write_rate(Path("/proc"))
