"""attack: how well origins are found when queries were compressed, blurred or cropped on their way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cli import attack_tables as tables
from cli import measure, settling
from cli.attack_latents import Latents, encode_attacked
from cli.attack_pictures import AttackOptions, Chosen, choose, listed, parse_attacks
from cli.attack_tables import Attacked, Rankings, Step
from cli.collection import Collection, Rows
from cli.own_map import own_projection
from cli.ranked import HELD, Asked
from cli.render import counted
from latentstore import encoders, results
from latentstore.attacks import FAMILIES, Attack
from latentstore.errors import UsageError
from latentstore.report import write_html
from latentstore.results import Report
from solvers.metrics import Ranking, ranked
from solvers.projection import Projection

Count = Callable[[int, int], None]
Watch = Callable[[str, str], AbstractContextManager[tuple[Count, Count]]]
"""Takes what is done and its unit; yields (on_start, on_rows) as :func:`cli.progress.progress` does."""
CONTROLS = ("raw", "centred", "norm-weighted", tables.PCA)
"""How the names of the controls begin that stand beside every W."""


def _unwatched(label: str, unit: str) -> AbstractContextManager[tuple[Count, Count]]:
    del label, unit
    return nullcontext((lambda todo, total: None, lambda rows, bad: None))


def attack(
    store: Path,
    projections: Sequence[Path],
    options: AttackOptions,
    *,
    queries: Path | None = None,
    device: str = "auto",
    out: Path | None = None,
    table: Path | None = None,
    plot: Path | None = None,
    html: Path | None = None,
    watch: Watch = _unwatched,
    command: str = "",
) -> Attacked:
    """Attack test pictures in every way, and measure how well each W and the controls find their origins.

    Pictures are attacked in their own size, then resized and encoded as the store's were. References are not
    touched. The latents of attacked pictures lie in a temporary file; in memory are one map's rows of them (a
    GiB at most) and a block of references.

    Parameters
    ----------
    store : Path
        The gallery.
    projections : sequence of Path
        Empty for the collection's own analytic map, which is made and kept.
    options : AttackOptions
    queries : Path, optional
        The store whose test pictures are attacked; by default the gallery's.
    device : str
        Of the encoder.
    out, table, plot, html : Path, optional
        Results JSON, CSV, PNG and page to write.
    watch : callable

    Raises
    ------
    UsageError
        Attacks or files that cannot be; a store without pictures, or without test pictures.
    LeakError
        A W was fitted or chosen on the identities that are asked for.
    SpaceError, SpaceMismatchError
        Latents or projections of different spaces.
    """
    settling.check_files(out=out, csv=table, plot=plot, html=html)
    unattacked = Step(tables.NOTHING, None, Attack(tables.UNATTACKED, lambda image, seed: image))
    steps = [unattacked, *parse_attacks(options.attacks)]
    gallery = Collection.open(store)
    measure.require_gallery(gallery)
    chosen = choose(gallery, queries, options)
    methods = _maps(gallery, projections)
    chosen.asked.check(gallery, methods)
    asking, rows = chosen.collection, chosen.rows
    recorded = asking.store.provenance["encoder"]
    encoder = encoders.load_for(asking.store.space, recorded, device=device)
    began = time.perf_counter()
    with Latents(len(steps), len(rows), asking.store.layout) as latents:
        with watch("attack", "pictures") as (on_start, on_rows):
            attacks = [step.attack for step in steps]
            lost = encode_attacked(
                asking, rows, attacks, encoder, options.seed, latents, on_start=on_start, on_rows=on_rows
            )
        kept = np.array([at not in lost for at in range(len(rows))], bool)
        named = [(str(asking.path[rows[at]]), why) for at, why in sorted(lost.items())]
        if not kept.any():
            raise UsageError(
                f"None of the {len(kept)} query pictures of {asking.store.path} can be used "
                f"({listed(named)}). Attacks are made on the files that the store was made from."
            )
        encoded = time.perf_counter()
        reads = [partial(latents.read, at, kept) for at in range(len(steps))]
        with watch("rank", "references") as (on_start, on_rows):
            # Fitted now: the pictures are what may be missing.
            maps = _controls(gallery, methods) | methods
            found = _rank(gallery, chosen.asked, kept, maps, reads, on_start, on_rows)
    photos = asking.group[rows[kept]]
    report = Report(
        kind="attack",
        title=f"Attacked {chosen.described}: {', '.join(methods)}",
        summary=[],
        data={
            "store": str(store),
            "queries": str(queries or store),
            "encoder": recorded.get("name", ""),
            "space": asking.store.space.id,
            "references ranked": len(gallery.gallery),
            "attacked": chosen.described,
            "test queries": int(kept.sum()),
            "test photos": len(set(photos)),
            "without a picture": len(named),
        },
        settings={
            "maps": {name: f"{W.method}, rank {W.rank}" for name, W in methods.items()},
            "attacks": {FAMILIES[f].label: values for f, values in tables.intensities(steps).items()},
            "seed": options.seed,
            "limit": options.limit,
        },
        reproduce=[command] if command else [],
        caveats=_caveats(gallery, chosen, options, named, len(steps) - 1, len(set(photos))),
        timings={"attack and encode": encoded - began, "rank": time.perf_counter() - encoded},
        **results.stamp(),
    )
    attacked = tables.tabulated(report, steps, found, methods, photos)
    _write(attacked, out, table, plot, html)
    return attacked


def _write(
    attacked: Attacked, out: Path | None, table: Path | None, plot: Path | None, html: Path | None
) -> None:
    if out is not None:
        attacked.report.write(out)
    if table is not None:
        tables.write_csv(attacked.rows, table)
    if plot is not None:
        from cli.render_attack import draw

        draw(attacked.report.curves, plot)
    if html is not None:
        write_html(attacked.report, html)


# --- maps and rankings ------------------------------------------------------------------------------------


def _maps(gallery: Collection, projections: Sequence[Path]) -> dict[str, Projection]:
    """Return the maps by method, or where several share one by file; refuse those of other latents."""
    if not projections:
        W, _, _ = own_projection(gallery)
        loaded = {W.method: W}
    else:
        maps = {path: settling.load_projection(path) for path in projections}
        methods = [W.method for W in maps.values()]
        stems = [path.stem for path in maps]
        loaded = {}
        for path, W in maps.items():
            unique = W.method and methods.count(W.method) == 1
            name = W.method if unique else path.stem if stems.count(path.stem) == 1 else str(path)
            loaded[name] = W
    dim = gallery.store.layout.dim
    for name, W in loaded.items():
        W.check_space(gallery.store.space.id)
        if W.dim != dim:
            raise UsageError(
                f"{name} takes latents of {W.dim} numbers, and those of {gallery.store.path} have {dim}. "
                "Solve a W for these latents."
            )
    return loaded


def _controls(gallery: Collection, methods: Mapping[str, Projection]) -> dict[str, Projection]:
    """Return the controls of the widest W; a W that is one of them stands for it."""
    fitted = measure.fit_controls(gallery, max(W.rank for W in methods.values()))
    return {name: W for name, W in fitted.items() if name.startswith(CONTROLS) and name not in methods}


def _rank(
    gallery: Collection,
    asked: Asked,
    kept: Any,
    maps: Mapping[str, Projection],
    reads: Sequence[Callable[[], Any]],
    on_start: Count,
    on_rows: Count,
) -> Rankings:
    """Rank the whole gallery by every map for the latents that each of ``reads`` returns.

    A map's references are projected once, block by block, for as many attacks as fit in memory: all of them,
    unless there are very many queries.
    """
    labels, rows = asked.labels[kept], gallery.gallery
    together = {
        name: max(1, min(len(reads), HELD // (4 * max(1, len(labels)) * W.rank))) for name, W in maps.items()
    }
    todo = sum(-(-len(reads) // n) for n in together.values()) * len(rows)
    on_start(todo, todo)
    found: dict[tuple[str, int], Ranking] = {}
    for name, W in maps.items():
        for first in range(0, len(reads), together[name]):
            here = range(first, min(first + together[name], len(reads)))
            ranking = ranked(
                np.concatenate([np.asarray(W.queries(reads[at]()), np.float32) for at in here]),
                np.tile(labels, len(here)),
                asked.reference_labels,
                _counted(gallery.reference_blocks(W, rows), on_rows),
                partial(_fetched, gallery, W, rows),
            )
            of = ranking.queries // len(labels)
            found |= {(name, at): ranking.subset(of == i) for i, at in enumerate(here)}
    return found


def _fetched(gallery: Collection, W: Projection, rows: Rows, positions: Any) -> Any:
    return np.concatenate(list(gallery.reference_blocks(W, rows[positions])))


def _counted(blocks: Iterable[Any], on_rows: Count) -> Iterator[Any]:
    for block in blocks:
        yield block
        on_rows(len(block), 0)


# --- words ------------------------------------------------------------------------------------------------


def _caveats(
    gallery: Collection,
    chosen: Chosen,
    options: AttackOptions,
    named: Sequence[tuple[str, str]],
    n_attacks: int,
    n_photos: int,
) -> list[str]:
    out = []
    asked = chosen.asked
    if chosen.originals:
        out.append(
            "There are no translations or queries in the test split: originals were attacked, and looked for "
            "among the untouched ones. Attacked originals are not translations; without an attack each finds "
            "itself."
        )
    if named:
        out.append(f"{_pictures(len(named))} left out: {listed(named)}.")
    if n_photos < measure.ROUGH:
        out.append(
            f"The queries come from {counted(n_photos, 'photograph')}: intervals over so few are too narrow "
            "to be trusted, and none of the differences is settled by them."
        )
    if chosen.n_test > options.limit:
        verb = "was" if options.limit == 1 else "were"
        drawn = f"{options.limit:,} of {chosen.n_test:,} test pictures {verb} drawn"
        out.append(f"{drawn}, with seed {options.seed}.")
    if asked.n_without_origin:
        out.append(f"{_pictures(asked.n_without_origin, 'test ')} left out: no origin in the gallery.")
    if asked.n_copies:
        out.append(
            f"{_pictures(asked.n_copies, 'test ')} left out: a copy or near-duplicate of the origin stands "
            "in a split that was fitted or chosen on."
        )
    if len(gallery.gallery) < 2000:
        out.append(
            f"The gallery has {counted(len(gallery.gallery), 'image')}; origins are much easier to find "
            "among few than among millions."
        )
    if gallery.near[1]:
        out.append(gallery.near[1])
    out.append("Pictures are attacked in their own size: a blur of 3 pixels is weaker on a larger picture.")
    out.append(
        "JPEG 30 and a blur of 3 pixels are the strongest of the paper's Figure 7, on its own images and "
        "models; the other intensities and kinds are ours."
    )
    out.append(
        f"Attacks are drawn once for each picture (seed {options.seed}). About one interval in twenty misses "
        f"zero by chance, and here {counted(n_attacks, 'attack has', 'attacks have')} one for each map."
    )
    out.append(
        "PCA-whitening and the analytic map read the gallery's covariance, without labels. PCA-whitened, "
        "best, is the best of its ranks and exponents by these very queries: an advantage that a control may "
        "have."
    )
    return out


def _pictures(n: int, what: str = "") -> str:
    return counted(n, f"{what}picture was", f"{what}pictures were")
