"""moments: the sums that the closed forms fit on, made once, kept, and shared by every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli import kept
from cli.collection import Collection
from cli.gallery import gallery_sums
from cli.passes import PARTS
from cli.streams import OnRows
from latentstore.errors import UsageError
from latentstore.store import open_store
from solvers.errors import NoPairsError
from solvers.moments import bytes_needed

OnStart = Callable[[int, int], None]


@dataclass(frozen=True)
class Kept:
    """What is kept beside a store's latents.

    Attributes
    ----------
    store : str
    pairs, origins, dim : int
        Of the training split.
    gallery : int
        Rows whose covariance is kept, too.
    models : list of str
        That have sums of their own; empty when only the sums over all are kept.
    parts, made : int
        Files, and how many of them were made just now.
    bytes, all_bytes, memory : int
        Of these parts on disk, of all sums that are kept there, and what a part takes while it is summed.
    seconds : float
    ran_on : str
    """

    store: str
    pairs: int
    origins: int
    dim: int
    gallery: int
    models: list[str]
    parts: int
    made: int
    bytes: int
    all_bytes: int
    memory: int
    seconds: float
    ran_on: str


def run_moments(
    store: Path,
    *,
    parts: int = PARTS,
    models: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    on_start: OnStart | None = None,
    on_rows: OnRows | None = None,
) -> Kept:
    """Sum the training pairs of a store in parts, and its gallery, and keep both; a stopped run goes on.

    Parameters
    ----------
    store : Path
    parts : int
        Groups of photos with sums of their own, by hash.
    models : bool
        Keep sums of each translation model, too.
    workers, scheduler
        As for :func:`~cli.workflows.run_encode`.

    Raises
    ------
    NoPairsError
        No pairs in the training split.
    UsageError
    """
    if parts < 1:
        raise UsageError(f"--parts is {parts}; at least 1 is needed.")
    began = time.perf_counter()
    collection = Collection.open(store)
    plan = collection.pair_pass("train", models=models, parts=parts)
    if not plan.rows:
        raise NoPairsError(
            f"{store} holds no pairs in its training split, so there is nothing to sum. Make pairs with "
            "latentstore simulate, or encode your translations with a manifest."
        )
    if on_start is not None:
        on_start(sum(len(t.translations) for t in plan.todo()), plan.rows)
    ran_on = "this process"
    if workers is None and scheduler is None:
        made = plan.run(on_rows=on_rows)
    else:
        from latentstore.cluster import connect, describe

        with connect(workers=workers, scheduler=scheduler) as client:
            ran_on = describe(client)
            made = plan.run(client=client, on_rows=on_rows)
    gallery_sums(collection.store, collection.gallery, keep=True)
    named = [t.model for t in plan.tasks if t.model]
    return Kept(
        store=str(store),
        pairs=plan.rows,
        origins=len({row for t in plan.tasks for row in t.origins.tolist()}),
        dim=collection.store.layout.dim,
        gallery=len(collection.gallery),
        models=sorted(set(named)),
        parts=len(plan.tasks),
        made=made,
        bytes=plan.bytes,
        all_bytes=sum(p.stat().st_size for p in kept.folder_of(collection.store).rglob("*.safetensors")),
        memory=bytes_needed(collection.store.layout.dim)[0],
        seconds=time.perf_counter() - began,
        ran_on=ran_on,
    )


def drop_moments(store: Path) -> int:
    """Delete what is kept; return its bytes."""
    return kept.drop(open_store(store))


def kept_text(kept: Kept) -> str:
    """Return what is kept, in the terminal."""
    from cli.render import size

    of = f", {', '.join(kept.models)} apart and all together" if len(kept.models) > 1 else ""
    made = (
        f"{kept.made} of {kept.parts} parts made now" if kept.made else f"all {kept.parts} parts were there"
    )
    rate = f", {kept.pairs / kept.seconds:,.0f} pairs/s" if kept.made == kept.parts else ""
    return (
        f"{kept.store}: sums of {kept.pairs:,} training pairs of {kept.origins:,} origins, "
        f"{kept.dim:,} numbers each{of};\n  and of the gallery's {kept.gallery:,} rows\n"
        f"  {made}{rate}\n"
        f"  {size(kept.bytes)} on disk ({size(kept.all_bytes)} with all that is kept, --drop deletes it), "
        f"{size(kept.memory)} of memory while a part is summed\n"
        "  solve takes them up by itself while the latents stay as they are (only svd reads rows as well,\n"
        "  where sums cannot tell what is zero)."
    )
