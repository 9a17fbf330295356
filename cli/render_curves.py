"""The plot of a training run: loss, retrieval on validation, and the cosines of pairs and non-pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.curves import COSINE, LOSS, RETRIEVAL, STRANGERS
from latentstore.results import Curve

_TITLES = {
    LOSS: "Training loss",
    RETRIEVAL: "Retrieval on validation",
    COSINE: "Cosine of translation and origin after W",
}


def draw(curves: Sequence[Curve], best: int | None, path: Path) -> None:
    """Write the curves of a run as one PNG, a panel each; non-pairs are dashed, in the colour of their pairs.

    Parameters
    ----------
    curves : sequence of Curve
        Of :meth:`cli.curves.Course.curves`.
    best : int or None
        The step that W is of.
    """
    from matplotlib.figure import Figure as Canvas

    from latentstore.report.plots import HUES, PAPER

    plots = list(dict.fromkeys(c.plot for c in curves))
    canvas = Canvas(figsize=(5.2 * max(1, len(plots)), 4.2), dpi=144, layout="constrained")
    for axes, plot in zip(canvas.subplots(1, max(1, len(plots)), squeeze=False)[0], plots, strict=False):
        here = [c for c in curves if c.plot == plot]
        colours: dict[str, str] = {}
        for curve in here:
            kind = curve.label.removesuffix(STRANGERS)
            colour = colours.setdefault(kind, PAPER[f"m{len(colours) % HUES + 1}"])
            own = curve.role == "method"
            look: dict[str, Any] = {"color": colour, "linestyle": "-" if own else (0, (4, 2))}
            marker = "o" if len(curve.x) <= 30 else ""
            axes.plot(curve.x, curve.y, label=curve.label, marker=marker, markersize=3.5, **look)
        if best is not None:
            axes.axvline(best, color=PAPER["muted"], linewidth=1, linestyle=":", label="the W that is kept")
        if plot == COSINE:
            axes.set_ylim(min(-0.05, *(min(c.y) for c in here)), 1.02)
        axes.set_title(_TITLES.get(plot, plot), fontsize=11, loc="left", parse_math=False)
        axes.set_xlabel(here[0].x_label)
        axes.set_ylabel(here[0].y_label)
        axes.grid(color=PAPER["rule"], linewidth=0.8)
        # Below the axes: inside them it would lie on one curve or another.
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=1)
    canvas.draw_without_rendering()  # a first drawing settles the layout, with the legends below the axes
    canvas.savefig(path, format="png", facecolor=PAPER["ground"], metadata={"Software": None})
