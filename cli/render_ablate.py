"""What a person sees of the ablations: a table for each, and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.ablation_tables import PAPER, SEEN, TABLES, UNSEEN
from cli.render import folded, percent

if TYPE_CHECKING:
    from cli.ablation_tables import Ablated, Row


def said(ablated: Ablated) -> str:
    """Return the tables in the terminal, then what was chosen and what to beware of."""
    lines = [ablated.report.title]
    groups = list(dict.fromkeys(r.group for r in ablated.rows))
    for name in dict.fromkeys(r.table for r in ablated.rows):
        here = [r for r in ablated.rows if r.table == name]
        counts = "; ".join(f"{g}: {next(r.n for r in here if r.group == g)} queries" for g in groups)
        lines += ["", f"  {TABLES[name]}; {counts}; % [95 % interval]", _table(ablated, name, here, groups)]
    lines += ["", "  Controls, of which PCA-whitening at its best rank", _controls(ablated, groups)]
    lines += ["", "  * best on validation; paper: mAP on its seen / unseen models, other images and models"]
    notes = [f"Note: {caveat}" for caveat in ablated.report.caveats]
    return "\n".join([*lines, "", *ablated.report.summary, *notes])


def _table(ablated: Ablated, name: str, here: Sequence[Row], groups: Sequence[str]) -> str:
    gaps = {g.variant: g for g in ablated.gaps if g.table == name}
    header = ["", "validation", *_headers(groups)]
    header += ["gap"] * bool(gaps) + ["paper", "parameters", "multiply-adds", "step"]
    lines = []
    for variant in dict.fromkeys(r.variant for r in here):
        own = {r.group: r for r in here if r.variant == variant}
        first = next(iter(own.values()))
        cells = [variant + " *" * first.chosen]
        cells.append("" if first.validation is None else percent(first.validation))
        for group in groups:
            cells += [percent(own[group].map, own[group].interval), percent(own[group].acc)]
        if gaps:
            cells.append(_signed(gaps[variant].value, gaps[variant].interval))
        known = PAPER.get((name, variant))
        cells.append("" if known is None else f"{known[0]} / {known[2]}")
        lines.append([*cells, f"{first.parameters:,}", f"{first.multiply_adds:,}", str(first.step)])
    return folded(header, lines)


def _headers(groups: Sequence[str]) -> list[str]:
    short = [g.replace(" models", "") for g in groups]
    return [cell for g in short for cell in (f"{g} mAP", "Acc")]


def _controls(ablated: Ablated, groups: Sequence[str]) -> str:
    """Return the controls as a table: what no variant had to learn."""
    found = {(f.subject, f.group, f.name): f for f in ablated.report.figures if f.role == "control"}
    lines = []
    for name in dict.fromkeys(subject for subject, _, _ in found):
        cells = [name]
        for group in groups:
            ap, acc = found.get((name, group, "mAP")), found.get((name, group, "Acc"))
            both = (
                ["", ""]
                if ap is None or acc is None
                else [percent(ap.value, ap.interval), percent(acc.value)]
            )
            cells += both
        if ablated.gaps:
            seen, unseen = (found.get((name, group, "mAP")) for group in (SEEN, UNSEEN))
            cells.append("" if seen is None or unseen is None else _signed(seen.value - unseen.value, None))
        lines.append(cells)
    return folded(["", *_headers(groups), *["gap"] * bool(ablated.gaps)], lines)


def _signed(value: float, interval: tuple[float, float] | None) -> str:
    text = f"{100 * value:+.1f}"
    return text if interval is None else f"{text} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def draw(ablated: Ablated, path: Path) -> None:
    """Write one PNG: a panel for each table, seen models filled, unseen ones open, best controls dashed."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    from latentstore.report.plots import PAPER as INK

    names = list(dict.fromkeys(r.table for r in ablated.rows))
    across = min(2, len(names))
    down = -(-len(names) // across)
    canvas = Canvas(figsize=(5.6 * across, 3.9 * down + 0.7), dpi=144, layout="constrained")
    grid = canvas.subplots(down, across, squeeze=False, sharey=True).ravel()
    looks = _looks(list(dict.fromkeys(r.group for r in ablated.rows)), INK)
    for axes, name in zip(grid, names, strict=False):
        here = [r for r in ablated.rows if r.table == name]
        variants = list(dict.fromkeys(r.variant for r in here))
        joined = name in ("layers", "ranks")
        for at, (group, look) in enumerate(looks.items()):
            own = [r for r in here if r.group == group]
            # Side by side, so that intervals do not cover each other.
            x = [variants.index(r.variant) + 0.1 * (at - (len(looks) - 1) / 2) for r in own]
            spans = [r.interval or (r.map, r.map) for r in own]
            errors = [[r.map - s[0] for r, s in zip(own, spans, strict=True)]]
            errors += [[s[1] - r.map for r, s in zip(own, spans, strict=True)]]
            line = "-" if joined else "none"
            axes.errorbar(x, [r.map for r in own], yerr=errors, linestyle=line, capsize=3, **look)
            axes.axhline(ablated.controls[group][1], color=look["color"], linewidth=1.1, linestyle="--")
        axes.set_xticks(range(len(variants)), variants)
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.5, len(variants) - 0.5)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axes.grid(axis="y", color=INK["rule"], linewidth=0.8)
        axes.set_title(TABLES[name], fontsize=11, loc="left")
        axes.set_ylabel("test mAP (%)")
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    keys = [Line2D([], [], label=group, **look) for group, look in looks.items()]
    for group, look in looks.items():
        label = f"best control, {group}: {ablated.controls[group][0]}"
        keys.append(Line2D([], [], color=look["color"], linewidth=1.1, linestyle="--", label=label))
    canvas.legend(handles=keys, loc="outside lower center", ncols=across, fontsize=9, frameon=False)
    canvas.savefig(path, format="png", facecolor=INK["ground"], metadata={"Software": None})


def _looks(groups: Sequence[str], ink: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return each group's colour and mark: seen filled, unseen open."""
    out: dict[str, dict[str, Any]] = {}
    for group in groups:
        colour = ink["m1" if group.startswith(SEEN) else "m2"]
        filled = ink["ground"] if group.startswith(UNSEEN) else colour
        mark = "s" if "--queries" in group else "o"
        out[group] = {"color": colour, "marker": mark, "markersize": 6, "markerfacecolor": filled}
    return out
