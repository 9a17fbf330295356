"""theory: the paper's lemmas and theorems in numbers, each beside a control and a case where it fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cli import theory_lemma
from cli.collection import Collection, Rows
from cli.render import counted
from cli.solving import check_writable
from latentstore import results
from latentstore.errors import UsageError
from latentstore.results import Figure, Report, Role
from latentstore.simulate import Diffusion, GaussianPrior, translate
from solvers import theory
from solvers.errors import NoPairsError
from solvers.rank import check_rank
from solvers.spectrum import fit_spectrum

PAIRS, HELD_OUT = 8192, 2048
"""Pairs of a model that are fitted and checked at most; more are sampled, so that they fit in memory."""
MOVES = "‖TW‖/‖(O−μ)W‖"
OWN, UNSEEN, OTHER = (
    f"{MOVES}, own fitted pairs",
    f"{MOVES}, held-out pairs",
    f"{MOVES}, second model's held-out pairs",
)
MISSED = "‖U₃W₂ − W₂M‖/‖U₃W₂‖"
_SPREAD = (
    "A stranger's difference g − o varies by both their covariances, so the directions in which it varies "
    "least still keep clear of those that translations spread."
)
_FEW = (
    "With fewer pairs than values any pairs leave a null space, and inside it W takes the directions in "
    "which origins vary most."
)
Done = Callable[[int, int], None]
PLANTED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("planted: both models move within one subspace of 16 in 64", {}),
    ("planted: each model moves within its own subspace of 16", {"shared": False}),
    ("planted: no subspace, 40 pairs of 64 values", {"moved": 64, "n": 40}),
)


@dataclass(frozen=True)
class TheoryOptions:
    """What is checked.

    Attributes
    ----------
    rank : int or None
        Columns of W on a store; by default half of the dimensions, at most 512.
    pipeline : Path or None
        A local folder of a diffusers pipeline; without, a small untrained UNet is built.
    vaes : tuple of str
        Two autoencoders for Table 4, or none.
    images : Path or None
        Pictures for Lemma 1 and Table 4; without, colour fields are drawn.
    image_size : int
        For the pipeline and Table 4.
    device : str
    seed : int
    """

    rank: int | None = None
    pipeline: Path | None = None
    vaes: tuple[str, ...] = ()
    images: Path | None = None
    image_size: int = 256
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.vaes) not in (0, 2):
            given = counted(len(self.vaes), "time")
            raise UsageError(
                f"Table 4 compares two autoencoders, and --vae was given {given}. Give it twice, or "
                "not at all."
            )


def check(
    store: Path | None,
    options: TheoryOptions,
    *,
    out: Path | None = None,
    on_start: Done | None = None,
    on_check: Done | None = None,
    command: str = "",
) -> Report:
    """Check Lemma 1, Theorems 1 and 2, the slips of the print, and Table 4.

    Parameters
    ----------
    store : Path, optional
        A store of pairs; without, the theorems are checked on planted pairs alone.
    options : TheoryOptions
    out : Path, optional
        Where the report goes, too.
    on_start, on_check : callable, optional
        Called with (parts, parts), and with (1, 0) after each part.

    Raises
    ------
    NoPairsError
        The store holds no pairs to fit on.
    UsageError, EncoderError, SolverUsageError
    """
    began = time.perf_counter()
    if out is not None:
        check_writable(out)
    if store is None and options.rank is not None:
        raise UsageError("--rank is about a store's pairs. Add --store PAIRS, or leave it out.")
    done = on_check or (lambda parts, bad: None)
    world = None if store is None else _store_world(Collection.open(store), options)
    parts = 3 + len(PLANTED) - (options.pipeline is not None) + (world is not None) + bool(options.vaes)
    (on_start or done)(parts, parts)
    # What may be refused comes first; the page begins with Lemma 1.
    table = _table_4(options, done)
    pairs = _theorems(world, options, done)
    found = [_lemma_1(options, done), pairs, table, _slips(options.seed)]
    report = Report(
        kind="theory",
        title="Theory check" if store is None else f"Theory check on {store}",
        summary=[text for part in found for text in part.summary],
        data={} if world is None else world.data,
        settings={k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        reproduce=[command] if command else [],
        figures=[figure for part in found for figure in part.figures],
        caveats=[text for part in found for text in part.caveats],
        timings={"theory": time.perf_counter() - began},
        **results.stamp(),
    )
    if out is not None:
        report.write(out)
    return report


@dataclass
class _Part:
    """What one part of the check found."""

    figures: list[Figure] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)


def _lemma_1(options: TheoryOptions, done: Done) -> _Part:
    part = _Part(caveats=theory_lemma.caveats(options.images, options.seed, built=options.pipeline is None))
    sources = (options.pipeline, options.images, options.image_size, options.device, options.seed)
    with theory_lemma.one_thread(options.pipeline is None):
        for case in theory_lemma.cases(*sources):
            part.figures += theory_lemma.lemma_figures(case, options.seed)
            done(1, 0)
    part.summary = theory_lemma.verdict(part.figures)
    return part


def _theorems(world: _StoreWorld | None, options: TheoryOptions, done: Done) -> _Part:
    part, checked = _Part(), dict[str, theory.World]()
    if world is None:
        said = "Theorems 1 and 2 were checked on planted pairs alone; --store PAIRS adds your own."
        part.summary.append(said)
    else:
        part.figures += _theorem_figures(world.name, world.pairs, world.rank, options.seed)
        part.summary.append(_verdict(world, part.figures))
        part.caveats += world.caveats
        checked[world.name] = world.pairs
        done(1, 0)
    for name, knobs in PLANTED:
        planted = theory.planted(seed=options.seed, **knobs)
        part.figures += _theorem_figures(name, planted, planted.dim // 4, options.seed)
        checked[name] = planted
        done(1, 0)
    part.caveats += _on_wrong_pairs(part.figures, checked)
    return part


def _table_4(options: TheoryOptions, done: Done) -> _Part:
    if len(options.vaes) != 2:
        return _Part(caveats=["Table 4 was not taken: give --vae twice, each a local folder or a hub name."])
    pair = (options.vaes[0], options.vaes[1])
    sources = (options.images, options.image_size, options.device, options.seed)
    figures, said = theory_lemma.vae_figures(pair, *sources)
    done(1, 0)
    return _Part(figures, caveats=said)


def _slips(seed: int) -> _Part:
    part = _Part()
    for slip in theory.slips(seed):
        sides: tuple[tuple[str, float, Role], ...] = (
            ("as printed", slip.printed, "control"),
            ("as found", slip.found, "method"),
        )
        part.figures += [Figure(slip.what, value, who, role, slip.where) for who, value, role in sides]
        part.caveats.append(f"{slip.where}: {slip.sentence}")
    return part


# --- the theorems on pairs ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _StoreWorld:
    """A store's pairs as the theorems see them, with what is to be said of them."""

    name: str
    pairs: theory.World
    rank: int
    data: dict[str, Any]
    caveats: list[str]


