"""Which rows make a batch, and reading them one batch ahead.

Every draw is a function of the seed and the step's number: a run that goes on from step s draws what the
undisturbed run drew. torch is imported by the functions that use it, never by importing this module.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .errors import BadRowsError, SolverUsageError
from .starts import check_finite

if TYPE_CHECKING:
    from .sgd import CosFace
    from .training import LabelledRows

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
# Streams of draws that share the recipe's seed.
_IDENTITIES, _ROWS = 1, 2


def count_classes(labels: np.ndarray) -> int:
    """Return the number of classes, refusing fewer than two or labels that are not 0..C-1."""
    found = np.unique(labels)
    if labels.ndim != 1 or len(found) < 2:
        raise SolverUsageError(
            f"CosFace tells identities apart and needs at least 2 of them; there are {len(found)}. "
            "Use the method analytic, which needs the collection alone."
        )
    if not np.array_equal(found, np.arange(len(found))):
        raise SolverUsageError(
            f"Labels must be 0..C-1, every class with a row; {len(found)} classes run from {found[0]} to "
            f"{found[-1]}. "
            "Number them with numpy.unique(..., return_inverse=True)."
        )
    return len(found)


def peculiarities(labels: np.ndarray, cfg: CosFace) -> tuple[str, ...]:
    """Return a sentence on each way in which the data fall short of the recipe; nothing is refused."""
    members = np.bincount(labels)
    notes = []
    if len(members) < cfg.batch_identities:
        notes.append(
            f"There are {len(members)} identities and the recipe asks for {cfg.batch_identities} a batch: "
            f"every batch holds them all, {len(members) * cfg.per_identity} rows."
        )
    if single := int((members == 1).sum()):
        notes.append(
            f"{single} of {len(members)} identities have a single row: nothing can be learned from how it "
            "varies, and in a batch it is repeated."
        )
    if few := int(((members > 1) & (members < cfg.per_identity)).sum()):
        notes.append(
            f"{few} of {len(members)} identities have fewer rows than the {cfg.per_identity} of a batch, "
            "where they repeat rows."
        )
    return tuple(notes)


def batches(labels: np.ndarray, n_classes: int, cfg: CosFace, *, done: int = 0) -> Iterator[np.ndarray]:
    """Yield row indices of P identities x K rows; every identity once before any comes again.

    Parameters
    ----------
    labels
        (n,) integers 0..C-1, each present.
    done
        Batches to pass over: those of the steps that an earlier run took.

    Yields
    ------
    (P K,) int64, an identity's rows next to each other; distinct rows where it has at least K.
    """
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(n_classes + 1))
    for step, chosen in enumerate(_identities(n_classes, cfg), start=1):
        if step > done:
            rng = np.random.default_rng([cfg.seed, _ROWS, step])
            members = starts[chosen + 1] - starts[chosen]
            yield order[starts[chosen][:, None] + _picks(members, cfg.per_identity, rng)].reshape(-1)


def _identities(n_classes: int, cfg: CosFace) -> Iterator[np.ndarray]:
    p, turn = min(cfg.batch_identities, n_classes), 0
    queue = np.zeros(0, dtype=np.int64)
    while True:
        if len(queue) < p:
            fresh = np.random.default_rng([cfg.seed, _IDENTITIES, turn]).permutation(n_classes)
            turn += 1
            # A class left over from the last round is not drawn twice into one batch.
            late = np.isin(fresh, queue)
            queue = np.concatenate([queue, fresh[~late], fresh[late]])
        yield queue[:p]
        queue = queue[p:]


def _picks(members: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Return (p, k) positions 0..members-1, distinct in a row where there are at least k."""
    enough = (members >= k)[:, None]
    picks = rng.integers(np.where(enough, members[:, None] - np.arange(k), members[:, None]))
    # The j-th draw r means the r-th of those not picked yet: it steps over each earlier pick, in order.
    for j in range(1, k):
        for earlier in np.sort(picks[:, :j], axis=1).T:
            picks[:, j] += enough[:, 0] & (picks[:, j] >= earlier)
    return picks


def read_ahead(items: Iterator[Item], load: Callable[[Item], Loaded]) -> Generator[Loaded, None, None]:
    """Yield load(item) for every item, in order; a thread loads the next while the present one is used.

    Close the iterator (`contextlib.closing`) when leaving early. What `load` raises is raised here.
    """
    end = object()

    def take() -> Any:
        item = next(items, end)
        return end if item is end else load(item)  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(take)
        while (ready := ahead.result()) is not end:
            ahead = pool.submit(take)
            yield ready


class Loader:
    """Brings a batch to the device as float32, beside the stream that computes."""

    def __init__(self, source: LabelledRows, labels: np.ndarray, device: str) -> None:
        import torch

        self.source, self.labels = source, labels.astype(np.int64)
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.checked = False

    def __call__(self, rows: np.ndarray) -> tuple[Any, Any, Any]:
        """Return x (b, dim), labels (b,) and the CUDA event after which they can be used, or None."""
        import torch

        if self.stream is None:
            return *self._copied(rows), None
        with torch.cuda.stream(self.stream):
            return *self._copied(rows), self.stream.record_event()

    def _copied(self, rows: np.ndarray) -> tuple[Any, Any]:
        import torch

        block = self.source.gather(rows)
        # A copy of torch's own: products are bit-identical only for operands that are aligned alike.
        block = block if isinstance(block, torch.Tensor) else torch.tensor(block)
        if block.shape != (len(rows), self.source.dim):
            raise BadRowsError(
                f"The source returned a block of shape {tuple(block.shape)} for {len(rows)} rows of "
                f"{self.source.dim} values. Return the rows asked for, in their order."
            )
        y = torch.from_numpy(self.labels[rows])
        if self.stream is not None:
            y = y.pin_memory()
            block = block if block.is_cuda else block.pin_memory()
        x = block.to(self.device, non_blocking=True).to(torch.float32)
        if not self.checked:
            # Later batches are judged by their loss.
            check_finite(x.cpu().numpy(), rows)
            self.checked = True
        return x, y.to(self.device, non_blocking=True)


def arrived(batch: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """Return x and labels, made safe to use on the present CUDA stream."""
    x, y, event = batch
    if event is not None:
        import torch

        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(event)
        # Else the memory might be given to the next batch while this stream still reads it.
        x.record_stream(stream)
        y.record_stream(stream)
    return x, y
