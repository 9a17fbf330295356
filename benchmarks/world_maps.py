"""The miniature world's maps W: swept, solved, evaluated, compared, and paired differences between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.world_plan import BOTH, MODELS, WORLD, Plan
from cli import ablating, choosing, comparing, evaluating, measure, refitting, solving, sweeping, upper
from cli.collection import Collection
from cli.knobs import SolveOptions, has_rank
from cli.measure import Group
from cli.ranked import Asked, rankings
from cli.training import Run
from latentstore import results
from latentstore.results import CHOSEN, Figure, Report
from solvers.methods import get
from solvers.metrics import Ranking
from solvers.projection import Projection
from solvers.spectra import chance_overlap, map_spectrum, overlap, principal_angles

MAPS, OWN = Path("maps"), Path("maps-of-each")
"""Maps on model a's pairs, as they are reported; maps of each model, from equally many pairs of each."""
COSFACE, STARTED = "cosface", "cosface-from-gnull"
SEEN, UNSEEN = "seen model", "unseen model"
PAIRED = "paired differences"
OVERLAP = "overlap of column spaces"
COMPARED = (
    "cosface-a × cosface-b",
    "cosface-a × cosface-a-seed",
    "gnull-a × gnull-b",
    "gnull-a × gnull-simulated",
    "gnull-a-half × gnull-a-other-half",
    "gnull-a-half × gnull-b-other-half",
)
"""Pairs of maps that are worth a line: of two models, and controls of one."""


def map_file(name: str) -> Path:
    """Return where a map on model a's pairs lies."""
    return MAPS / f"{name}.safetensors"


def sweep(method: str, plan: Plan) -> Report:
    """Choose a method's rank on validation, and draw all ranks on test."""
    return sweeping.sweep(WORLD, method, _possible(plan)).report


def _possible(plan: Plan) -> tuple[int, ...]:
    dim = Collection.open(WORLD).store.layout.dim
    return tuple(k for k in plan.ranks if k <= dim) or (dim,)


def solve(method: str, swept: Report, plan: Plan) -> Report:
    """Fit W at the rank that was chosen; its other knobs are chosen on validation, too.

    Lemma 2's map stands at the plan's rank: what validation may choose is all directions, and then W leaves
    every cosine as it is and is no null space.
    """
    rank = swept.settings["chosen rank"] if method != "svd" else min(plan.rank, _possible(plan)[-1])
    return _solved(method, SolveOptions.of(method, rank if has_rank(method) else None))


def train(name: str, plan: Plan) -> Report:
    """Train W by CosFace, from a random start or from gnull; the step is chosen on validation."""
    if name == COSFACE:
        options = SolveOptions.of(
            "cosface", plan.rank, steps=plan.cosface_steps, weight_init="random", device="cpu"
        )
        return _solved(name, options)
    options = SolveOptions.of("cosface", steps=plan.cosface_steps, device="cpu")
    return _solved(name, options, Run(init=map_file("gnull")))


def _solved(name: str, options: SolveOptions, run: Run | None = None) -> Report:
    MAPS.mkdir(exist_ok=True)
    solved = solving.solve(WORLD, map_file(name), options, run=run)
    assert solved is not None, "one process alone trains here"
    return solved.report


def headline(names: list[str]) -> Report:
    """Rank the validation queries by every W; the best of those that learn from pairs is headlined."""
    world = Collection.open(WORLD)
    judge = choosing.Judge.of(world, world.queries("validation"), world.store.layout.dim)
    assert judge is not None, "there are validation originals"
    figures = []
    for name in names:
        ranking = judge.ranking(Projection.load(map_file(name)))
        group = Group("validation", judge.groups)
        figures.append(measure.figure("mAP", ranking.ap, name, "method", group))
    learned = [f for f in figures if _learns(f.subject)]
    best = max(learned, key=lambda f: f.value).subject
    return _report("Maps on validation", figures, settings={CHOSEN: best})


def _learns(name: str) -> bool:
    return bool(get("cosface" if name == STARTED else name).needs_pairs)


