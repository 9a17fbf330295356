"""The figures printed in the paper, by its table numbers, to stand muted beside measured ones.

Wang et al., "Origin Identification for Text-Guided Image-to-Image Diffusion Models", ICML 2025. mAP and Acc
are fractions here (the print has percent); seconds and hours are in full (the print scales them).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

CITED = "Wang et al., ICML 2025"
SENTENCE = "Rows marked “paper” are printed figures ({table} of {cited}), and no measure of ours: {why}"
_QUERIES = "5,000 queries a model, searched among 1,000,000 references of which 5,000 are origins"
_AT = "SD2 0.9, SDXL 0.8, OpenDalle 0.7, ColorfulXL 0.7, Kandinsky-3 0.6, SD3 0.8, Kolors 0.7"
_FIXED = (
    f"they are of {_QUERIES}, each model at one strength ({_AT}). Fewer references or weaker edits alone "
    "make figures higher."
)
_WHY: Mapping[str, str] = {
    "Table 1": "they are of its own W for each model, from ten trainings on its own pairs and latents.",
    "Table 8": f"they are of {_QUERIES}. Fewer references alone make figures higher.",
}
"""What keeps a table's printed figures from comparing; of the others :data:`_FIXED`."""


def sentence(table: str) -> str:
    """Return what must be said below printed rows: whose they are, and why they do not compare."""
    return SENTENCE.format(table=table, cited=CITED, why=_WHY.get(table, _FIXED))


Pair = tuple[float, float]

MODELS = ("SD2", "SDXL", "OpenDalle", "ColorfulXL", "Kandinsky-3", "SD3", "Kolors")
"""The models of the test queries; the first is the one that W was trained on."""
SEEN, UNSEEN = "SD2, seen", "six unseen models, mean"
"""Where a printed row stands when none of our models is one of the paper's."""
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "SD2": ("sd2", "stablediffusion2"),
    "SDXL": ("sdxl", "stablediffusionxl", "stablediffusionxlbase10"),
    "OpenDalle": ("opendalle", "opendallev11", "opda"),
    "ColorfulXL": ("colorfulxl", "coxl"),
    "Kandinsky-3": ("kandinsky3", "kan3"),
    "SD3": ("sd3", "stablediffusion3", "stablediffusion3medium"),
    "Kolors": ("kolors", "kolor"),
}


def known_model(name: str) -> str:
    """Return the paper's name of a model (``"stabilityai/stable-diffusion-2"`` is ``"SD2"``), or nothing."""
    plain = re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())
    return next((model for model, names in _ALIASES.items() if plain in names), "")


def _pairs(line: str) -> tuple[Pair, ...]:
    """Return a printed row of percentages, mAP and Acc in turn, as pairs of fractions."""
    values = [float(f"{float(word) / 100:.6g}") for word in line.split()]
    return tuple(zip(values[::2], values[1::2], strict=True))


TABLE_1: tuple[tuple[str, float, float], ...] = (
    ("SDXL", 0.995790, 0.000037),
    ("OpenDalle", 0.996532, 0.000016),
    ("ColorfulXL", 0.998436, 0.000015),
    ("Kandinsky-3", 0.999788, 0.000009),
    ("SD3", 0.993256, 0.000035),
    ("Kolors", 0.991808, 0.000042),
)
"""cos φ of Stable Diffusion 2 beside each model, with its standard deviation over ten trainings."""

TABLE_3: Mapping[str, tuple[Pair, Pair]] = {
    name: (cells[0], cells[1])
    for name, cells in {
        "Circle loss": _pairs("70.4 64.3 53.9 48.5"),
        "SoftMax": _pairs("82.7 78.3 55.0 49.4"),
        "CosFace": _pairs("87.1 83.2 52.2 46.5"),
        "IBN-Net": _pairs("88.6 85.1 54.6 49.0"),
        "TransMatcher": _pairs("65.6 60.3 65.3 60.7"),
        "QAConv-GS": _pairs("78.8 74.9 75.8 72.3"),
        "Embeddings of VAE": _pairs("51.0 47.0 46.9 43.0"),
        "With linear transformation": _pairs("88.8 86.6 86.6 84.5"),
        "Upper: train and test in one domain": _pairs("88.8 86.6 92.0 90.4"),
    }.items()
}
"""(mAP, Acc) on the seen model, and on the mean of six unseen ones."""

TABLE_3_COST: Mapping[str, tuple[float | None, float, float]] = {
    "Circle loss": (1.79, 2.81e-4, 0.80e-10),
    "SoftMax": (2.25, 2.81e-4, 0.80e-10),
    "CosFace": (2.43, 2.81e-4, 0.80e-10),
    "IBN-Net": (2.03, 3.42e-4, 2.14e-10),
    "TransMatcher": (1.84, 2.30e-4, 941e-10),
    "QAConv-GS": (1.47, 2.30e-4, 464e-10),
    "Embeddings of VAE": (None, 1.59e-4, 4.25e-10),
    "With linear transformation": (0.17, 1.59e-4, 0.53e-10),
    "Upper: train and test in one domain": (0.17, 1.59e-4, 0.53e-10),
}
"""Training in hours, extraction in seconds an image, matching in seconds a pair; on eight A100."""

