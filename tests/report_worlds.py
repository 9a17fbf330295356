"""Reports of every kind, small and made up: each fills what only its kind fills."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from latentstore.results import Candidate, Curve, Figure, Match, Report, Verdict

METHODS = {"analytic": "method", "gnull": "method", "raw": "control", "PCA-whitened ¼ @64": "control"}
MODELS = {
    "stable-diffusion-2": "seen",
    "stabilityai/stable-diffusion-xl-base-1.0": "unseen",
    "our own": "unseen",
}
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def picture(colour: tuple[int, int, int], kind: str = "jpeg") -> str:
    """A data URI of 96 × 96 pixels: a colour that fades from corner to corner."""
    fade = np.linspace(0.4, 1.6, 96)
    pixels = np.clip(np.outer(fade, fade)[..., None] * np.array(colour), 0, 255).astype(np.uint8)
    raw = io.BytesIO()
    Image.fromarray(pixels).save(raw, kind.upper())
    return f"data:image/{kind};base64," + base64.b64encode(raw.getvalue()).decode()


def measured(
    value: float, subject: str, role: str, group: str, axes: dict[str, str | float], *, wide: float = 0.02
) -> list[Figure]:
    """MAP and Acc of a subject, with intervals."""
    out = []
    for name, v in (("mAP", value), ("Acc", value - 0.021)):
        span = (max(0.0, v - wide), min(1.0, v + wide))
        out.append(Figure(name, v, subject, role, group, "fraction", span, 240, axes=axes))  # type: ignore[arg-type]
    return out


def evaluation() -> Report:
    rng = np.random.default_rng(0)
    figures = []
    level = {"analytic": 0.93, "gnull": 0.84, "raw": 0.62, "PCA-whitened ¼ @64": 0.88}
    for domain, less in (("seen", 0.0), ("unseen", 0.07)):
        for subject, role in METHODS.items():
            figures += measured(level[subject] - less, subject, role, f"{domain} models", {"domain": domain})
    figures += measured(0.95, "gnull", "method", "upper bound", {"domain": "upper"})
    for model, domain in MODELS.items():
        for subject, role in METHODS.items():
            value = level[subject] - rng.uniform(0, 0.1)
            figures += measured(value, subject, role, model, {"model": model, "domain": domain})
        for strength in STRENGTHS:
            axes = {"model": model, "domain": domain, "strength": strength}
            for subject, role in METHODS.items():
                value = level[subject] * (1 - 0.7 * strength**4)
                figures += measured(value, subject, role, f"{model}, strength {strength}", axes)
    figures += [
        Figure("training", 0.0031, "gnull", "method", unit="h"),
        Figure("extraction", 0.0217, "patch", "note", unit="s/img", note="warm, median of 5"),
        Figure("matching", 7.1e-9, "gnull", "method", unit="s/pair"),
        Figure("matching", 6.9e-9, "analytic", "method", unit="s/pair"),
        Figure("recall@5", 0.97, "gnull", "method", "seen models", "fraction", (0.95, 0.99), 240),
    ]
    matches = [
        Match(
            "query.png",
            "strength 0.8",
            -0.004,
            [
                Candidate(
                    "wrong.jpg", "w", 0.61, False, picture((180, 60, 60)), [], picture((90, 9, 90), "png")
                ),
                Candidate("right.jpg", "r", 0.606, True, picture((60, 160, 60)), ["copy.jpg", "again.jpg"]),
            ],
            picture((200, 90, 70)),
            rank=2,
        )
    ]
    return _report("evaluation", "How well origins are found", figures=figures, matches=matches)


def attack() -> Report:
    figures, curves = [], []
    families = {"JPEG": (100.0, 70.0, 50.0, 10.0), "blur": (1.0, 2.0, 3.0, 5.0), "crop": (0.9, 0.7, 0.5)}
    for family, intensities in families.items():
        for subject, role in METHODS.items():
            y = [0.98 * (1 - 0.12 * i * (1.5 if role == "control" else 1)) for i in range(len(intensities))]
            for intensity, value in zip(intensities, y, strict=True):
                axes = {"attack": family, "intensity": intensity}
                figures += measured(value, subject, role, f"{family} {intensity:g}", axes)
            curves.append(
                Curve(
                    f"{family}",
                    subject,
                    list(intensities),
                    y,
                    "quality" if family == "JPEG" else "intensity",
                    "mAP",
                    role=role,  # type: ignore[arg-type]
                    low=[v - 0.02 for v in y],
                    high=[min(1.0, v + 0.02) for v in y],
                )
            )
    return _report("attack", "What attacks cost", figures=figures, curves=curves)


def sweep() -> Report:
    ranks = [64.0, 128.0, 256.0, 512.0]
    figures, curves = [], []
    for subject, role in METHODS.items():
        y = [0.9 * (1 - 0.4 * 0.5**i) for i in range(4)]
        figures += measured(y[-1], subject, role, "test", {})
        curves.append(
            Curve("mAP over rank", subject, ranks, y, "rank of W", "mAP", x_log=True, role=role)  # type: ignore[arg-type]
        )
    return _report("sweep", "Ranks of gnull", figures=figures, curves=curves)


def compare() -> Report:
    figures = []
    for i, group in enumerate(("SD2 × SDXL", "SD2 × Kolors")):
        figures += [
            Figure("cos φ", 0.9957901 + i * 0.004, group, "method", group, n=10, note="inside the band"),
            Figure("cos φ", 0.99999, "two Gaussian matrices", "control", group, "", (0.99998, 0.999995), 400),
            Figure("cos φ, standard deviation over fits", 3.7e-5, group, "method", group, n=10),
            Figure("overlap", 0.61, group, "method", group, n=512),
            Figure("overlap", 0.125, "random subspaces", "control", group, n=512),
            Figure("principal angle, median", 31.0, group, "note", group, "°"),
        ]
    x = [float(i) for i in range(1, 300)]
    curves = [
        Curve("spectrum", w, x, [v**-s for v in x], "singular value", "share of the largest", y_log=True)
        for w, s in (("SD2", 0.4), ("SDXL", 0.5))
    ]
    curves.append(Curve("principal angles", "SD2 × SDXL", x, [v * 0.3 for v in x], "angle", "degrees"))
    return _report("compare", "Comparison of two maps", figures=figures, curves=curves)


def ablation() -> Report:
    figures = []
    runs = ["cosface, linear", "softmax, linear", "circle, linear"]
    runs += ["cosface, convolution", "cosface, attention"]
    for domain, less in (("seen", 0.0), ("unseen", 0.1)):
        for i, run in enumerate(runs):
            figures += measured(0.9 - 0.05 * i - less, f"{run} @64", "method", f"{domain} models", {})
        figures += measured(0.7 - less, "raw", "control", f"{domain} models", {})
    figures.append(Figure("parameters", 262144.0, "cosface, linear @64"))
    curves = [
        Curve("MLP layers (Figure 9)", g, [1.0, 2.0, 3.0], [0.9, 0.91, 0.87 - i / 10], "layers", "mAP")
        for i, g in enumerate(("seen models", "unseen models"))
    ]
    made = _report("ablation", "Ablations: losses, transformations", figures=figures, curves=curves)
    return dataclasses.replace(made, settings={"rank": 64, "seed": 0})


def theory() -> Report:
    figures = []
    for t in (19, 249, 499):
        group = f"exact denoiser: t = {t}"
        figures += [
            Figure("Lemma 1: deviation", 7e-16, "one-step formula", "method", group, n=4, note="rounding"),
            Figure("Lemma 1: deviation", 0.4, "ε_θ misread", "control", group, n=4),
            Figure("√(1−ᾱ)/√ᾱ", 0.13 * t, "", "note", group),
        ]
    return _report("theory", "Theory check", figures=figures)


def solve() -> Report:
    figures = [f for s, role in METHODS.items() for f in measured(0.9, s, role, "oracle: simulated", {})]
    made = _report("solve", "solve W by gnull, rank 256", figures=figures)
    tried = [{"label": "gnull", "knobs": {"lam": 0.1}}]
    return dataclasses.replace(made, data={"space": "98af", "tried": tried})


def match() -> Report:
    verdicts = [
        Verdict("match", 0.81, 0.0021, 0.0098, (0.004, 0.019), 0.923, (0.9, 0.945), "simulated ones", 412),
        Verdict("doubtful", 0.41, 0.031, 0.05, (0.03, 0.08), 0.97, None, "simulated ones", 412, "Close."),
        Verdict("no origin here", 0.12, 0.73, 0.73, (0.68, 0.78), n=412),
    ]
    colours = [(190, 80, 60), (60, 120, 190), (80, 160, 90), (200, 170, 60)]
    matches = [
        Match(
            f"suspicious-{v.decision}.jpg",
            "",
            0.21,
            [
                Candidate(
                    f"images/{i:04d}.jpg",
                    f"photo {i}",
                    v.score - 0.1 * i,
                    None,
                    picture(c),
                    [f"images/copy-{j}.jpg" for j in range(7)] if i == 0 else [],
                    picture((c[2], c[1], c[0]), "png") if i < 2 else "",
                )
                for i, c in enumerate(colours)
            ],
            picture((200, 90, 70)),
            verdict=v,
        )
        for v in verdicts
    ]
    x = np.linspace(0, 1, 40)
    curves = [
        Curve(
            "Scores with and without an origin", label, x.tolist(), y.tolist(), "score", "share of pictures"
        )
        for label, y in (
            ("without an origin", np.exp(-((x - 0.3) ** 2) / 0.01) / 12),
            ("with one", np.exp(-((x - 0.7) ** 2) / 0.02) / 16),
        )
    ]
    return _report("match", "Where do these pictures come from?", matches=matches, curves=curves)


def benchmark() -> Report:
    rows = [Figure("rate", 9e4 + i, f"no {i}", "method", "gather", "rows/s", (8e4, 1e5), 5) for i in range(3)]
    return _report("benchmark", "How fast a store is read", figures=rows)


KINDS: dict[str, Callable[[], Report]] = {
    f.__name__: f for f in (evaluation, attack, sweep, compare, ablation, theory, solve, match, benchmark)
}


def _report(
    kind: str,
    title: str,
    *,
    figures: list[Figure] | None = None,
    curves: list[Curve] | None = None,
    matches: list[Match] | None = None,
) -> Report:
    return Report(
        kind=kind,  # type: ignore[arg-type]
        title=title,
        summary=[f"{title}: 93.0 % of 240 queries have their origin first.", "More in the tables."],
        data={"store": "latents.zarr", "encoder": "patch", "space": "98afb41d6bb8ff06", "gallery": 5385},
        settings={"rank": 256, "seed": 20260713, "what": ["losses", "ranks"]},
        reproduce=[f"latentstore {kind} --store latents.zarr --out {kind}.json"],
        figures=figures or [],
        curves=curves or [],
        matches=matches or [],
        caveats=["The queries come from three models. A fourth may be harder."],
        timings={"encode": 12.5, "fit": 3.4},
        machine={"system": "Linux", "cores": 2},
        created="2026-03-05T14:03:00+00:00",
        version="0.1.0",
        commit="0123456789ab",
    )
