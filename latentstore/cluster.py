"""The same shard tasks on many processes: local workers, or any Dask cluster.

The driver holds the store's lock and hands out whole shards; each worker builds its encoder once, writes its
shard by the ordinary commit protocol, and returns only counts. Completion order is free. A task that runs
twice (a worker was lost, or only seemed to be) writes the same bytes. A shard that takes its workers down is
tried once more with its images decoded in child processes, so that the image that does it costs one row.
"""

from __future__ import annotations

import logging
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

import pyarrow as pa

from latentstore.encode import Job
from latentstore.encoders import Encoder, load_encoder
from latentstore.errors import LatentStoreError, MissingExtraError, UsageError
from latentstore.files import sweep_partials
from latentstore.isolation import Isolated
from latentstore.schema import check_space
from latentstore.sources import Source
from latentstore.store import open_store
from latentstore.tasks import ShardOutcome, ShardTask

WINDOW = 3
"""Tasks in flight for each worker: none waits, and memory does not grow with the job."""
RETRIES = 3
LOCAL_FAILURES = 1
"""Workers that a task may lose before it is given up on a local cluster (Dask's own default is 3)."""
APART_TRIES = 3
"""A shard that is decoded apart may lie on a worker that another shard takes down."""
APART_AFTER = 3
"""Shards that took workers down before all that follow are decoded apart."""
FAILURES_TOPIC = "latentstore-failures"
"""Dask's topic of bad rows: ``client.get_events(FAILURES_TOPIC)``."""
_TELL_EVERY = 0.25
"""Seconds between a task's progress events."""
_LOOK_EVERY = 5.0
"""Seconds between looks at how many workers there are."""
WAIT_FOR_SCHEDULER, WAIT_FOR_WORKERS = 20, 300
"""Seconds."""
_one_shard = Lock()
"""A process makes one shard at a time: an encoder sits on one device, and need not bear two threads."""


class ClusterError(LatentStoreError):
    """The cluster could not be reached, or a task failed on every worker that tried it."""


@dataclass(frozen=True)
class Common:
    """What is the same for all tasks of a job."""

    path: Path
    source: Source
    recipe: tuple[tuple[str, Any], ...]
    max_pixels: int
    threads: int | None
    topic: str


@lru_cache(maxsize=1)
def _encoder(recipe: tuple[tuple[str, Any], ...]) -> Encoder:
    """Build the encoder once in each worker process; it is never shipped."""
    return load_encoder(**dict(recipe))


def run_task(common: Common, shard: int, inputs: pa.Table, apart: bool) -> ShardOutcome | LatentStoreError:
    """Make one shard: what a worker runs.

    An expected failure (a server that does not answer, a full disk) is returned: Dask would try again what
    is raised, and the code that raised it has tried already.
    """
    try:
        return _make(common, shard, inputs, apart)
    except LatentStoreError as exc:
        return exc


def _make(common: Common, shard: int, inputs: pa.Table, apart: bool) -> ShardOutcome:
    from dask.distributed import get_worker
    from distributed.metrics import context_meter

    worker = get_worker()
    with _one_shard, ExitStack() as stack:
        store = open_store(common.path)
        encoder = _encoder(common.recipe)
        what = f"a worker's encoder {encoder.facts.get('name')!r}"
        check_space(encoder.space.id, store.space.id, what=what)
        threads = common.threads or worker.state.nthreads
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="decode"))
        source = stack.enter_context(Isolated(common.source)) if apart else common.source
        told = _Told(worker, common.topic, shard)
        task = ShardTask(source, encoder, pool, common.max_pixels, told.on_rows, told.on_times)
        outcome = task.run(store, shard, inputs)
        told.send()
    for path, status, reason in outcome.bad:
        failure = {"store": str(common.path), "path": path, "status": status, "reason": reason}
        worker.log_event(FAILURES_TOPIC, failure)
    for share, seconds in outcome.seconds.items():
        if share != "wait":  # it overlaps with the reading and decoding that is waited for
            # For the dashboard's fine performance metrics.
            context_meter.digest_metric(share, seconds, "seconds")
    return outcome


class _Told:
    """A task's progress, told to the driver a few times a second."""

    def __init__(self, worker: Any, topic: str, shard: int) -> None:
        self._worker, self._topic, self._shard = worker, topic, shard
        self._rows = self._bad = 0
        self._seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def on_rows(self, rows: int, bad: int) -> None:
        self._rows, self._bad = self._rows + rows, self._bad + bad

    def on_times(self, seconds: dict[str, float]) -> None:
        for share, more in seconds.items():
            self._seconds[share] = self._seconds.get(share, 0.0) + more
        if time.monotonic() - self._last >= _TELL_EVERY:
            self.send()

    def send(self) -> None:
        event = {"shard": self._shard, "rows": self._rows, "bad": self._bad, "seconds": self._seconds}
        self._worker.log_event(self._topic, event)
        self._seconds, self._last = {}, time.monotonic()


