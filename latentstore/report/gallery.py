"""The matches: a query, its ranked candidates, its verdict, and which pictures may stand in the page."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from latentstore.heat import NOTE
from latentstore.report import text
from latentstore.results import Candidate, Match, Verdict

PICTURE_BYTES = 3_500_000  # of thumbnails in one page; what is over it becomes a placeholder
PLOT_BYTES = 3_500_000
CANDIDATES = 10
NEAR = 5
HEAT = f"The coloured picture shows where in the query the agreement with a candidate sits. {NOTE}"
_PNG = "data:image/png;base64,"
_MAGIC = {"data:image/jpeg;base64,": b"\xff\xd8\xff", _PNG: b"\x89PNG\r\n\x1a\n"}
_DECISIONS = {
    "match": ("right", "Match: its origin is very probably here"),
    "doubtful": ("unknown", "Doubtful: its origin may be here"),
    "no origin here": ("none", "No origin here"),
}


@dataclass(frozen=True)
class Picture:
    """A candidate as shown."""

    rank: int
    path: str
    identity: str
    score: str
    verdict: str
    thumbnail: str
    heat: str
    near: list[str]
    more_near: int


@dataclass(frozen=True)
class Judged:
    """A verdict as shown: its words, and what they are worth as (question, answer)."""

    tone: str
    words: str
    rows: list[tuple[str, str]]
    note: str


@dataclass(frozen=True)
class Found:
    """A match as shown; on a page of matches query and first candidate stand ``large``, side by side."""

    query: str
    group: str
    thumbnail: str
    margin: str
    verdict: str
    outcome: str
    judged: Judged | None
    candidates: list[Picture]
    left_out: int
    large: bool


@dataclass
class Budget:
    """What the page may still take: bytes of pictures and of plots, and plots' numbers; what it could not."""

    left: int = PICTURE_BYTES
    left_out: int = 0
    taken: int = 0
    plots: int = PLOT_BYTES
    plots_taken: int = 0
    numbers: bool = True

    def take(self, uri: str) -> str:
        """Return the thumbnail when it is a JPEG or PNG data URI that still fits, else nothing."""
        if not is_picture(uri):
            return ""
        if len(uri) > self.left:
            self.left_out += 1
            return ""
        self.left -= len(uri)
        self.taken += len(uri)
        return uri

    def draw(self, make: Callable[[], Markup | None]) -> Markup | None:
        """Return a plot where it still fits; when none does any more, none is drawn."""
        if self.plots <= 0:
            return None
        made = make()
        size = 0 if made is None else len(made.encode())
        self.plots -= size
        if self.plots <= 0:
            return None
        self.plots_taken += size
        return made


def is_picture(uri: str) -> bool:
    """Return whether the text is a ``data:`` URI of a JPEG or PNG in valid base64, and nothing else."""
    for prefix, magic in _MAGIC.items():
        if uri.startswith(prefix):
            try:
                raw = base64.b64decode(uri[len(prefix) :], validate=True)
            except (binascii.Error, ValueError):
                return False
            return raw.startswith(magic)
    return False


def found(match: Match, budget: Budget, *, large: bool = False) -> Found:
    """Return the match as shown, its pictures taken from the budget."""
    candidates = match.candidates[:CANDIDATES]
    thumbnail = budget.take(match.thumbnail)
    verdict, outcome = _outcome(match)
    return Found(
        query=match.query,
        group=match.group,
        thumbnail=thumbnail,
        margin="" if match.margin is None else text.number(match.margin),
        verdict=verdict,
        outcome="" if verdict == "unknown" and match.verdict is not None else outcome,
        judged=None if match.verdict is None else _judged(match.verdict),
        candidates=[_picture(_rank(i, c, match), c, budget) for i, c in enumerate(candidates, start=1)],
        left_out=len(match.candidates) - len(candidates),
        large=large,
    )


def _rank(place: int, candidate: Candidate, match: Match) -> int:
    """Return a candidate's rank: its place, but for an origin that stands last though it ranked behind."""
    last = place == len(match.candidates)
    return match.rank if last and candidate.correct and match.rank else place


def _judged(verdict: Verdict) -> Judged:
    """Return the decision with its p-value, its false alarms, and what it detects, side by side."""
    tone, words = _DECISIONS.get(verdict.decision, ("unknown", str(verdict.decision)))
    # Of "no origin here" the rates are those of the bar that it missed.
    called = "a match" if verdict.decision == "match" else "doubtful or a match"
    rows = [
        (
            "Pictures without an origin here that score as high",
            f"{_share(verdict.p)} (p = {text.number(float(f'{verdict.p:.2g}'))})",
        ),
        (
            f"False alarms: without an origin here, yet called {called}",
            f"{_share(verdict.false_alarm)} {_span(verdict.false_alarm_interval)}".strip(),
        ),
    ]
    if verdict.detection is not None:
        of = f", of {verdict.detection_of}" if verdict.detection_of else ""
        share = f"{_share(verdict.detection)} {_span(verdict.detection_interval)}".strip()
        question = "Detection: so many in 100 translations of pictures that are here have their origin "
        question += f"first and score high enough to be called {called}"
        rows.append((question, share + of))
    rows.append(("Score of the first candidate, as calibrated", _score(verdict.score)))
    if verdict.n:
        rows.append(("Calibrated on", f"{text.number(verdict.n)} pictures"))
    return Judged(tone, words, rows, verdict.note)


def _share(value: float) -> str:
    return f"{text.percent(value, fine=True)} %"


def _span(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{text.percent(interval[0])}, {text.percent(interval[1])}]"


def _outcome(match: Match) -> tuple[str, str]:
    """Return right, wrong or unknown, with the words for it."""
    if match.rank is not None:
        right = match.rank == 1
        words = "Origin ranked first" if right else f"Origin ranked {text.number(match.rank)}, not first"
        return ("right" if right else "wrong", words)
    known = [c.correct for c in match.candidates]
    if known and known[0]:
        return "right", "Origin ranked first"
    if any(known):
        return "wrong", f"Origin ranked {known.index(True) + 1}, not first"
    if known and all(k is False for k in known):
        return "wrong", "Origin not among these candidates"
    return "unknown", "Origin not known"


def _picture(rank: int, candidate: Candidate, budget: Budget) -> Picture:
    verdict = {True: "right", False: "wrong", None: "unknown"}[candidate.correct]
    return Picture(
        rank=rank,
        path=candidate.path,
        identity=candidate.identity,
        score=_score(candidate.score),
        verdict=verdict,
        thumbnail=budget.take(candidate.thumbnail),
        heat=budget.take(candidate.heat) if candidate.heat.startswith(_PNG) else "",
        near=candidate.near[:NEAR],
        more_near=max(0, len(candidate.near) - NEAR),
    )


def _score(score: float) -> str:
    """Return a score to three decimals, so that the scores of a row compare at a glance."""
    if not math.isfinite(score) or abs(score) >= 1000:
        return text.number(score)
    return f"{score:.3f}".replace("-", "−")
