"""Exact search by inner product, streamed: memory is one block of references and one tile of scores.

A block is scanned in float32 (on a GPU in 16 bits). What the scan's rounding does not rule out of the best k
is scored again in float64 while the block is there, and ordered by (-score, row). The answer is that of brute
force over the float32 rows, in value and order, by every backend, in blocks of any size and order.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import array_api_compat
import numpy as np
import numpy.typing as npt

from latentstore.errors import MissingExtraError, UsageError
from latentstore.scan import (
    Scan,
    bound,
    exact_scores,
    half_scale,
    kth_largest,
    norm_bound,
    strict,
    tile_above,
)

Backend = Literal["auto", "faiss", "numpy", "torch"]
BACKENDS: tuple[Backend, ...] = ("auto", "faiss", "numpy", "torch")
Block = tuple[npt.NDArray[np.int64], Any]

_TILE = {"cpu": (1024, 1 << 21), "cuda": (8192, 1 << 28)}
"""Queries at a time, and scores at a time."""
_HELD = 1 << 21
"""Pairs that wait for their second score at most: a block of equal rows would hold all of them."""
_SPARE = 8
"""References that FAISS is asked for beyond k, so that near-ties at the k-th place are seen at once."""
_WORTH = 1 << 34
"""Products of a block from which the two ways are timed on a part of it each."""
_TOO_LARGE = 1e37
"""Inner products beyond this could overflow float32."""
_LAST = np.iinfo(np.int64).max


def has_faiss() -> bool:
    """Tell whether FAISS is installed, without importing it."""
    return importlib.util.find_spec("faiss") is not None


def select_backend(backend: Backend = "auto", device: str = "cpu") -> Backend:
    """Return what a backend's name stands for here.

    ``auto`` is torch on CUDA. On a CPU it stays ``auto`` (NumPy, or FAISS where a large job runs faster by
    it) and is NumPy where FAISS is not installed.

    Raises
    ------
    UsageError
        No such backend, or one that does not run on that device.
    MissingExtraError
        FAISS was asked for and is not installed.
    """
    if backend not in BACKENDS:
        raise UsageError(f"--backend is {backend!r}; use {', '.join(BACKENDS)}.")
    if backend == "faiss" and not has_faiss():
        raise MissingExtraError(
            "FAISS is not installed: pip install 'latentstore[cpu]', or use --backend numpy."
        )
    if device != "cpu":
        if backend not in ("auto", "torch"):
            raise UsageError(f"--backend {backend} searches on the CPU, not on {device}: use torch there.")
        return "torch"
    return backend if backend != "auto" or has_faiss() else "numpy"


def find_device(device: str = "auto") -> str:
    """Return ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is CUDA where there is one. A CPU needs no torch.

    Raises
    ------
    UsageError
        CUDA was asked for and is not there.
    """
    if device == "cpu" or (device == "auto" and not Path("/dev/nvidiactl").exists()):
        return "cpu"
    import torch

    found = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if found else "cpu"
    if not found:
        raise UsageError(f"--device is {device!r}, and torch sees no CUDA device here: use cpu.")
    return device


def top_k(
    queries: npt.NDArray[np.floating[Any]],
    references: Iterable[Block],
    k: int,
    *,
    backend: Backend = "auto",
    device: str = "cpu",
    scan: Scan | None = None,
    largest: float | None = None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the k references of largest inner product for each query; see :class:`Search`.

    Parameters
    ----------
    queries : (q, m) array
    references : iterable of ((b,) row numbers, (b, m) block)
        Any number of blocks, in any order; blocks may be reused memory.

    Returns
    -------
    scores : (q, k') float64 array
        Falling; ``k'`` is k, or the number of references if there are fewer.
    rows : (q, k') int64 array
        Equal scores are ordered by row number.
    """
    search = Search(queries, k, backend=backend, device=device, scan=scan, largest=largest)
    for rows, block in references:
        search.add(rows, block)
    return search.best()