def evaluate(names: list[str], first: str) -> Report:
    """Evaluate all maps on the test queries of both models, with the upper bounds of the unseen one."""
    ordered = [first, *(n for n in names if n != first)]
    files = [map_file(name) for name in ordered]
    options = evaluating.EvaluateOptions(pictures=0, device="cpu")
    report = evaluating.evaluate(WORLD, files, options).report
    world, both = Collection.open(WORLD), Collection.open(BOTH)
    maps = {name: Projection.load(map_file(name)) for name in ordered}
    learned = {name: {MODELS[0]} for name in names if _learns(name)}
    asked = Asked.of(world, [world.queries("test")])
    # Pairs of the unseen model lie in a store of their own, so that no W that is reported learned from them.
    bounds, said = upper.upper_bound(world, [both], asked, maps, learned)
    own, W = asked_of(asked, MODELS[1]), Projection.load(own_file(f"{COSFACE}-b"))
    ranking = rankings(world, asked, {COSFACE: W})[COSFACE].subset(own)
    group = Group(upper.GROUP, asked.photos[own], {"domain": "upper"})
    bounds += measure.compared(group, {COSFACE: ranking}, [COSFACE], [])[0]
    said = [s for s in said if not s.startswith(f"Upper bound of {COSFACE}:")]
    return replace(report, figures=[*report.figures, *bounds], caveats=[*report.caveats, *said])


def ablate(plan: Plan) -> Report:
    """Train the paper's variants on model a's pairs by one recipe."""
    options = ablating.AblateOptions(
        what=plan.ablations, rank=plan.rank, layers=(1, 2), steps=plan.ablation_steps
    )
    return ablating.ablate(WORLD, options).report


# --- maps of each model from equally many pairs ------------------------------------------------------------


def own_file(name: str) -> Path:
    """Return where a map of one model's own pairs lies."""
    return OWN / f"{name}.safetensors"


def only(store: Path, model: str, originals: set[str] | None = None) -> Collection:
    """Open a store as if it held one model's translations alone, in training of some originals alone."""
    seen = Collection.open(store)
    translated = seen.role == "translation"
    left_out = translated & (seen.named_model != model)
    if originals is not None:
        left_out |= translated & (seen.split == "train") & ~np.isin(seen.identity, list(originals))
    seen.ok = seen.ok & ~left_out
    return seen


def halves(seed: int) -> tuple[set[str], set[str]]:
    """Return the training originals in two random halves."""
    both = Collection.open(BOTH)
    names = np.unique(both.identity[both.pairs("train")[0]].astype(str))
    mixed = np.random.default_rng(seed).permutation(names)
    return set(mixed[::2].tolist()), set(mixed[1::2].tolist())


def fit_own(plan: Plan) -> Report:
    """Fit gnull and CosFace on each model's own pairs of the same originals under the same prompts.

    As controls, of one model: gnull on disjoint halves of the originals and on simulated translations, and
    CosFace from another seed.
    """
    OWN.mkdir(exist_ok=True)
    chosen = Projection.load(map_file("gnull"))
    closed = SolveOptions.of("gnull", chosen.rank, lam=chosen.knobs["lam"])
    simulated = SolveOptions.of("gnull", chosen.rank, lam=chosen.knobs["lam"], simulate=True)
    one, other = halves(0)
    wanted: dict[str, tuple[str, set[str] | None, SolveOptions]] = {
        "gnull-a": ("a", None, closed),
        "gnull-b": ("b", None, closed),
        "gnull-a-half": ("a", one, closed),
        "gnull-a-other-half": ("a", other, closed),
        "gnull-b-other-half": ("b", other, closed),
        "gnull-simulated": ("a", None, simulated),
    }
    for name, model, seed in (
        (f"{COSFACE}-a", "a", 0),
        (f"{COSFACE}-b", "b", 0),
        (f"{COSFACE}-a-seed", "a", 1),
    ):
        options = SolveOptions.of(
            "cosface", plan.rank, steps=plan.cosface_steps, weight_init="random", device="cpu", seed=seed
        )
        wanted[name] = (model, None, options)
    for name, (model, originals, options) in wanted.items():
        if not own_file(name).exists():
            solving.fit(only(BOTH, model, originals), options)[0].save(own_file(name))
    return _report("Maps of each model", _overlaps(closed, plan.repeats))


def _overlaps(options: SolveOptions, repeats: int) -> list[Figure]:
    """Return how far the column spaces of two maps of disjoint originals agree: of one model, and of two."""
    found: dict[str, list[float]] = {"a × a": [], "a × b": [], "random subspaces": []}
    for seed in range(repeats):
        one, other = halves(seed)
        whose = (("a", one), ("a", other), ("b", other))
        a, same, unlike = (
            map_spectrum(solving.fit(only(BOTH, model, half), options)[0].query_map) for model, half in whose
        )
        found["a × a"].append(overlap(principal_angles(a, same)))
        found["a × b"].append(overlap(principal_angles(a, unlike)))
        found["random subspaces"].append(chance_overlap(a, same))
    note = f"‖QᵀQ‖²/m of gnull on disjoint halves of the originals; the range over {repeats} halvings"
    return [
        Figure(
            OVERLAP,
            float(np.mean(values)),
            subject,
            "method" if subject == "a × b" else "control",
            OVERLAP,
            "fraction",
            (min(values), max(values)),
            repeats,
            note,
        )
        for subject, values in found.items()
    ]


