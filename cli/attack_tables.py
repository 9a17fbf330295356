"""The figures of attacked queries: rows of a table, and figures, curves, CSV and plain words made of them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cli import measure
from cli.render import counted, percent
from latentstore.attacks import FAMILIES, Attack
from latentstore.results import Curve, Figure, Report, Role
from solvers.metrics import Ranking, bootstrap, chance_map, paired_bootstrap
from solvers.projection import Projection

UNATTACKED = "not attacked"
NOTHING = "none"
"""The family of a picture that is not attacked."""
PCA = "PCA-whitened"
BEST_PCA = "PCA-whitened, best"
"""The best of all ranks and exponents on the very queries that it is measured on."""
COLUMNS = (
    *("attack", "intensity", "group", "subject", "role", "mAP", "mAP low", "mAP high", "Acc", "Acc low"),
    *("Acc high", "difference", "difference low", "difference high", "n", "note"),
)
Interval = tuple[float, float]
Rankings = Mapping[tuple[str, int], Ranking]
"""Subject and place among the steps → the ranking."""


@dataclass(frozen=True)
class Step:
    """One attack of one intensity; ``intensity`` is None where nothing is attacked."""

    family: str
    intensity: float | None
    attack: Attack

    @property
    def axes(self) -> dict[str, str | float]:
        """Where its figures stand."""
        own: dict[str, str | float] = {"attack": self.family}
        return own if self.intensity is None else own | {"intensity": self.intensity}


@dataclass(frozen=True)
class Row:
    """One subject's figures on one step's queries, fractions of 1; ``difference`` is to no attack, of mAP."""

    step: Step
    subject: str
    role: Role
    map: float
    interval: Interval | None
    acc: float
    acc_interval: Interval | None
    difference: float
    difference_interval: Interval | None
    n: int
    note: str = ""


@dataclass(frozen=True)
class Rival:
    """A W beside the best control of one step: the control's name, W's gain in mAP, and in words."""

    step: Step
    subject: str
    control: str
    gain: float
    interval: Interval | None
    verdict: str


@dataclass(frozen=True)
class Attacked:
    """What was measured: a row a step and subject, every W's rivals, and the report."""

    rows: list[Row]
    rivals: list[Rival]
    report: Report


def tabulated(
    report: Report,
    steps: Sequence[Step],
    found: Rankings,
    methods: Mapping[str, Projection],
    photos: np.ndarray,
) -> Attacked:
    """Return a report with its summary, figures and curves, and the rows that these were made of.

    Parameters
    ----------
    report : Report
        With all but those.
    steps : sequence of Step
        The first one is no attack.
    found : mapping
        (subject, place among the steps) → its ranking, all of the same queries and references.
    methods : mapping
        The subjects that are no controls.
    photos : (q,) array
        The photo behind each query: intervals resample these.
    """
    own = {key: ranking for key, ranking in found.items() if key[0] in methods}
    beside, best = best_pca({key: r for key, r in found.items() if key not in own}, len(steps))
    made = rows(steps, own, beside, photos, best)
    # A W that is a control itself has nothing to beat.
    learned = {key: r for key, r in own.items() if methods[key[0]].method not in measure.THEMSELVES}
    against = rivals(steps, learned, beside, photos)
    data = report.data
    lead = (
        f"{data['test queries']:,} {data['attacked']} of {counted(data['test photos'], 'photo')}, attacked "
        f"in {counted(len(steps) - 1, 'way')}, were searched among "
        f"{counted(data['references ranked'], 'reference')}."
    )
    full = replace(
        report,
        summary=summary(made, against, lead, len(set(photos))),
        figures=figures(made, against, data["references ranked"]),
        curves=curves(made),
    )
    return Attacked(made, against, full)


def best_pca(found: Rankings, n_steps: int) -> tuple[Rankings, dict[int, str]]:
    """Return controls with one PCA-whitening, each step's best, in the place of all; and which that is."""
    kept = {key: ranking for key, ranking in found.items() if not key[0].startswith(PCA)}
    ladder = sorted({name for name, _ in found if name.startswith(PCA)})
    chosen = {at: max(ladder, key=lambda name: found[name, at].map) for at in range(n_steps) if ladder}
    return kept | {(BEST_PCA, at): found[name, at] for at, name in chosen.items()}, chosen


