"""What the paper's claims look like in the miniature world: decided by intervals, whichever way they fall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from benchmarks import world_maps as maps
from benchmarks import world_models as models
from cli import ablation_tables
from cli.likeness import BY_CONSTRUCTION, cosine
from cli.theory_lemma import EMBED
from latentstore.results import CHOSEN, Figure, Report

Outcome = Literal["holds", "does not hold", "cannot be told"]
Interval = tuple[float, float] | None
Reports = Mapping[str, Report]
"""Stage -> its report, as ``benchmarks.world`` makes them."""
_COUNTED: Mapping[Outcome, str] = {
    "holds": "hold",
    "does not hold": "do not hold",
    "cannot be told": "cannot be told by these figures",
}


@dataclass(frozen=True)
class Finding:
    """A claim, what became of it here, and the figures that decided.

    Attributes
    ----------
    claim : str
    outcome : {"holds", "does not hold", "cannot be told"}
    because : str
    """

    claim: str
    outcome: Outcome
    because: str

    @property
    def sentence(self) -> str:
        """The finding in one paragraph."""
        return f"{self.claim}: {self.outcome}. {self.because}"

    def to_dict(self) -> dict[str, str]:
        """Return it as plain JSON types."""
        return asdict(self)


# --- rules -------------------------------------------------------------------------------------------------


def above(interval: Interval, level: float = 0.0) -> Outcome:
    """Decide whether a figure lies above a level: by its whole interval, or not at all."""
    if interval is None:
        return "cannot be told"
    low, high = interval
    return "holds" if low > level else "does not hold" if high < level else "cannot be told"


def below(interval: Interval, level: float = 0.0) -> Outcome:
    """Decide whether a figure lies below a level."""
    return above(None if interval is None else (-interval[1], -interval[0]), -level)


def apart(higher: Interval, lower: Interval) -> Outcome:
    """Decide whether one figure lies above another, of which no difference was taken: by both intervals."""
    if higher is None or lower is None:
        return "cannot be told"
    return "holds" if higher[0] > lower[1] else "does not hold" if higher[1] < lower[0] else "cannot be told"


def every(*outcomes: Outcome) -> Outcome:
    """Join the parts of a claim: it holds where all do, and does not where one does not."""
    if "does not hold" in outcomes:
        return "does not hold"
    return "holds" if outcomes and all(o == "holds" for o in outcomes) else "cannot be told"


def observed(value: float, band: Interval, note: str = "") -> Outcome:
    """Decide Observation 1: inside the random band, or where 1 is by construction, nothing can be told."""
    if band is None or note.startswith(BY_CONSTRUCTION):
        return "cannot be told"
    low, high = band
    return "holds" if value > high else "does not hold" if value < low else "cannot be told"


def unlike(pair: float, turned: float) -> Outcome:
    """Decide whether two codes are less alike than one code and itself turned around, which is the same."""
    return "holds" if abs(pair) < abs(turned) / 2 else "cannot be told"


# --- findings ----------------------------------------------------------------------------------------------


def find(reports: Reports) -> list[Finding]:
    """Return the findings that the reports' figures decide, the paper's main claims first."""
    first = str(reports["headline"].settings[CHOSEN])
    return [
        *_seen(reports, first),
        *_unseen(reports, first),
        *_spectra(reports),
        *_theorems(reports["residuals"]),
        *_without_pairs(reports["paired"], first),
        *_kinds_of_maps(reports["paired"], reports["sweep-svd"].settings["chosen rank"]),
        *(_ablations(reports["ablation"]) if "ablation" in reports else ()),
        *_strengths(reports["paired"]),
        *_told_apart(reports["apart"]),
        *_autoencoders(reports["table 4"]),
        *_promises(reports["verdicts"]),
    ]


def lead(findings: Sequence[Finding]) -> str:
    """Return how many claims hold here, do not, and cannot be told."""
    count = Counter(f.outcome for f in findings)
    told = ", ".join(f"{count[outcome]} {words}" for outcome, words in _COUNTED.items())
    return f"Of {len(findings)} claims about W, on translations by two networks trained for this: {told}."


def _seen(reports: Reports, first: str) -> Iterator[Finding]:
    evaluation, paired = reports["evaluation"], reports["paired"]
    for kind in ("seen", "unseen"):
        raw, chance = (_by_domain(evaluation, "mAP", name, kind) for name in ("raw", "chance"))
        if raw and chance:
            yield Finding(
                f"Embeddings of a VAE find originals of the {kind} model better than chance",
                above(raw.interval, chance.value),
                f"mAP of the raw cosine is {_percent(raw)}; a random order has {100 * chance.value:.1f} %.",
            )
    yield from _decided(
        "A linear W finds more than the raw embeddings on the model that it learned from",
        _gain(paired, first, "raw", maps.SEEN),
        f"{first}, chosen on validation, gains {{}} of mAP.",
    )
    yield from _decided(
        "There it finds more than every control, which learned from no pairs",
        control := _by_domain(evaluation, "gain over best control", first, "seen"),
        control.note if control else "",
    )


def _unseen(reports: Reports, first: str) -> Iterator[Finding]:
    evaluation, paired = reports["evaluation"], reports["paired"]
    yield from _decided(
        "What W learned from one model carries over to another, unseen one",
        _gain(paired, first, "raw", maps.UNSEEN),
        f"On it {first} gains {{}} of mAP over the raw embeddings.",
    )
    yield from _decided(
        "On the unseen model it finds more than every control, which learned from no pairs",
        control := _by_domain(evaluation, "gain over best control", first, "unseen"),
        control.note if control else "",
    )
    for method in ("gnull", maps.COSFACE):
        yield from _decided(
            f"On the unseen model a W of {method} that learned from that very model finds more",
            _gain(paired, f"{method} of b", f"{method} of a", maps.UNSEEN),
            "From as many pairs of the same originals it has {} of mAP more.",
        )


def _spectra(reports: Reports) -> Iterator[Finding]:
    for method in (maps.COSFACE, "gnull"):
        found = reports[f"compare-{method}"].find("cos φ")
        by_group = {f.group: f for f in found if f.role == "method"}
        pair = by_group[f"{method}-a × {method}-b"]
        band = next(f.interval for f in found if f.role == "control" and f.group == pair.group)
        own = (f"{method}-a × {method}-a-seed", f"{method}-a-half × {method}-a-other-half")
        low, high = band or (0.0, 1.0)
        told = [f"cos φ is {cosine(pair.value)}"]
        told += [f"of two random matrices of that shape {cosine(low)} to {cosine(high)}"]
        told += [f"of one model ({g}) {cosine(by_group[g].value)}" for g in own if g in by_group]
        yield Finding(
            f"Observation 1: singular values of the two models' W ({method}) agree more than chance",
            observed(pair.value, band, pair.note),
            "; ".join(told) + ".",
        )
    spaces = {f.subject: f for f in reports["own"].figures if f.name == maps.OVERLAP}
    two, one, chance = (spaces[name] for name in ("a × b", "a × a", "random subspaces"))
    said = (
        f"Of gnull on disjoint halves of the originals, column spaces of two models share {_percent(two)}, "
        f"those of one model {_percent(one)} (ranges over {one.n} halvings), random ones {_percent(chance)}."
    )
    more = above(two.interval, chance.value)
    yield Finding("Column spaces of both models' W share more than random ones", more, said)
    yield Finding("They share less than those of one model's W", apart(one.interval, two.interval), said)


def _theorems(report: Report) -> Iterator[Finding]:
    claims = {
        "a": "Theorem 1: test pairs of the seen model move less through W",
        "b": "Theorem 2: pairs of the unseen model move less through W",
    }
    for name, what in (("svd", "the literal null space"), ("gnull", "gnull")):
        for model, claim in claims.items():
            group = f"{models.RESIDUAL}, test pairs of {model}"
            ratio = _only(report, models.LOG_RATIO, name, group)
            plain = _only(report, "held-out residual", name, group)
            if ratio and plain and ratio.interval:
                low, high = ratio.interval
                yield Finding(
                    f"{claim} ({what}) than through a random subspace",
                    below(ratio.interval),
                    f"‖TW‖/‖(O−μ)W‖ is {plain.value:.3g}; pair by pair its logarithm lies {ratio.value:+.2f} "
                    f"({low:+.2f} to {high:+.2f}) from the random subspace's.",
                )


def _without_pairs(paired: Report, first: str) -> Iterator[Finding]:
    for place in (maps.SEEN, maps.UNSEEN):
        yield from _decided(
            f"The analytic map, which needs no pairs, finds more than W from pairs ({first}) on the {place}",
            _gain(paired, "analytic", first, place),
            "It has {} of mAP more.",
        )


def _kinds_of_maps(paired: Report, chosen: int) -> Iterator[Finding]:
    """Yield what kinds of W find; ``chosen`` is svd's rank on validation, which stands at the plan's."""
    for place in (maps.SEEN, maps.UNSEEN):
        yield from _decided(
            f"Lemma 2's literal null space (svd) finds more than the raw embeddings on the {place}",
            _gain(paired, "svd", "raw", place),
            f"It gains {{}} of mAP; validation would choose rank {chosen} for it.",
        )
        for name in (maps.COSFACE, maps.STARTED):
            yield from _decided(
                f"W by training ({name}) finds more than W in closed form (gnull) on the {place}",
                _gain(paired, name, "gnull", place),
                "It has {} of mAP more.",
            )
        here = [f for f in paired.figures if f.group == maps.paired_at(place)]
        higher = next((f for f in here if f.name.startswith("gain over gnull @")), None)
        if higher:
            columns = higher.name.rpartition("@")[2]
            yield from _decided(
                f"A higher rank finds more on the {place}",
                higher,
                f"{higher.subject} has {{}} of mAP more than its first {columns} columns.",
            )


def _ablations(report: Report) -> Iterator[Finding]:
    rank = report.settings["rank"]
    linear, deep = f"cosface, linear @{rank}", f"cosface, mlp of 2 layers @{rank}"
    gaps = {f.subject: f for f in report.find("seen less unseen mAP")}
    if linear in gaps and deep in gaps:
        yield Finding(
            "A deeper map loses more than a linear one from the seen model to the unseen one",
            apart(gaps[deep].interval, gaps[linear].interval),
            f"Two layers lose {_points(gaps[deep])} of mAP, W itself {_points(gaps[linear])}.",
        )
    for loss in ("softmax", "circle"):
        for group in (ablation_tables.SEEN, ablation_tables.UNSEEN):
            own, rival = (_only(report, "mAP", name, group) for name in (linear, f"{loss}, linear @{rank}"))
            if own and rival:
                yield Finding(
                    f"CosFace finds more than {loss} on {group}",
                    apart(own.interval, rival.interval),
                    f"mAP is {_percent(own)} to {_percent(rival)}.",
                )


def _strengths(paired: Report) -> Iterator[Finding]:
    for place in (maps.SEEN, maps.UNSEEN):
        for f in paired.figures:
            if f.name.startswith("mAP lost") and f.group == maps.paired_at(place):
                yield from _decided(
                    f"Stronger translations by the {place} are harder to trace ({f.subject})",
                    f,
                    f"mAP falls by {{}} {f.name.removeprefix('mAP lost ')}.",
                )


def _told_apart(report: Report) -> Iterator[Finding]:
    told = {f.role: f for f in report.find(models.ACCURACY, group=models.TOLD_APART)}
    ours, permuted = told["method"], told["control"]
    yield Finding(
        "A small classifier tells the two models' pictures apart",
        every(above(ours.interval, told["chance"].value), apart(ours.interval, permuted.interval)),
        f"On test originals {_percent(ours)} are told right, by labels drawn for each photo "
        f"{_percent(permuted)}; chance is 50 % (the paper: 95.9 % among seven models).",
    )


def _autoencoders(report: Report) -> Iterator[Finding]:
    group = f"{models.TABLE_4}: {models.VAE.format('a')} × {models.VAE.format('b')}"
    found = {f.role: f for f in report.find(EMBED, group=group) if "unrelated" not in f.subject}
    if found.keys() >= {"method", "control"}:
        pair, turned = found["method"].value, found["control"].value
        yield Finding(
            "Table 4: a low cosine of embeddings shows that the two autoencoders differ",
            unlike(pair, turned),
            f"Theirs is {pair:.3f}; that of one with itself, its channels moved on by one (the same code to "
            f"a linear map), {turned:.3f}.",
        )
        return
    yield Finding(
        "Table 4: a low cosine of embeddings shows that the two autoencoders differ",
        "cannot be told",
        "Their latents have different shapes, so place k of one is not place k of the other, and no cosine "
        "of weights or embeddings means anything. They are different networks by that alone.",
    )


def _promises(report: Report) -> Iterator[Finding]:
    """Yield whether pictures without an original here are called a match less often than was promised."""
    for where in (models.GONE, models.BARE):
        for f in report.find(models.CALLED_MATCH, group=f"{models.VERDICTS}, {where}"):
            promised = _only(report, models.PROMISED, f.subject, f.group)
            if promised:
                yield Finding(
                    f"match ({f.subject}) calls fewer strangers a match than it promises ({where})",
                    below(f.interval, promised.value),
                    f"{_percent(f)} are called so; {100 * promised.value:.1f} % were promised.",
                )
            elif f.value == 0:
                yield Finding(
                    f"match ({f.subject}) calls fewer strangers a match than it promises ({where})",
                    "cannot be told",
                    f"None of {f.n} is called so, and so few say little of a rate near 1 %.",
                )


# --- figures and words -------------------------------------------------------------------------------------


def _decided(claim: str, f: Figure | None, because: str) -> Iterator[Finding]:
    """Yield the finding that a difference decides by lying above 0; ``{}`` stands for it in points."""
    if f is not None:
        yield Finding(claim, above(f.interval), because.replace("{}", _points(f)))


def _only(report: Report, name: str, subject: str, group: str) -> Figure | None:
    return next(iter(report.find(name, subject=subject, group=group)), None)


def _by_domain(report: Report, name: str, subject: str, domain: str) -> Figure | None:
    """Return the figure over all strengths of the seen or the unseen models."""
    found = report.find(name, subject=subject)
    return next((f for f in found if f.axes.get("domain") == domain and "strength" not in f.axes), None)


def _gain(report: Report, subject: str, rival: str, place: str) -> Figure | None:
    return _only(report, f"gain over {rival}", subject, maps.paired_at(place))


def _percent(f: Figure) -> str:
    return f"{100 * f.value:.1f} %{_span(f, '.1f')}"


def _points(f: Figure) -> str:
    return f"{100 * f.value:+.1f} points{_span(f, '+.1f')}"


def _span(f: Figure, form: str) -> str:
    if f.interval is None:
        return ""
    low, high = (format(100 * v, form) for v in f.interval)
    return f" ({low} to {high})"