def compare(method: str, plan: Plan) -> Report:
    """Compare the spectra and column spaces of the maps of each model, beside what the controls give."""
    names = {
        "gnull": ("a", "b", "a-half", "a-other-half", "b-other-half", "simulated"),
        COSFACE: ("a", "b", "a-seed"),
    }[method]
    files = [own_file(f"{method}-{name}") for name in names]
    if method == COSFACE:
        return comparing.compare(files)
    chosen = Projection.load(map_file("gnull"))
    again = refitting.RefitOptions(
        "gnull", chosen.rank, {"lam": chosen.knobs["lam"]}, repeats=max(2, plan.repeats)
    )
    return comparing.compare(files, store=BOTH, refit=again)


# --- paired differences ------------------------------------------------------------------------------------


def asked_of(asked: Asked, model: str) -> np.ndarray:
    """Tell which queries a model made, (q,) bool."""
    chosen: np.ndarray = asked.column("named_model") == model
    return chosen


def paired(names: list[str], first: str, plan: Plan) -> Report:
    """Return differences between maps that were asked for the same queries, with intervals over photos."""
    world = Collection.open(WORLD)
    asked = Asked.of(world, [world.queries("test")])
    maps = {name: Projection.load(map_file(name)) for name in names}
    wide, _, _ = solving.fit(world, SolveOptions.of("gnull", _rank(world, plan)))
    high, low = f"gnull @{wide.rank}", f"gnull @{min(plan.low_rank, wide.rank)}"
    maps |= {high: wide, low: wide.truncated(min(plan.low_rank, wide.rank))}
    maps |= {f"{m} of {x}": Projection.load(own_file(f"{m}-{x}")) for m in ("gnull", COSFACE) for x in MODELS}
    controls = {"raw": measure.fit_controls(world, wide.rank)["raw"]}
    found = rankings(world, asked, {**controls, **maps})
    figures: list[Figure] = []
    for place, model in zip((SEEN, UNSEEN), MODELS, strict=True):
        group = _group(asked, asked_of(asked, model), place)
        own = {name: ranking.subset(asked_of(asked, model)) for name, ranking in found.items()}
        for name in names:
            figures += _gain(group, own, name, "raw")
        for name in (n for n in (COSFACE, STARTED) if n in own):
            figures += _gain(group, own, name, "gnull")
        if "analytic" in names:
            figures += _gain(group, own, "analytic", first)
        figures += _gain(group, own, high, low)
        if place == UNSEEN:
            for method in ("gnull", COSFACE):
                figures += _gain(group, own, f"{method} of b", f"{method} of a")
        strengths = asked.column("strength")[asked_of(asked, model)]
        figures += [_lost(group, own[name], strengths, name) for name in dict.fromkeys(("raw", first))]
    return _report(PAIRED, figures)


def paired_at(place: str) -> str:
    """Return what the group of differences on a model's translations is called."""
    return f"{PAIRED}, {place}"


def _rank(world: Collection, plan: Plan) -> int:
    return min(plan.rank, world.store.layout.dim)


def _group(asked: Asked, chosen: np.ndarray, name: str) -> Group:
    return Group(paired_at(name), asked.photos[chosen])


def _gain(group: Group, found: Mapping[str, Ranking], name: str, rival: str) -> Iterator[Figure]:
    """Yield how much more mAP a map has than a rival on the same queries."""
    for figure in measure.compared(group, found, [name], [rival])[0]:
        if figure.name == "gain over best control":
            yield replace(figure, name=f"gain over {rival}", note="of mAP, on the same queries")


def _lost(group: Group, ranking: Ranking, strengths: np.ndarray, name: str) -> Figure:
    """Return by how much mAP falls from the weakest to the strongest translations of the same photos."""
    levels = np.unique(strengths)
    sides = []
    for level in (levels[0], levels[-1]):
        here = strengths == level
        sides.append(dict(zip(group.photos[here].tolist(), ranking.ap[here].tolist(), strict=True)))
    photos = sorted(sides[0].keys() & sides[1].keys())
    values = np.array([sides[0][p] - sides[1][p] for p in photos])
    own = Group(group.name, np.array(photos, object))
    what = f"mAP lost from strength {levels[0]:g} to {levels[-1]:g}"
    return measure.figure(what, values, name, "control" if name == "raw" else "method", own)


def _report(title: str, figures: list[Figure], settings: dict[str, Any] | None = None) -> Report:
    return Report("benchmark", title, [], {}, settings or {}, figures=figures, **results.stamp())
