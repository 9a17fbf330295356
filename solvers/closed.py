"""The closed forms, one import: each method is a small frozen object with `fit(data) -> Fitted`."""

from .data import PairData
from .fitted import Fitted
from .gallery_maps import Analytic, Centred, Identity, Pca, RandomSubspace
from .generalised import GeneralisedNull, fit_path
from .nullspace import NullSpace

__all__ = [
    "Analytic",
    "Centred",
    "Fitted",
    "GeneralisedNull",
    "Identity",
    "NullSpace",
    "PairData",
    "Pca",
    "RandomSubspace",
    "fit_path",
]