def rows(
    steps: Sequence[Step], own: Rankings, beside: Rankings, photos: np.ndarray, best: Mapping[int, str]
) -> list[Row]:
    """Return a row for every step and subject.

    Parameters
    ----------
    steps : sequence of Step
        The first one is no attack.
    own, beside : mapping
        (subject, place among the steps) → its ranking, all of the same queries; of every W, and of controls.
    photos : (q,) array
        The photo behind each query: intervals resample these.
    best : mapping
        Place → which PCA-whitening was the best there.
    """
    out = []
    several = len(set(photos)) > 1
    found = {**own, **beside}
    for at, step in enumerate(steps):
        for subject in dict.fromkeys(name for name, _ in found):
            ranking, before = found[subject, at], found[subject, 0]
            role: Role = "method" if (subject, at) in own else "control"
            out.append(
                Row(
                    step,
                    subject,
                    role,
                    ranking.map,
                    bootstrap(ranking.ap, photos) if several else None,
                    ranking.acc,
                    bootstrap(ranking.hit1.astype(float), photos) if several else None,
                    ranking.map - before.map,
                    paired_bootstrap(ranking.ap, before.ap, photos) if several else None,
                    len(ranking.ap),
                    best[at] if subject == BEST_PCA else "",
                )
            )
    return out


def rivals(steps: Sequence[Step], own: Rankings, beside: Rankings, photos: np.ndarray) -> list[Rival]:
    """Set every W beside the best control of each step; parameters as of :func:`rows`."""
    controls, n = list(dict.fromkeys(name for name, _ in beside)), len(set(photos))
    out = []
    for at, step in enumerate(steps):
        best = max(controls, key=lambda name: beside[name, at].map)
        control = beside[best, at]
        for name in dict.fromkeys(name for name, _ in own):
            ranking = own[name, at]
            gain = ranking.map - control.map
            interval = paired_bootstrap(ranking.ap, control.ap, photos) if n > 1 else None
            said = measure.verdict(name, step.attack.name, gain, interval, best, n_groups=n)
            out.append(Rival(step, name, best, gain, interval, said))
    return out


