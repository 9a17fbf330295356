"""What a person sees of ``--method auto``: every setting that was tried, its mAP over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cli.auto import described
from cli.render import counted, folded, percent


def tried(choices: Sequence[Mapping[str, Any]]) -> str:
    """Return validation's table: a line for each fit, a column for each rank; ``*`` marks what was chosen."""
    # Rankless controls, and ranks that only one method has, share the last column.
    had = [rank for _, rank in {(c["label"], c["rank"]) for c in choices if not _level(c)}]
    ranks = sorted({r for r in had if had.count(r) > 1})
    lines: dict[str, dict[int | None, str]] = {}
    for choice in choices:
        name = described({**choice, "rank": 0}).removesuffix(", rank 0").replace("score ", "")
        at = choice["rank"] if choice["rank"] in ranks and not _level(choice) else None
        shown = percent(choice["map"]) + " *" * choice["chosen"]
        other = f" @{choice['rank']}" if at is None and not _level(choice) else ""
        lines.setdefault(name, {})[at] = shown + other
    rows = [[name, *(found.get(r, "") for r in ranks), found.get(None, "")] for name, found in lines.items()]
    judged = counted(choices[0]["n"], "query", "queries")
    header = [f"validation mAP, % ({judged})", *map(str, ranks), "own rank"]
    return folded(header, rows)


def _level(choice: Mapping[str, Any]) -> bool:
    """Tell whether a map keeps every dimension: it has no rank to stand under."""
    return described(choice) == choice["label"]
