"""The choices that options take."""

from __future__ import annotations

from enum import StrEnum


class Preset(StrEnum):
    """Sizes of a CosFace run."""

    auto = "auto"
    paper = "paper"


class Accumulator(StrEnum):
    """What the null space is taken from."""

    auto = "auto"
    gram = "gram"
    qr = "qr"


class Score(StrEnum):
    """How a map scores."""

    cosine = "cosine"
    bias = "bias"


class Dtype(StrEnum):
    """What the store keeps."""

    float16 = "float16"
    float32 = "float32"


class PrecisionOption(StrEnum):
    """What the encoder computes in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class PosteriorOption(StrEnum):
    """Which latent of the VAE's posterior is kept."""

    mean = "mean"
    sample = "sample"


class Mode(StrEnum):
    """What the analytic diffusion returns."""

    sample = "sample"
    mean = "mean"


class SplitOption(StrEnum):
    """Whose images."""

    train = "train"
    validation = "validation"
    test = "test"
    all = "all"


class BackendOption(StrEnum):
    """What searches."""

    auto = "auto"
    faiss = "faiss"
    numpy = "numpy"
    torch = "torch"


class Loss(StrEnum):
    """What training minimises."""

    cosface = "cosface"
    softmax = "softmax"
    circle = "circle"


class WeightInit(StrEnum):
    """Where W starts."""

    auto = "auto"
    principal = "principal"
    random = "random"


class ClassInit(StrEnum):
    """Where class weights start."""

    means = "means"
    random = "random"


class TrainingPrecision(StrEnum):
    """What training multiplies in."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


class Place(StrEnum):
    """Where the latents of a training run lie."""

    gpu = "gpu"
    host = "host"
    store = "store"