def figures(rows: Sequence[Row], rivals: Sequence[Rival], n_references: int) -> list[Figure]:
    """Return mAP, Acc and the difference to no attack of every row, the gains of every W, and chance."""
    out: list[Figure] = []
    for r in rows:
        where: dict[str, Any] = {"group": r.step.attack.name, "unit": "fraction", "n": r.n}
        where |= {"note": r.note, "axes": r.step.axes}
        out.append(Figure("mAP", r.map, r.subject, r.role, interval=r.interval, **where))
        out.append(Figure("Acc", r.acc, r.subject, r.role, interval=r.acc_interval, **where))
        if r.step.intensity is not None:
            change = ("difference to no attack", r.difference, r.subject, r.role)
            out.append(Figure(*change, interval=r.difference_interval, **where))
    n = {r.step.attack.name: r.n for r in rows}
    for rival in rivals:
        out.append(
            Figure(
                "gain over best control",
                rival.gain,
                rival.subject,
                "method",
                rival.step.attack.name,
                "fraction",
                rival.interval,
                n[rival.step.attack.name],
                rival.verdict,
                rival.step.axes,
            )
        )
    out.append(Figure("mAP", chance_map(n_references), "chance", "chance", unit="fraction"))
    return out


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Return a plot for each kind of attack, a line for each subject, from no attack on to the hardest."""
    families = dict.fromkeys(r.step.family for r in rows if r.step.intensity is not None)
    subjects = {r.subject: r.role for r in rows}
    out = []
    for family in families:
        facts = FAMILIES[family]
        for subject, role in subjects.items():
            own = [r for r in rows if r.subject == subject and r.step.family in (NOTHING, family)]
            x = [facts.neutral if r.step.intensity is None else r.step.intensity for r in own]
            order = np.argsort(x if facts.rises else [-v for v in x])
            bands: dict[str, Any] = {}
            if all(r.interval is not None for r in own):
                bands = {
                    name: [float((own[i].interval or (0, 0))[side]) for i in order]
                    for side, name in enumerate(("low", "high"))
                }
            out.append(
                Curve(
                    f"Under attack: {facts.label}",
                    subject,
                    [x[i] for i in order],
                    [own[i].map for i in order],
                    facts.axis,
                    "mAP",
                    role=role,
                    **bands,
                )
            )
    return out


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line a row; fractions in full, an empty cell where there is nothing."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for r in rows:
            intensity = "" if r.step.intensity is None else f"{r.step.intensity:g}"
            cells = [r.step.family, intensity, r.step.attack.name, r.subject, r.role]
            for value, interval in (
                (r.map, r.interval),
                (r.acc, r.acc_interval),
                (r.difference, r.difference_interval),
            ):
                cells += map(str, (value, *(interval or ("", ""))))
            writer.writerow([*cells, r.n, r.note])


# --- words ------------------------------------------------------------------------------------------------


def intensities(steps: Sequence[Step]) -> dict[str, list[float]]:
    """Return the intensities of each kind, the strongest last."""
    out: dict[str, list[float]] = {}
    for step in steps:
        if step.intensity is not None:
            out.setdefault(step.family, []).append(step.intensity)
    return {family: sorted(values, reverse=not FAMILIES[family].rises) for family, values in out.items()}


def summary(rows: Sequence[Row], rivals: Sequence[Rival], lead: str, n_photos: int) -> list[str]:
    """Return plain sentences: how each W fares in all, then what each kind costs it at its strongest."""
    methods = list(dict.fromkeys(r.subject for r in rows if r.role == "method"))
    by = _told_by(n_photos)
    out = [lead, *(_in_all(name, rivals, by) for name in methods if any(r.subject == name for r in rivals))]
    harmless = []
    for family, values in intensities([r.step for r in rows]).items():
        here = {r.subject: r for r in rows if (r.step.family, r.step.intensity) == (family, values[-1])}
        step = here[methods[0]].step
        if all(r.difference == 0 for r in here.values()):
            harmless.append(step.attack.name)
            continue
        beside = [r for r in rivals if r.step == step]
        costs = "; ".join(f"{name} {_cost(here[name])}" for name in methods)
        said = f"{FAMILIES[family].label}: {step.attack.name} costs, in points of mAP, {costs}"
        out.append(f"{said}{_beside(here[beside[0].control], beside, by) if beside else ''}.")
    if harmless:
        out.append(f"Nothing at all is lost, by any map, under {', '.join(harmless)} (the strongest tried).")
    return out


def _told_by(n_photos: int) -> str:
    """Return what better and worse are told by; of few photographs an interval is too narrow."""
    rough = n_photos < measure.ROUGH
    return f"rough: {counted(n_photos, 'photograph')}" if rough else "by 95 % intervals"


def _in_all(name: str, rivals: Sequence[Rival], by: str) -> str:
    own = [r for r in rivals if r.subject == name and r.step.intensity is not None]
    won = sum(r.interval is not None and r.interval[0] > 0 for r in own)
    lost = sum(r.interval is not None and r.interval[1] < 0 for r in own)
    return (
        f"Of {counted(len(own), 'attack')}, {name} found more than the best control under {won}, less under "
        f"{lost}, and neither under {len(own) - won - lost} ({by})."
    )


def _cost(row: Row) -> str:
    """Return the loss with its interval, and what is left."""
    text = points(-row.difference)
    if row.difference_interval is not None:
        low, high = row.difference_interval
        text += f" [{points(-high)}, {points(-low)}]"
    return f"{text}, to {percent(row.map)} %"


def _beside(control: Row, rivals: Sequence[Rival], by: str) -> str:
    """Return what the best control loses, and which W holds better or worse than it."""
    named = f"{control.subject}: {control.note}" if control.note else control.subject
    text = f"; the best control there ({named}) {_cost(control)}. "
    if any(r.interval is None for r in rivals):
        return f"{text}Too few photos to tell which holds better"
    better = [r.subject for r in rivals if r.interval is not None and r.interval[0] > 0]
    worse = [r.subject for r in rivals if r.interval is not None and r.interval[1] < 0]
    level = [r.subject for r in rivals if r.subject not in (*better, *worse)]
    words = {"better than it": better, "worse than it": worse, "neither better nor worse": level}
    said = [f"{' and '.join(names)} held {how}" for how, names in words.items() if names]
    return f"{text}{'; '.join(said)} ({by})"


def points(value: float, sign: str = "") -> str:
    """Return a fraction in points of a hundred, to one decimal; never ``-0.0``."""
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}"