class Search:
    """The best k references of each query among the blocks that were added so far.

    Parameters
    ----------
    queries : (q, m) array
        Taken as float32.
    k : int
    backend : {"auto", "faiss", "numpy", "torch"}
        What scans; see :func:`select_backend`. The answer is the same.
    device : str
        ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"auto"``.
    scan : {"float32", "float16", "bfloat16"}, optional
        Of torch alone, which scans in float16 on CUDA by default. The answer is the same.
    largest : float, optional
        No reference's norm exceeds it: where that is known, blocks need not be read for it.

    Attributes
    ----------
    backend : str
        What scans; ``"auto"`` until a block was large enough to tell.
    seconds : dict
        By backend, where the two were timed.

    Raises
    ------
    UsageError
        A k below 1, a backend or scan that is none, or queries that are not finite.
    """

    def __init__(
        self,
        queries: npt.NDArray[np.floating[Any]],
        k: int,
        *,
        backend: Backend = "auto",
        device: str = "cpu",
        scan: Scan | None = None,
        largest: float | None = None,
    ) -> None:
        if k < 1:
            raise UsageError(f"--top is {k}; at least 1 is needed.")
        self.device = find_device(device)
        self.backend = select_backend(backend, self.device)
        if scan is not None and scan != "float32" and self.backend != "torch":
            raise UsageError(f"A scan in {scan} is for --backend torch, not {self.backend}.")
        self.scan: Scan = scan or ("float16" if self.device != "cpu" else "float32")
        self.k, self.largest = k, largest
        self.seconds: dict[str, float] = {}
        q = np.ascontiguousarray(queries, np.float32)
        self._queries = self._placed(q)
        xp = self._xp = array_api_compat.array_namespace(self._queries)
        self._norm = self._placed(np.linalg.norm(q.astype(np.float64), axis=1) * (1 + 2.0**-40))
        if not bool(xp.all(xp.isfinite(self._norm))):
            raise UsageError("The queries hold values that are not finite: nothing can be ranked for them.")
        self._score = xp.full((len(q), k), -xp.inf, dtype=xp.float64, **self._where)
        self._row = xp.full((len(q), k), _LAST, dtype=xp.int64, **self._where)
        self._seen = 0
        self._buffer = np.empty(0, np.float32)

    @property
    def _where(self) -> dict[str, Any]:
        return {"device": self.device} if self.backend == "torch" else {}

    def _placed(self, array: Any) -> Any:
        """Return an array where the scan runs; NumPy's is copied where torch could not share it."""
        if self.backend != "torch":
            return array
        import torch

        if isinstance(array, torch.Tensor):
            return array.to(self.device)
        held = torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)
        return held.to(self.device)

    def add(self, rows: npt.NDArray[np.int64], block: Any) -> None:
        """Search one block.

        Parameters
        ----------
        rows : (b,) int64 array
            No row may come twice.
        block : (b, m) array
            Of NumPy, or of torch where torch scans; taken as float32.

        Raises
        ------
        UsageError
            Norms so large (or not finite) that float32 products could overflow.
        """
        if not len(rows) or not len(self._queries):
            self._seen += len(rows)
            return
        if isinstance(block, np.ndarray):
            block = np.ascontiguousarray(block, np.float32)
        b, r = self._placed(block), self._placed(np.ascontiguousarray(rows, np.int64))
        largest = norm_bound(b) if self.largest is None else self.largest
        if not float(self._norm.max()) * largest < _TOO_LARGE:
            raise UsageError(
                f"Rows {rows[0]} to {rows[-1]} and the queries have norms up to {largest:.3g} and "
                f"{float(self._norm.max()):.3g}, or values that are not finite: float32 cannot rank them. "
                "Look for such values among the latents, or scale the projection down."
            )
        self._seen += len(rows)
        step = _TILE[self.device[:4].rstrip(":")][0]
        with strict(self.device):
            for at in range(0, len(self._queries), step):
                self._scan(slice(at, at + step), r, b, largest)

    def best(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Return (scores, rows) on the host, each (q, min(k, references)), as :func:`top_k` does."""
        k = min(self.k, self._seen)
        score, row = (
            np.asarray(x[:, :k].cpu() if self._where else x[:, :k]) for x in (self._score, self._row)
        )
        return score, row

    # --- one block, some queries ---------------------------------------------------------------------------

    def _scan(self, part: slice, rows: Any, block: Any, largest: float) -> None:
        queries = self._queries[part]
        if self.backend == "auto" and len(queries) * block.shape[0] * block.shape[1] >= _WORTH:
            n = len(block) // 32
            self._by_tiles(part, rows[:n], block[:n], largest)  # both then start from known scores
            self._race(part, rows[n : 2 * n], block[n : 2 * n], largest)
            rows, block = rows[2 * n :], block[2 * n :]
        if self.backend == "faiss":
            self._by_faiss(part, rows, block, largest)
        else:
            self._by_tiles(part, rows, block, largest)

    def _race(self, part: slice, rows: Any, block: Any, largest: float) -> None:
        """Time both ways on the same rows, and keep to the faster one."""
        _near(self._queries[part][:1], block[:1], 1)  # importing is not searching
        start = time.perf_counter()
        _near(self._queries[part], block, min(self.k + _SPARE, len(block)))
        middle = time.perf_counter()
        held = self._tiles(part, rows, block, largest)
        self.seconds = {"faiss": middle - start, "numpy": time.perf_counter() - middle}
        self._settle(part, rows, block, held)
        self.backend = "faiss" if self.seconds["faiss"] < self.seconds["numpy"] else "numpy"

    def _by_tiles(self, part: Any, rows: Any, block: Any, largest: float) -> None:
        self._settle(part, rows, block, self._tiles(part, rows, block, largest))

    def _tiles(self, part: Any, rows: Any, block: Any, largest: float) -> list[tuple[Any, Any, Any]]:
        """Multiply tile by tile; return the pairs that may belong to the best k, to be settled.

        ``least`` is the float32 score below which a pair cannot: the exact k-th score known less one bound
        on the rounding, or the k-th score of this scan less two (both may have been rounded).
        """
        xp, k = self._xp, self.k
        queries, norm = self._queries[part], self._norm[part]
        scale, (scanned, low) = 1.0, (queries, block)
        if self.scan != "float32":
            scanned, low, scale = half_scale(queries, norm, block, largest, self.scan)
        margin = bound(block.shape[1], self.scan, norm * largest * scale)
        width = max(1, _TILE["cpu" if self.device == "cpu" else "cuda"][1] // len(queries))
        held: list[tuple[Any, Any, Any]] = []
        least = self._score[part, -1] * scale - margin
        for n, at in enumerate(range(0, len(block), width)):
            scores = self._products(scanned, low[at : at + width])
            if n == 0 and scores.shape[1] >= k:
                first = xp.astype(kth_largest(scores, k), xp.float64) - 2 * margin
                least = xp.maximum(least, first)
            i, j = tile_above(scores, xp.astype(least, scores.dtype))
            held.append((i, j + at, xp.astype(scores[i, j], xp.float64)))
            if n & (n + 1) == 0 or at + width >= len(block):
                held, least = _pruned(xp, held, least, margin, k)
            if sum(len(i) for i, _, _ in held) > _HELD:
                self._settle(part, rows, block, held)
                held, least = [], xp.maximum(least, self._score[part, -1] * scale - margin)
        return held

    def _products(self, queries: Any, tile: Any) -> Any:
        if self.backend == "torch":
            return queries @ tile.T
        # Fresh pages for every tile would cost a tenth of the product.
        size = len(queries) * len(tile)
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.float32)
        return np.matmul(queries, tile.T, out=self._buffer[:size].reshape(len(queries), -1))

    def _by_faiss(self, part: slice, rows: Any, block: Any, largest: float) -> None:
        """Let FAISS find k and a few more; queries for which that is not enough are searched tile by tile."""
        queries, known = self._queries[part], self._score[part, -1]
        margin = bound(block.shape[1], "float32", self._norm[part] * largest)
        ask = min(self.k + _SPARE, len(block))
        scores, near = _near(queries, block, ask)
        least = known - margin
        if ask >= self.k:
            least = np.maximum(least, scores[:, self.k - 1].astype(np.float64) - 2 * margin)
        reached = scores >= least.astype(np.float32)[:, None]
        more = reached[:, -1] & (ask < len(block))
        i, place = np.nonzero(reached & ~more[:, None])
        self._settle(part, rows, block, [(i, near[i, place], None)])
        if more.any():
            self._by_tiles(part.start + np.flatnonzero(more), rows, block, largest)

    def _settle(self, part: Any, rows: Any, block: Any, held: list[tuple[Any, Any, Any]]) -> None:
        """Score pairs (query of the part, place in the block) in float64; keep the best k of each query."""
        xp = self._xp
        if not held or not sum(len(i) for i, _, _ in held):
            return
        i, j = (xp.concat([pair[n] for pair in held]) for n in (0, 1))
        score = exact_scores(self._queries[part], block, i, j)
        base = self._score[part]
        some = xp.zeros(len(base), dtype=xp.bool, **self._where)
        some[i] = True
        own = xp.nonzero(some)[0]
        place = xp.cumulative_sum(xp.astype(some, xp.int64)) - 1
        k, lead = self.k, xp.arange(len(own), **self._where)
        of = xp.concat([xp.repeat(lead, k), place[i]])
        score = xp.concat([xp.reshape(base[own], (-1,)), score])
        row = xp.concat([xp.reshape(self._row[part][own], (-1,)), rows[j]])
        order = xp.argsort(row, stable=True)
        order = order[xp.argsort(-score[order], stable=True)]
        order = order[xp.argsort(of[order], stable=True)]
        of = of[order]
        keep = order[xp.arange(len(of), **self._where) - xp.searchsorted(of, lead)[of] < k]
        # A slice's own numbers: what is kept is written where the part stands among all queries.
        target = own + part.start if isinstance(part, slice) else self._placed(np.asarray(part))[own]
        self._score[target] = xp.reshape(score[keep], (-1, k))
        self._row[target] = xp.reshape(row[keep], (-1, k))


def _pruned(
    xp: Any, held: list[tuple[Any, Any, Any]], least: Any, margin: Any, k: int
) -> tuple[list[tuple[Any, Any, Any]], Any]:
    """Raise ``least`` by the k-th score of what is held of each query, and drop what lies below."""
    i, j, s = (xp.concat([triple[n] for triple in held]) for n in range(3))
    order = xp.argsort(-s, stable=True)
    order = order[xp.argsort(i[order], stable=True)]
    i, j, s = i[order], j[order], s[order]
    edges = xp.searchsorted(i, xp.arange(len(least) + 1, device=array_api_compat.device(i)))
    full = edges[:-1] + k <= edges[1:]
    kth = s[(edges[:-1] + k - 1)[full]]
    least[full] = xp.maximum(least[full], kth - 2 * margin[full])
    keep = s >= least[i]
    return [(i[keep], j[keep], s[keep])], least


def _near(
    queries: npt.NDArray[np.float32], block: npt.NDArray[np.float32], ask: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    import faiss

    found: tuple[Any, Any] = faiss.knn(queries, block, ask, metric=faiss.METRIC_INNER_PRODUCT)
    return found
