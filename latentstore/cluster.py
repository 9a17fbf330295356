"""The same shard tasks on many processes: local workers, or any Dask cluster.

The driver holds the store's lock and hands out whole shards; each worker builds its encoder once, writes its
shard by the ordinary commit protocol, and returns only counts. Completion order is free. A task that runs
twice (a worker was lost, or only seemed to be) writes the same bytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentstore.encode import Job
from latentstore.encoders import Encoder, load_encoder
from latentstore.errors import LatentStoreError, MissingExtraError, UsageError
from latentstore.schema import check_space
from latentstore.shards import sweep_partials
from latentstore.sources import Source
from latentstore.store import open_store
from latentstore.tasks import ShardOutcome, ShardTask

WINDOW = 3
"""Tasks in flight for each worker: none waits, and memory does not grow with the job."""
RETRIES = 3


class ClusterError(LatentStoreError):
    """The cluster could not be reached, or a task failed on every worker that tried it."""


@lru_cache(maxsize=1)
def _encoder(recipe: tuple[tuple[str, Any], ...]) -> Encoder:
    """Build the encoder once in each worker process; it is never shipped."""
    return load_encoder(**dict(recipe))


def run_task(
    root: Path,
    shard: int,
    inputs: pa.Table,
    source: Source,
    recipe: tuple[tuple[str, Any], ...],
    max_pixels: int,
    threads: int,
) -> ShardOutcome:
    """Make one shard: what a worker runs."""
    store = open_store(root)
    encoder = _encoder(recipe)
    check_space(encoder.space.id, store.space.id, what=f"a worker's encoder {encoder.facts.get('name')!r}")
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        return ShardTask(source, encoder, pool, max_pixels).run(store, shard, inputs)


@contextmanager
def connect(*, workers: int | None = None, scheduler: str | None = None) -> Iterator[Any]:
    """Yield a Dask client: of ``workers`` local processes, or of the cluster at ``scheduler``.

    Raises
    ------
    UsageError
        Neither or both are given.
    ClusterError
        The scheduler does not answer.
    """
    if (workers is None) == (scheduler is None):
        raise UsageError("Give either --workers N (local processes) or --scheduler ADDRESS (a Dask cluster).")
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError as exc:
        raise MissingExtraError(
            "Dask's scheduler is not installed: pip install 'dask[distributed]'."
        ) from exc
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout="20s", set_as_default=False)
        except (OSError, ValueError, TimeoutError) as exc:
            raise ClusterError(
                f"No Dask scheduler answers at {scheduler} ({type(exc).__name__}). Start one with "
                "`dask scheduler`, or use --workers N on this machine."
            ) from exc
        with client:
            yield client
        return
    # A free port for each dashboard: two jobs on one machine must not fight over one.
    # One process each: decoding and encoding then share no interpreter lock, and a crash costs one shard.
    cluster = LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address="127.0.0.1:0",
        silence_logs="CRITICAL",
    )
    with cluster, Client(cluster, set_as_default=False) as client:
        yield client


def on_cluster(
    client: Any, recipe: Mapping[str, Any], *, threads: int | None = None
) -> Callable[[Job], Iterator[ShardOutcome]]:
    """Return what :func:`latentstore.encode.encode` takes as ``run``: shards through distributed futures.

    Parameters
    ----------
    client : dask.distributed.Client
    recipe : mapping
        Arguments of :func:`~latentstore.encoders.load_encoder`; every worker must be able to load it, and to
        see the images and the store under the same paths.
    threads : int, optional
        That decode in each worker; by default 1.
    """
    frozen = tuple(sorted(recipe.items()))

    def run(job: Job) -> Iterator[ShardOutcome]:
        from dask.distributed import as_completed

        source = Source(job.source.root.absolute(), job.source.manifest, job.source.follow_links)
        root = job.store.root.absolute()
        todo = iter(job.todo)
        resources = _gpu_resource(client)
        # A key that was used before would get the earlier task's result.
        run_id = uuid.uuid4().hex

        def submit(shard: int) -> Any:
            return client.submit(
                run_task, root, shard, job.inputs_of(shard), source, frozen, job.max_pixels, threads or 1,
                pure=False, retries=RETRIES, resources=resources, key=f"encode-{root.name}-{shard}-{run_id}",
            )  # fmt: skip

        window = WINDOW * max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
        running = as_completed([submit(s) for s in islice(todo, window)], loop=client.loop)
        try:
            for future in running:
                outcome = _result(future)
                following = next(todo, None)
                if following is not None:
                    running.add(submit(following))
                if job.on_rows is not None:
                    job.on_rows(outcome.encoded, outcome.n_bad)
                yield outcome
        finally:
            client.cancel(list(running.futures))
        sweep_partials(root)  # of workers that were lost; all shards are committed now

    return run


def _result(future: Any) -> ShardOutcome:
    from dask.distributed import KilledWorker

    try:
        outcome: ShardOutcome = future.result()
    except KilledWorker as exc:
        raise ClusterError(
            f"Task {future.key} took its worker down again and again ({exc}). The other finished shards are "
            "kept. An image of that shard, or the memory of the workers, is the likely cause."
        ) from exc
    return outcome


def _gpu_resource(client: Any) -> dict[str, int] | None:
    """Ask for one GPU a task where every worker declares GPUs as a resource (as dask-cuda's can)."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    has = [bool(w.get("resources", {}).get("GPU")) for w in workers]
    return {"GPU": 1} if has and all(has) else None