class _Progress:
    """What the tasks have told. A shard's rows count once, however often it is tried."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._missing = {shard: job.missing_rows(shard) for shard in job.todo}
        self._seen: dict[int, tuple[int, int]] = {}

    def heard(self, event: dict[str, Any]) -> None:
        self._advance(event["shard"], event["rows"], event["bad"])
        if self._job.on_times is not None:
            self._job.on_times(event["seconds"])

    def finished(self, outcome: ShardOutcome) -> ShardOutcome:
        # A worker that was lost just after its commit: the next one made rows anew that were there before.
        outcome.encoded = min(outcome.encoded, self._missing[outcome.shard])
        self._advance(outcome.shard, outcome.encoded, outcome.n_bad)
        return outcome

    def _advance(self, shard: int, rows: int, bad: int) -> None:
        seen_rows, seen_bad = self._seen.get(shard, (0, 0))
        rows = max(seen_rows, min(rows, self._missing[shard]))
        bad = max(seen_bad, bad)
        self._seen[shard] = rows, bad
        if self._job.on_rows is not None and (rows, bad) != (seen_rows, seen_bad):
            self._job.on_rows(rows - seen_rows, bad - seen_bad)


@contextmanager
def connect(*, workers: int | None = None, scheduler: str | None = None) -> Iterator[Any]:
    """Yield a Dask client: of ``workers`` local processes, or of the cluster at ``scheduler``.

    Where dask-cuda is installed and there are as many GPUs, each local process has a GPU of its own.

    Raises
    ------
    UsageError
        Neither or both are given.
    ClusterError
        The scheduler does not answer, or no worker joins it.
    """
    if (workers is None) == (scheduler is None):
        raise UsageError("Give either --workers N (local processes) or --scheduler ADDRESS (a Dask cluster).")
    try:
        from dask.distributed import Client
    except ImportError as exc:
        raise MissingExtraError(
            "Dask's scheduler is not installed: pip install 'dask[distributed]'."
        ) from exc
    if workers is not None:
        with ExitStack() as stack:
            stack.enter_context(_quiet_client())
            stack.enter_context(_lost_workers_come_back())
            with _interrupts_held():
                cluster = stack.enter_context(_local(workers))
                client = stack.enter_context(Client(cluster, set_as_default=False))
            yield client
        return
    try:
        client = Client(scheduler, timeout=WAIT_FOR_SCHEDULER, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as exc:
        raise ClusterError(
            f"No Dask scheduler answers at {scheduler} ({type(exc).__name__}). Start one with "
            "`dask scheduler`, or use --workers N on this machine."
        ) from exc
    with _quiet_client(), client:
        try:
            client.wait_for_workers(1, timeout=WAIT_FOR_WORKERS)
        except TimeoutError as exc:
            raise ClusterError(
                f"The Dask scheduler at {scheduler} has had no worker for {WAIT_FOR_WORKERS} s. Start some "
                f"with `dask worker {scheduler}`, and run the same command again."
            ) from exc
        yield client


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep Dask from logging the tracebacks of lost connections: what they mean is raised, in a sentence."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _lost_workers_come_back() -> Iterator[None]:
    """Keep a local cluster from giving up a worker that is being started anew.

    Dask looks some seconds after a worker's death, and drops its place for good when nobody is in it just
    then: on a busy machine, or when the next one has died as well.
    """
    import dask

    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1 day"}):
        yield


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes that Ctrl-C in a terminal does not reach: the driver alone decides what it means.

    Processes inherit the signals that the thread which starts them holds back, and so do the threads of the
    cluster, which start workers anew. Pressed meanwhile, Ctrl-C takes effect at the end.
    """
    # Started under the mask it would lift it: it is started before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _local(workers: int) -> Any:
    options = {
        "n_workers": workers,
        # One process each: decoding and encoding then share no interpreter lock, and a crash costs one shard.
        "threads_per_worker": 1,
        # A free port for each dashboard: two jobs on one machine must not fight over one.
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": "CRITICAL",
        "scheduler_kwargs": {"allowed_failures": LOCAL_FAILURES},
    }
    if workers <= _gpus():
        from dask_cuda import LocalCUDACluster

        return LocalCUDACluster(**options)
    from dask.distributed import LocalCluster

    return LocalCluster(processes=True, **options)


def _gpus() -> int:
    """Return how many GPUs dask-cuda could give a worker each."""
    if find_spec("dask_cuda") is None:
        return 0
    import torch

    return torch.cuda.device_count()


