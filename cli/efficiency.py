"""What a map costs (Table 3): hours of training, seconds to extract an image, seconds to match a pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli.collection import Collection
from cli.ranked import Asked
from latentstore import encoders, images, results, search
from latentstore.encoders import blank_batch
from latentstore.errors import ImageError, LatentStoreError
from latentstore.pictures import Pictures
from latentstore.results import Figure, Role
from solvers.projection import Projection

GROUP = "efficiency"
REPEATS = 5
SECONDS = 10.0
"""A measurement is repeated at least thrice, and not again after so long."""
PAIRED = 1 << 26
"""Numbers of the references that matching is timed on: 131,072 rows at 512 columns."""
QUERIES = 1000
TOP = 10
PICTURES = 64
HOUR = 3600.0


def efficiency(
    gallery: Collection,
    asked: Asked,
    maps: Mapping[str, Projection],
    files: Mapping[str, Path],
    controls: Mapping[str, Projection],
    *,
    device: str = "auto",
) -> tuple[list[Figure], list[str]]:
    """Time training, extraction and matching: warm, the median of repeats, with the device's work done.

    Parameters
    ----------
    gallery : Collection
    asked : Asked
    maps, controls : mapping of name to Projection
        Whose matching is timed.
    files : mapping of name to Path
        Where each map lies: what its training took is read beside it.
    device : str
        Of the encoder and of the search.

    Returns
    -------
    figures, sentences
        Figures named ``training`` (h), ``decoding`` and ``extraction`` (s/img) and ``matching`` (s/pair);
        the sentences say what could not be timed, and on what the rest was.
    """
    figures: list[Figure] = []
    said = [f"Efficiency was measured on this machine: {_machine()}."]
    for name, path in files.items():
        hours, why = _training(path)
        if hours is None:
            said.append(f"Training of {name} is not told: {why}.")
        else:
            figures.append(_figure("training", hours, name, "h", "the fit with its passes over the store"))
    for what, seconds, unit, note in _extraction(gallery, device, said):
        figures.append(_figure(what, seconds, "encoder", unit, note))
    where = search.find_device(device)
    for name, W in {**maps, **controls}.items():
        seconds, note = _matching(gallery, asked, W, where)
        role: Role = "method" if name in maps else "control"
        figures.append(_figure("matching", seconds, name, "s/pair", note, role))
    return figures, said


def _figure(what: str, value: float, subject: str, unit: str, note: str, role: Role = "method") -> Figure:
    return Figure(what, value, subject, role, GROUP, unit, note=note)


def _machine() -> str:
    facts = results.stamp()["machine"]
    return f"{facts['machine']}, {facts['cores']} cores, {facts['system']}"


def _training(path: Path) -> tuple[float | None, str]:
    """Return the hours that a solve took, from the results that it wrote beside W; or None and why not."""
    beside = path.with_suffix(".results.json")
    if not beside.is_file():
        return None, f"there is no {beside.name} beside the map"
    try:
        report = results.load(beside)
    except LatentStoreError as error:
        return None, str(error).removesuffix(".")
    if report.kind != "solve" or "fit" not in report.timings:
        return None, f"{beside.name} is not of a solve"
    return report.timings["fit"] / HOUR, ""


def _extraction(gallery: Collection, device: str, said: list[str]) -> list[tuple[str, float, str, str]]:
    """Time the store's encoder on a full batch, and reading and resizing apart from it."""
    store = gallery.store
    try:
        encoder = encoders.load_for(store.space, store.provenance["encoder"], device=device)
    except (LatentStoreError, KeyError) as error:
        why = str(error) if isinstance(error, LatentStoreError) else "the store does not say what made it."
        said.append(f"Extraction is not timed: {why}")
        return []
    out = []
    batch = blank_batch(encoder)
    pictures, seconds = _read(gallery, min(PICTURES, encoder.batch))
    if pictures:
        note = f"reading, decoding and resizing one at a time; median of {len(seconds)}"
        out.append(("decoding", statistics.median(seconds), "s/img", note))
        for i in range(len(batch)):
            batch[i] = pictures[i % len(pictures)]
    else:
        said.append("The store has no pictures to read: extraction is timed on noise, and decoding is not.")
        batch[:] = np.random.default_rng(0).integers(0, 256, batch.shape, np.uint8)
    rows = np.full(len(batch), -1, np.int64)
    took, n = _median(lambda: encoder.encode(batch, rows))
    note = f"{encoder.facts['name']} on {encoder.facts['device']}, batches of {len(batch)}, median of {n}"
    out.append(("extraction", took / len(batch), "s/img", note))
    return out


def _read(gallery: Collection, n: int) -> tuple[list[Any], list[float]]:
    """Return pictures of the gallery in the encoder's size, and the seconds that each took."""
    if gallery.store.kind != "images":
        return [], []
    source, size = Pictures(gallery.store.first), gallery.store.space.image_size
    found, seconds = [], []
    rows = np.random.default_rng(0).permutation(gallery.gallery)[: n + 1]
    for row in rows.tolist():
        began = time.perf_counter()
        try:
            found.append(images.resize(source.read(row), size))
        except (ImageError, LatentStoreError):
            continue
        seconds.append(time.perf_counter() - began)
    return found[1:], seconds[1:]  # the first one opens the list and the folder


def _matching(gallery: Collection, asked: Asked, W: Projection, device: str) -> tuple[float, str]:
    """Time the exact search of a block of references that is in memory."""
    queries = asked.embedded(W)[:QUERIES]
    rows = gallery.gallery[: max(1, PAIRED // queries.shape[1])]
    references = gallery.references(W, rows)
    numbers = np.arange(len(rows))

    def match() -> None:
        search.top_k(queries, [(numbers, references)], TOP, device=device)

    took, n = _median(match)
    note = (
        f"exact search for the best {TOP} on {device}: {len(queries):,} queries × {len(rows):,} references "
        f"of {queries.shape[1]:,} numbers, median of {n}"
    )
    return took / (len(queries) * len(rows)), note


def _median(work: Callable[[], Any]) -> tuple[float, int]:
    """Return the median seconds of several runs after a first one, and how many there were."""
    work()
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < REPEATS and sum(taken) < SECONDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), len(taken)
