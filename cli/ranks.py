"""The ranks that a sweep is asked for: what they may be, and which of them cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentstore.errors import UsageError


def parse_ranks(text: str) -> tuple[int, ...]:
    """Return the ranks of a list like ``64,128,256``, ascending, each once.

    Raises
    ------
    UsageError
        An entry is no whole number, or below 1.
    """
    try:
        ranks = sorted({int(word) for word in text.split(",")})
    except ValueError:
        ranks = [0]
    if ranks[0] < 1:
        raise UsageError(
            f"--ranks is {text!r}; it must be whole numbers of at least 1 between commas, as in 64,128,256."
        )
    return tuple(ranks)


@dataclass(frozen=True)
class Wanted:
    """The ranks to measure; with ``top``, the largest that a fit finds as well."""

    ranks: tuple[int, ...]
    top: bool

    def within(self, rank: int) -> list[int]:
        """Return those that a map of this rank can be cut to."""
        return sorted({*(k for k in self.ranks if k <= rank), *([rank] if self.top else [])})


def dropped(method: str, missing: Sequence[int], kept: Sequence[int], dim: int) -> list[str]:
    """Say which ranks that were asked for are missing, and why."""
    above, unfound = [k for k in missing if k > dim], [k for k in missing if k <= dim]
    out = []
    if above:
        out.append(
            f"Dropped ranks: {listed(above)}. These latents have {dim:,} values: no W has more columns."
        )
    if unfound:
        out.append(
            f"Dropped ranks: {listed(unfound)}. {method} finds fewer directions than that in these latents; "
            f"the largest rank measured is {max(kept)}."
        )
    return out


def listed(ranks: Sequence[int]) -> str:
    """Return ranks between commas."""
    return ", ".join(map(str, ranks))
