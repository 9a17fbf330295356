"""The matches: a query, its ranked candidates, and which thumbnails may stand in the page."""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass

from latentstore.report import text
from latentstore.results import Candidate, Match

PICTURE_BYTES = 3_500_000  # of thumbnails in one page; what is over it becomes a placeholder
CANDIDATES = 10
_MAGIC = {"data:image/jpeg;base64,": b"\xff\xd8\xff", "data:image/png;base64,": b"\x89PNG\r\n\x1a\n"}


@dataclass(frozen=True)
class Picture:
    """A candidate as shown."""

    rank: int
    path: str
    identity: str
    score: str
    verdict: str
    thumbnail: str


@dataclass(frozen=True)
class Found:
    """A match as shown."""

    query: str
    group: str
    thumbnail: str
    margin: str
    verdict: str
    outcome: str
    candidates: list[Picture]
    left_out: int


@dataclass
class Budget:
    """How many bytes of pictures the page may still take."""

    left: int = PICTURE_BYTES

    def take(self, uri: str) -> str:
        """Return the thumbnail when it is a JPEG or PNG data URI that still fits, else nothing."""
        if not is_picture(uri) or len(uri) > self.left:
            return ""
        self.left -= len(uri)
        return uri


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


def found(match: Match, budget: Budget) -> Found:
    """Return the match as shown, its pictures taken from the budget."""
    shown = match.candidates[:CANDIDATES]
    thumbnail = budget.take(match.thumbnail)
    verdict, outcome = _outcome(match)
    return Found(
        query=match.query,
        group=match.group,
        thumbnail=thumbnail,
        margin="" if match.margin is None else text.number(match.margin),
        verdict=verdict,
        outcome=outcome,
        candidates=[_picture(i, c, budget) for i, c in enumerate(shown, start=1)],
        left_out=len(match.candidates) - len(shown),
    )


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
        score=text.number(candidate.score) if not math.isfinite(candidate.score) else _score(candidate.score),
        verdict=verdict,
        thumbnail=budget.take(candidate.thumbnail),
    )


def _score(score: float) -> str:
    """Return a score to three decimals, so that the scores of a row compare at a glance."""
    return f"{score:.3f}".replace("-", "−") if abs(score) < 1000 else text.number(score)