def describe(client: Any) -> str:
    """Say in a few words what a client's tasks run on."""
    workers = len(client.scheduler_info(n_workers=-1)["workers"])
    if client.cluster is None:
        return f"the Dask cluster at {client.scheduler.address} ({workers} workers)"
    gpus = ", a GPU each (dask-cuda)" if type(client.cluster).__name__ == "LocalCUDACluster" else ""
    return f"{workers} local processes{gpus}"


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
        That decode in each worker; by default as many as the worker has.
    """
    frozen = tuple(sorted(recipe.items()))
    return lambda job: _Run(client, job, frozen, threads).outcomes()


@dataclass(frozen=True)
class _Attempt:
    shard: int
    future: Any
    apart: bool
    tries: int


class _Run:
    """One job on a cluster: a bounded window of tasks, and one inbox for their progress and their ends."""

    def __init__(
        self, client: Any, job: Job, recipe: tuple[tuple[str, Any], ...], threads: int | None
    ) -> None:
        self.client, self.job = client, job
        # A key that was used before would get the earlier task's result.
        self.id = uuid.uuid4().hex
        source = job.source.absolute()
        self.common = Common(
            job.store.path.absolute(),
            source,
            recipe,
            job.max_pixels,
            threads or source.readers(job.inputs),
            f"latentstore-{self.id}",
        )
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.running: dict[str, _Attempt] = {}
        self.killers = 0
        self.looked, self.window, self.resources = -_LOOK_EVERY, 0, _gpu_resource(client)

    def outcomes(self) -> Iterator[ShardOutcome]:
        """Yield the outcome of every shard, in the order in which they end."""
        progress, todo = _Progress(self.job), iter(self.job.todo)
        self.client.subscribe_topic(self.common.topic, lambda event: self.inbox.put(event[1]))
        try:
            while True:
                self._fill(todo)
                if not self.running:
                    break
                item = self._next()
                if isinstance(item, dict):
                    progress.heard(item)
                    continue
                outcome = self._result(self.running.pop(item))
                if outcome is not None:
                    yield progress.finished(outcome)
        finally:
            if self.running:
                self.client.cancel([attempt.future for attempt in self.running.values()])
        self.client.unsubscribe_topic(self.common.topic)
        sweep_partials(self.job.store.root)  # of workers that were lost; all shards are committed now

    def _next(self) -> Any:
        """Return the next message of the tasks.

        Raises
        ------
        ClusterError
            There has been no worker for ``WAIT_FOR_WORKERS`` seconds.
        """
        last = time.monotonic()
        while True:
            try:
                return self.inbox.get(timeout=_LOOK_EVERY)
            except Empty:
                if self.client.scheduler_info(n_workers=-1)["workers"]:
                    last = time.monotonic()
                elif time.monotonic() - last > WAIT_FOR_WORKERS:
                    raise ClusterError(
                        f"The Dask cluster has had no worker for {WAIT_FOR_WORKERS} s. Finished shards are "
                        "kept: run the same command again when there are workers."
                    ) from None

    def _fill(self, todo: Iterator[int]) -> None:
        """Keep the window full; it follows workers that join or leave."""
        if time.monotonic() - self.looked >= _LOOK_EVERY:
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
            self.window, self.looked = WINDOW * max(1, len(workers)), time.monotonic()
        while len(self.running) < self.window:
            shard = next(todo, None)
            if shard is None:
                return
            self._submit(shard, apart=shard in self.job.apart or self.killers >= APART_AFTER)

    def _submit(self, shard: int, *, apart: bool, tries: int = 0) -> None:
        inputs = self.job.inputs_of(shard)
        key = f"encode-{shard}-{tries}-{self.id}"
        future = self.client.submit(
            run_task, self.common, shard, inputs, apart,
            pure=False, retries=RETRIES, resources=self.resources, priority=tries, key=key,
        )  # fmt: skip
        self.running[key] = _Attempt(shard, future, apart, tries)
        future.add_done_callback(lambda future: self.inbox.put(future.key))

    def _result(self, attempt: _Attempt) -> ShardOutcome | None:
        """Return what a task returned; None when it took its workers down and is tried again, apart."""
        from dask.distributed import KilledWorker

        try:
            outcome: ShardOutcome | LatentStoreError = attempt.future.result()
        except KilledWorker as exc:
            if attempt.tries >= APART_TRIES:
                raise ClusterError(
                    f"Shard {attempt.shard} took its worker down again and again (the last one was "
                    f"{exc.last_worker.address}), also with its images decoded in processes of their own. "
                    "The other finished shards are kept. The workers' memory, or what their encoder runs on, "
                    "is the likely cause."
                ) from exc
            self.killers += not attempt.apart
            self._submit(attempt.shard, apart=True, tries=attempt.tries + 1)
            return None
        except CancelledError as exc:
            raise ClusterError(
                f"The Dask scheduler was lost, or dropped shard {attempt.shard}. Finished shards are kept: "
                "run the same command again when it is back."
            ) from exc
        if isinstance(outcome, LatentStoreError):
            raise outcome
        return outcome


def _gpu_resource(client: Any) -> dict[str, int] | None:
    """Ask for one GPU a task where every worker declares GPUs as a resource (as dask-cuda's can)."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    has = [bool(w.get("resources", {}).get("GPU")) for w in workers]
    return {"GPU": 1} if has and all(has) else None