def _theorem_figures(name: str, world: theory.World, rank: int, seed: int) -> list[Figure]:
    """Return what translation moves through each W, and how far the last step of the proof holds."""
    out, fitted = [], {}
    for named in theory.maps(world, rank, seed):
        fitted[named.name] = named.W
        role: Role = "method" if named.knows else "control"
        columns = world.dim if named.W is None else named.W.shape[1]
        for what, pairs in ((OWN, named.own), (UNSEEN, world.held_out), (OTHER, world.other_held_out)):
            value = theory.residual(named.W, pairs, world.mean)
            if math.isfinite(value):
                note = f"{columns} of {world.dim} columns"
                out.append(Figure(what, value, named.name, role, name, n=len(pairs), note=note))
    W1, W2 = fitted["svd"], fitted.get("svd, fitted on the second model")
    if W1 is None or W2 is None:
        return out
    step = theory.last_step(W1, W2)
    note = f"the proof's last step says 0, from ‖K W₂ − I‖ = {step.left_inverse:.0e}"
    return [
        *out,
        Figure(MISSED, step.missed, "W by svd of both models", "method", name, note=note),
        Figure(MISSED, step.chance, "two random subspaces", "control", name, note="√(1 − m/d)"),
    ]


def _store_world(collection: Collection, options: TheoryOptions) -> _StoreWorld:
    d = collection.store.layout.dim
    rank = check_rank(min(512, d // 2) if options.rank is None else options.rank, d)
    train, test = _rows_by_model(collection, "train"), _rows_by_model(collection, "test")
    if not train:
        raise NoPairsError(
            f"Theorems 1 and 2 are about pairs (an origin and its translation), and {collection.store.path} "
            f"holds {_held(collection)}. Make pairs with latentstore simulate --store "
            f"{collection.store.path} --out simulated.zarr, encode your own translations with --manifest "
            "LIST.csv (columns path,identity,role,model), or leave --store out for planted pairs."
        )
    first, *others = sorted(train, key=lambda m: (-len(train[m][0]), m))
    if len(set(collection.identity[train[first][0]].tolist())) < 2:
        raise NoPairsError(
            "Theorems 1 and 2 compare what a translation moves with how origins differ, and "
            f"{collection.store.path} holds {counted(len(train[first][0]), 'training pair')} of one origin: "
            "nothing differs. Encode translations of at least two origins of the training split."
        )
    caveats = []
    pairs = _pairs(collection, train[first], PAIRS, options.seed)
    held_out = _pairs(collection, test.get(first), HELD_OUT, options.seed)
    if others:
        second = others[0]
        other = _pairs(collection, train[second], PAIRS, options.seed)
        other_held_out = _pairs(collection, test.get(second), HELD_OUT, options.seed)
        if len(others) > 1:
            caveats.append(
                f"The store holds translations of {len(train)} models; the two with the most training pairs "
                f"are checked ({first}; {second})."
            )
    else:
        diffusion = _second_diffusion(collection, options.seed)
        second = f"{diffusion.name}, drawn here"
        other, other_held_out = _simulated(collection, (pairs, held_out), diffusion)
        caveats.append(
            f"The store holds translations of one model ({first}). The second is simulated in memory: "
            f"{diffusion.name}, a Gaussian prior and no text-guided network."
        )
    if not len(held_out):
        caveats.append("The store holds no test pairs: nothing held out was measured.")
    world = theory.World(pairs, held_out, other, other_held_out, _mean(collection))
    data = {
        "store": str(collection.store.path),
        "space": collection.store.space.id,
        "dim": d,
        "first model": first,
        "second model": second,
        "fitted pairs": len(pairs),
        "training pairs of the first model": len(train[first][0]),
        "held-out pairs": len(held_out),
    }
    return _StoreWorld(f"{collection.store.path.name}: {first}", world, rank, data, caveats)


def _held(collection: Collection) -> str:
    n = len(collection.translations)
    none = ", none of them in the training split" if n else ""
    return f"{counted(n, 'pair')}{none}: {counted(len(collection.gallery), 'image')}"


def _rows_by_model(collection: Collection, split: str) -> dict[str, tuple[Rows, Rows]]:
    """Return the pairs of a split by their model; held-out ones whose origin leaks are left out."""
    origins, translated = collection.pairs(split)
    clean = collection.is_clean(collection.identity[translated], collection.split[translated])
    origins, translated = origins[clean], translated[clean]
    models = np.array([str(m or "unnamed model") for m in collection.model[translated]], dtype=object)
    return {m: (origins[models == m], translated[models == m]) for m in sorted(set(models))}


def _pairs(collection: Collection, rows: tuple[Rows, Rows] | None, most: int, seed: int) -> theory.Pairs:
    origins, translated = rows or (np.empty(0, np.int64), np.empty(0, np.int64))
    if len(origins) > most:
        kept = np.sort(np.random.default_rng(seed).choice(len(origins), most, replace=False))
        origins, translated = origins[kept], translated[kept]
    labels = collection.labels(collection.identity[origins]).astype(str)
    return theory.Pairs(collection.read(origins), collection.read(translated), labels)


def _second_diffusion(collection: Collection, seed: int) -> Diffusion:
    """Return a diffusion whose ᾱ is not near that of the store's own, where that was simulated."""
    own = (collection.store.origin.get("simulated") or {}).get("alpha_bar", 0.0)
    return Diffusion(alpha_bar=0.5 if own < 0.3 else 0.1, seed=seed)


def _simulated(
    collection: Collection, halves: Iterable[theory.Pairs], diffusion: Diffusion
) -> list[theory.Pairs]:
    """Return the same origins with translations of another model, in the stored dtype."""
    out: list[theory.Pairs] = []
    prior: GaussianPrior | None = None
    # Behind the store's rows, which seed its own simulated translations: no pair shares noise.
    at = len(collection.store)
    for pairs in halves:
        own = pairs.origins[np.unique(pairs.identities, return_index=True)[1]].astype(np.float64)
        if prior is None:
            spectrum = fit_spectrum([own], own.shape[1], len(own))
            prior = GaussianPrior.from_spectrum(spectrum.mean, spectrum.values, spectrum.vectors)
        moved = pairs.origins
        if len(pairs):
            rows = np.arange(at, at + len(pairs), dtype=np.int64)
            moved = translate(pairs.origins, prior, diffusion, rows).astype(pairs.origins.dtype)
            at += len(pairs)
        out.append(theory.Pairs(pairs.origins, moved, pairs.identities))
    return out


def _mean(collection: Collection) -> np.ndarray:
    total = np.zeros(collection.store.layout.dim)
    for block in collection.blocks(collection.gallery):
        total += block.sum(axis=0, dtype=np.float64)
    return total / max(1, len(collection.gallery))


# --- words -------------------------------------------------------------------------------------------------


def _verdict(world: _StoreWorld, figures: list[Figure]) -> str:
    """Say in one paragraph what the theorems come to on the store's pairs."""
    value = {(f.subject, f.name): f.value for f in figures if f.group == world.name}

    def both(what: str) -> str:
        ours, random = value.get(("svd", what)), value.get(("random subspace", what))
        return "–" if ours is None else f"{ours:.2g} (a random subspace: {random:.2g})"

    n, d = len(world.pairs.fitted), world.pairs.dim
    text = (
        f"{world.name}: through W by Lemma 2 ({world.rank} of {d} columns) a translation moves {both(OWN)} "
        f"of what the origins vary on the {counted(n, 'fitted pair')}, {both(UNSEEN)} on held-out ones "
        f"(Theorem 1), and {both(OTHER)} on those of the second model (Theorem 2)."
    )
    ours, random = (value.get((who, UNSEEN), math.nan) for who in ("svd", "random subspace"))
    if ours >= random:
        text += " On held-out pairs that is no better than a subspace that knows nothing."
    if n < d:
        text += (
            f" With {counted(n, 'pair')} of {d} values a null space of {d - n} dimensions is arithmetic: "
            "wrong pairs have one, too."
        )
    return text


def _on_wrong_pairs(figures: list[Figure], worlds: Mapping[str, theory.World]) -> list[str]:
    """Say where W by wrong pairs beats a random subspace on held-out pairs, and why it can."""
    value = {(f.group, f.subject): f.value for f in figures if f.name == UNSEEN}
    found, reasons = [], dict[str, None]()
    for group, world in worlds.items():
        right, wrong, random = (
            value.get((group, who), math.nan)
            for who in ("svd", "svd, fitted on wrong pairs", "random subspace")
        )
        if wrong < 0.9 * random:
            found.append(f"{group}: {wrong:.2g} to {random:.2g}, right pairs {right:.2g}")
            reasons[_FEW if len(world.fitted) < world.dim else _SPREAD] = None
    if not found:
        return []
    text = (
        "Through W fitted on wrong pairs held-out translations move less than through a random subspace "
        f"({'; '.join(found)}). {' '.join(reasons)} What the right pairs taught is their lead over the wrong "
        "ones, not over the random subspace."
    )
    return [text]
