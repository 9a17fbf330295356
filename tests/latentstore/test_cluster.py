"""The same shard tasks on real Dask workers: the same bytes, whoever writes them and whoever is killed."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from odd_sources import Blank, Fatal, Silent, Slow
from store_worlds import data_files, make_store, partials, photo_folder

from latentstore import cluster
from latentstore.cluster import (
    FAILURES_TOPIC,
    WINDOW,
    ClusterError,
    _Progress,
    connect,
    describe,
    on_cluster,
)
from latentstore.encode import Job, Source, encode
from latentstore.encoders import PatchEncoder
from latentstore.errors import SpaceMismatchError, UsageError
from latentstore.sources import SourceError
from latentstore.store import open_store
from latentstore.tasks import ShardOutcome

RECIPE = {"name": "patch", "image_size": 64}
N = 800  # of ``photos``: ten shards of 84 rows, more than fit the window of two workers
assert N > 2 * WINDOW * 84


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
    assert set(summary.seconds) == {"total", "read", "decode", "wait", "encode", "write"}
    again = run(photos, tmp_path / "s.zarr", client)
    assert again.encoded == 0


def test_a_killed_worker_costs_its_open_shards_alone(photos, undisturbed, tmp_path, client):
    pids = sorted(client.run(os.getpid).values())
    told = []

    def kill_once(rows, bad):
        told.append(rows)
        if len(told) == 1:
            os.kill(pids[0], signal.SIGKILL)

    root = tmp_path / "s.zarr"
    summary = run(photos, root, client, on_rows=kill_once)
    assert summary.encoded == sum(told) == N, "what is made twice counts once"
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
    failures = [event for _, event in client.get_events(FAILURES_TOPIC) if event["store"] == summary.store]
    assert [(f["path"], f["status"]) for f in failures] == [("0050.png", "unreadable")]


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


def test_what_was_tried_enough_is_not_tried_again(tmp_path, client):
    """An expected failure ends the job at once; Dask tries only what is raised again."""
    folder = photo_folder(tmp_path / "in", 1)
    with pytest.raises(SourceError, match="does not answer"):
        encode(Silent(folder), tmp_path / "s.zarr", PatchEncoder(64), run=on_cluster(client, RECIPE))
    assert (tmp_path / "asked").read_text() == "?"
    assert open_store(tmp_path / "s.zarr").todo() == [0]


def test_any_cluster_by_its_address(photos, undisturbed, tmp_path, client):
    with connect(scheduler=client.scheduler.address) as other:
        assert describe(other) == f"the Dask cluster at {client.scheduler.address} (2 workers)"
        assert describe(client) == "2 local processes"
        run(photos, tmp_path / "s.zarr", other)
    assert data_files(tmp_path / "s.zarr") == data_files(undisturbed)


def test_progress_comes_by_the_batch(tmp_path, client):
    """A slow shard is told by its batches, with what each took, before it is done."""
    folder = photo_folder(tmp_path / "in", 84)
    rows, seconds = [], []
    summary = encode(
        Slow(folder, pause=0.02),
        tmp_path / "s.zarr",
        PatchEncoder(64),
        run=on_cluster(client, RECIPE),
        on_rows=lambda *told: rows.append(told),
        on_times=seconds.append,
    )
    batch = PatchEncoder(64).batch
    assert batch < 84
    assert rows == [(min(batch, 84 - first), 0) for first in range(0, 84, batch)]
    for share in ("read", "decode", "encode", "write", "wait"):
        # The same numbers, added in another order: each addition rounds to half an eps of a sum that grows.
        told = sum(more.get(share, 0.0) for more in seconds)
        assert told == pytest.approx(summary.seconds[share], rel=10 * np.finfo(float).eps)
    assert summary.seconds["read"] > 84 * 0.02 > summary.seconds["decode"]


def test_rows_count_once_however_often_a_shard_is_tried(tmp_path):
    store = make_store(tmp_path / "s.zarr", np.ones((180, 4), np.float16), only=[0])
    told = []
    job = Job(store, [1, 2], store.inputs(), Source(tmp_path), None, 1, lambda *rows: told.append(rows))
    progress = _Progress(job)
    for shard, rows, bad in [(1, 64, 2), (2, 12, 0), (1, 30, 1), (1, 64, 2), (1, 70, 3)]:
        progress.heard({"shard": shard, "rows": rows, "bad": bad, "seconds": {}})
    assert told == [(64, 2), (12, 0), (6, 1)]
    progress.finished(ShardOutcome(1, encoded=84, n_bad=3))
    # A worker was lost after its commit; the next one had rows to make that were there at the start.
    assert progress.finished(ShardOutcome(2, encoded=500)).encoded == 12
    assert told == [(64, 2), (12, 0), (6, 1), (14, 0)]
    assert sum(rows for rows, _ in told) == 180 - 84


def test_the_scheduler_holds_no_more_than_the_window(tmp_path, client):
    """60 shards; each outcome is forgotten as soon as it is told."""
    held = []

    def look(rows, bad):
        held.append(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))

    summary = encode(
        Blank(tmp_path, rows=60 * 84),
        tmp_path / "s.zarr",
        PatchEncoder(8),
        shard_rows=84,
        run=on_cluster(client, {"name": "patch", "image_size": 8}),
        on_rows=look,
    )
    assert summary.encoded == 60 * 84
    assert len(held) >= 60
    # A window of tasks, and as many again that are being let go; without that it would hold all 60.
    assert max(held) <= 2 * (2 * WINDOW)


def test_a_shard_that_kills_also_apart_ends_the_job(tmp_path, client, monkeypatch):
    """Not the images' doing: the job fails in bounded time, in one paragraph."""
    monkeypatch.setattr(cluster, "APART_TRIES", 1)
    folder = photo_folder(tmp_path / "in", 10)
    root = tmp_path / "s.zarr"
    with pytest.raises(ClusterError, match=r"Shard 0 took its worker down again and again .* also with"):
        encode(Fatal(folder), root, PatchEncoder(64), run=on_cluster(client, RECIPE))
    assert open_store(root).todo() == [0]
    client.wait_for_workers(2, timeout=60)
    assert run(folder, root, client).counts == {"ok": 10}, "the next run goes on"


