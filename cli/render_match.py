"""The matches of queries in the terminal: a verdict, the ranked origins, and what the verdicts are worth."""

from __future__ import annotations

from cli.calibrating import OWN
from cli.matching import MatchResult
from cli.render import percent, printable, table
from latentstore.results import Match, Verdict


def matched(found: MatchResult) -> str:
    """Return the matches of all queries."""
    how = "made and kept" if found.made else "read"
    lines = [
        f"{found.method} map, {how}: {found.projection}; the collection: {found.searched}",
        "",
        "\n\n".join(_match(m) for m in found.matches),
        *_worth(found.matches),
    ]
    lines += [f"\n{printable(name)} cannot be read: {why}" for name, why in found.unreadable]
    lines += [f"\nNote: {note}" for note in (found.no_verdict, *found.notes, found.note) if note]
    return "\n".join(lines)


def _match(match: Match) -> str:
    rows = [[str(i + 1), f"{c.score:.4f}", printable(c.path)] for i, c in enumerate(match.candidates)]
    header = ["rank", "score", "origin"]
    if any(c.near for c in match.candidates):
        near = [f"+ {len(c.near):,} near-duplicate{'s' * (len(c.near) > 1)}" for c in match.candidates]
        header.append("")
        rows = [[*r, n * bool(c.near)] for r, n, c in zip(rows, near, match.candidates, strict=True)]
    head = printable(match.query)
    if match.verdict is not None:
        head += f": {match.verdict.decision} (p = {_p(match.verdict)})"
    if match.margin is not None:
        head += f"   margin to the runner-up {match.margin:.4f}"
    return head + "\n" + table(header, rows, left=0)


def _p(verdict: Verdict) -> str:
    return f"{verdict.p:.2g}"


def _worth(matches: list[Match]) -> list[str]:
    """Return what each bar that was passed or missed is worth on this collection, once."""
    first: dict[str, Verdict] = {}
    for match in matches:
        if match.verdict is not None:
            # "no origin here" comes with the rates of the bar that it missed.
            bar = "match" if match.verdict.decision == "match" else "doubtful or better"
            first.setdefault(bar, match.verdict)
    if not first:
        return []
    rows = []
    for bar, verdict in sorted(first.items(), reverse=True):
        found = ""
        if verdict.detection is not None:
            found = f"{percent(verdict.detection, verdict.detection_interval)} of {verdict.detection_of}"
        rows.append([bar, percent(verdict.false_alarm, verdict.false_alarm_interval), found])
    any_one = next(iter(first.values()))
    kinds = "as they are and as simulated translations"
    if any_one.detection_of == OWN:
        kinds = f"as they are, as simulated translations and as {OWN}"
    title = (
        f"p: the share of pictures without an origin here that would score as high, by {any_one.n:,} of this "
        f"collection that were held out, {kinds}. % [95 % interval]:"
    )
    header = ["called", "false alarms", "origins found"]
    notes = dict.fromkeys(m.verdict.note for m in matches if m.verdict is not None and m.verdict.note)
    return ["", title, table(header, rows, left=1), *(f"  {note}" for note in notes)]
