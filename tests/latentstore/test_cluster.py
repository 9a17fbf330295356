"""The same shard tasks on real Dask workers: the same bytes, whoever writes them and whoever is killed."""

from __future__ import annotations

import os
import signal

import pytest
from store_worlds import data_files, encode_patch, partials, photo_folder

from latentstore.cluster import ClusterError, connect, on_cluster
from latentstore.encode import Source, encode
from latentstore.encoders import PatchEncoder
from latentstore.errors import SpaceMismatchError, UsageError
from latentstore.store import open_store

RECIPE = {"name": "patch", "image_size": 64}
N = 1300  # 16 shards of 84 rows: more than fit the window of two workers


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("cluster") / "in", N)


@pytest.fixture(scope="module")
def undisturbed(photos):
    root = photos.parent / "undisturbed.zarr"
    encode_patch(photos, root)
    return root


@pytest.fixture(scope="module")
def client():
    with connect(workers=2) as client:
        yield client


def run(photos, root, client, **options):
    return encode(
        Source(photos), root, PatchEncoder(64), shard_rows=84, run=on_cluster(client, RECIPE), **options
    )


def test_workers_write_the_same_bytes(photos, undisturbed, tmp_path, client):
    seen = []
    summary = run(photos, tmp_path / "s.zarr", client, on_rows=lambda rows, bad: seen.append((rows, bad)))
    assert data_files(tmp_path / "s.zarr") == data_files(undisturbed)
    assert (summary.encoded, sum(r for r, _ in seen)) == (N, N)
    assert set(summary.seconds) == {"total", "wait", "encode", "write"}
    again = run(photos, tmp_path / "s.zarr", client)
    assert again.encoded == 0


def test_a_killed_worker_costs_its_open_shards_alone(photos, undisturbed, tmp_path, client):
    pids = sorted(client.run(os.getpid).values())
    finished = []

    def kill_once(rows, bad):
        finished.append(rows)
        if len(finished) == 1:
            os.kill(pids[0], signal.SIGKILL)

    root = tmp_path / "s.zarr"
    summary = run(photos, root, client, on_rows=kill_once)
    assert summary.encoded >= N
    assert not partials(root)
    assert data_files(root) == data_files(undisturbed)
    assert open_store(root).counts() == {"ok": N}
    client.wait_for_workers(2, timeout=60)
    assert sorted(client.run(os.getpid).values()) != pids, "the worker was really killed"


def test_bad_images_are_recorded_by_workers_too(tmp_path, client):
    folder = photo_folder(tmp_path / "in", 100)
    (folder / "0050.png").write_bytes(b"no picture")
    summary = run(folder, tmp_path / "s.zarr", client)
    assert summary.counts == {"ok": 99, "unreadable": 1}
    assert summary.bad == [("0050.png", "unreadable", "not an image")]


def test_append_on_a_cluster(photos, tmp_path, client):
    folder = photo_folder(tmp_path / "in", 100)
    run(folder, tmp_path / "s.zarr", client)
    before = open_store(tmp_path / "s.zarr").reader.read(0, 100).tobytes()
    for i in range(30):
        (folder / f"late {i:02d}.png").write_bytes((photos / f"{i + 500:04d}.png").read_bytes())
    summary = run(folder, tmp_path / "s.zarr", client)
    assert (summary.encoded, summary.appended) == (30, 30)
    store = open_store(tmp_path / "s.zarr")
    assert store.reader.read(0, 100).tobytes() == before
    assert store.counts() == {"ok": 130}


def test_a_worker_with_another_encoder_is_refused(tmp_path, client):
    folder = photo_folder(tmp_path / "in", 10)
    with pytest.raises(SpaceMismatchError, match="worker's encoder"):
        encode(
            Source(folder),
            tmp_path / "s.zarr",
            PatchEncoder(64),
            run=on_cluster(client, {**RECIPE, "image_size": 32}),
        )
    assert open_store(tmp_path / "s.zarr").todo() == [0]


def test_any_cluster_by_its_address(photos, undisturbed, tmp_path, client):
    with connect(scheduler=client.scheduler.address) as other:
        run(photos, tmp_path / "s.zarr", other)
    assert data_files(tmp_path / "s.zarr") == data_files(undisturbed)


def test_unreachable_and_ambiguous_clusters():
    with (
        pytest.raises(ClusterError, match="No Dask scheduler answers"),
        connect(scheduler="tcp://127.0.0.1:9"),
    ):
        pass
    for options in ({}, {"workers": 2, "scheduler": "tcp://127.0.0.1:9"}):
        with pytest.raises(UsageError, match="either"), connect(**options):
            pass


def test_two_jobs_on_one_machine(client):
    """A second local cluster beside the first starts without a word (warnings are errors here)."""
    with connect(workers=1) as other:
        assert other.submit(sum, (1, 2)).result(timeout=60) == 3
        assert other.scheduler.address != client.scheduler.address