def test_a_cluster_without_workers_ends_the_job(tmp_path, monkeypatch):
    """They left, and none came back: the job says so instead of waiting for ever."""
    from dask.distributed import Client, LocalCluster

    monkeypatch.setattr(cluster, "WAIT_FOR_WORKERS", 1)
    monkeypatch.setattr(cluster, "_LOOK_EVERY", 0.2)
    folder = photo_folder(tmp_path / "in", 10)
    with (
        LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as empty,
        Client(empty, set_as_default=False) as nobody,
        pytest.raises(ClusterError, match="no worker for 1 s"),
    ):
        run(folder, tmp_path / "s.zarr", nobody)
    assert open_store(tmp_path / "s.zarr").todo() == [0]


def test_unreachable_and_ambiguous_clusters(monkeypatch):
    monkeypatch.setattr(cluster, "WAIT_FOR_SCHEDULER", 2)
    with (
        pytest.raises(ClusterError, match="No Dask scheduler answers"),
        connect(scheduler="tcp://127.0.0.1:9"),
    ):
        pass
    for options in ({}, {"workers": 2, "scheduler": "tcp://127.0.0.1:9"}):
        with pytest.raises(UsageError, match="either"), connect(**options):
            pass


def test_two_jobs_on_one_machine_and_their_dashboards(photos, tmp_path, client):
    """A second local cluster beside the first starts without a word (warnings are errors here).

    Its dashboard's page of fine performance metrics shows the shares: it reads cumulative_worker_metrics.
    """

    def metrics(dask_scheduler):
        taken = dask_scheduler.cumulative_worker_metrics.items()
        return {k[2]: v for k, v in taken if k[0] == "execute" and k[1] == "encode" and k[3] == "seconds"}

    with connect(workers=1) as other:
        assert other.scheduler.address != client.scheduler.address
        summary = run(photos, tmp_path / "s.zarr", other)
        expected = {share: summary.seconds[share] for share in ("read", "decode", "encode", "write")}
        deadline, shown = time.monotonic() + 30, {}
        while not shown.keys() >= expected.keys() or shown["write"] < 0.999 * expected["write"]:
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)  # workers send their metrics with their heartbeats
            shown = other.run_on_scheduler(metrics)
        assert {share: shown[share] for share in expected} == pytest.approx(expected)