TABLE_6: Mapping[str, tuple[Pair, Pair]] = {
    "softmax": ((0.761, 0.726), (0.624, 0.590)),
    "circle": ((0.849, 0.820), (0.825, 0.804)),
    "cosface": ((0.888, 0.866), (0.866, 0.845)),
}
"""Supervision: (mAP, Acc) on the seen model and on unseen ones."""

TABLE_7: Mapping[str, tuple[Pair, Pair]] = {
    "convolution": ((0.374, 0.338), (0.325, 0.296)),
    "attention": ((0.890, 0.872), (0.807, 0.782)),
    "linear": ((0.888, 0.866), (0.866, 0.845)),
}
"""Transformation: (mAP, Acc) on the seen model and on unseen ones."""

FIGURE_9: Mapping[str, tuple[Pair, Pair]] = {
    "1": ((0.888, 0.866), (0.866, 0.845)),
    "2": ((0.914, 0.894), (0.803, 0.773)),
}
"""Layers of the MLP, as far as the text gives figures."""

_TABLE_8 = """
0.1 100.0 100.0 99.9 99.9 100.0 100.0 100.0 99.9 100.0 100.0 100.0 100.0 99.9 99.9
0.2 100.0 100.0 99.9 99.9 100.0 100.0 99.9 99.9 99.9 99.9 100.0 99.9 99.8 99.8
0.3 100.0 100.0 99.9 99.8 99.9 99.9 99.9 99.8 99.7 99.7 99.9 99.9 99.6 99.5
0.4 99.9 99.9 99.8 99.7 99.9 99.8 99.8 99.7 99.2 99.1 99.9 99.8 98.9 98.6
0.5 99.9 99.8 99.5 99.3 99.6 99.4 99.4 99.2 97.6 97.1 99.7 99.6 97.4 96.9
0.6 99.8 99.7 99.1 99.0 98.2 97.8 97.9 97.5 85.7 83.3 99.4 99.2 92.1 90.8
0.7 99.2 99.0 97.9 97.5 87.3 85.3 89.3 87.7 61.9 57.2 98.5 98.1 90.3 88.8
0.8 97.5 97.1 81.5 78.8 49.5 45.4 61.0 57.1 14.5 11.4 85.7 82.9 70.9 67.4
0.9 88.8 86.6 68.1 63.9 13.2 10.7 19.5 16.5 2.1 1.5 30.1 25.6 24.5 20.5
1.0 43.2 37.7 19.3 15.7 1.8 1.2 2.6 1.8 0.0 0.0 0.0 0.0 2.2 1.5
"""
TABLE_8: Mapping[float, tuple[Pair, ...]] = {
    float(line.split()[0]): _pairs(line.partition(" ")[2]) for line in _TABLE_8.strip().splitlines()
}
"""Strength → (mAP, Acc) of each of :data:`MODELS`, by the linear transformation."""

TABLE_10: Mapping[str, tuple[Pair, ...]] = {
    "Circle loss": _pairs("70.4 64.3 56.2 50.1 56.5 51.8 41.6 37.0 60.0 53.8 65.6 59.3 43.5 39.2"),
    "SoftMax": _pairs("82.7 78.3 62.4 56.5 58.3 53.0 37.3 32.2 52.5 46.0 75.9 70.2 43.6 38.7"),
    "CosFace": _pairs("87.1 83.2 63.7 58.2 56.7 51.7 30.5 25.2 47.5 40.6 71.5 65.5 43.0 38.0"),
    "IBN-Net": _pairs("88.6 85.1 65.7 60.1 59.4 54.2 33.3 28.3 49.8 42.8 74.0 68.3 45.4 40.5"),
    "TransMatcher": _pairs("65.6 60.3 60.6 55.8 67.9 63.6 61.7 57.4 68.9 64.2 64.7 59.2 67.9 63.9"),
    "QAConv-GS": _pairs("78.8 74.9 71.6 67.5 77.4 74.3 73.6 70.5 75.2 71.2 77.3 73.6 79.5 76.9"),
    "Embeddings of VAE": _pairs("51.0 47.0 38.3 33.8 42.3 38.6 51.6 48.8 54.7 50.4 47.7 42.9 46.9 43.6"),
    "With linear transformation": _pairs(
        "88.8 86.6 81.5 78.8 87.3 85.3 89.3 87.7 85.7 83.3 85.7 82.9 90.3 88.8"
    ),
    "Upper: train and test in one domain": _pairs(
        "88.8 86.6 84.9 82.4 90.8 89.2 93.1 91.9 95.4 94.3 93.7 92.0 94.0 92.8"
    ),
}
"""Method → (mAP, Acc) on each of :data:`MODELS`."""


def across(row: tuple[Pair, ...], model: str) -> Pair:
    """Return a printed row's cell of one of :data:`MODELS` or of :data:`SEEN`, or its :data:`UNSEEN` mean."""
    if model == UNSEEN:
        unseen = row[1:]
        return (sum(p[0] for p in unseen) / len(unseen), sum(p[1] for p in unseen) / len(unseen))
    return row[0] if model == SEEN else row[MODELS.index(model)]
