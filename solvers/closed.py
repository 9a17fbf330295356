"""The closed forms, one import: each method is a small frozen object with `fit(data) -> Fitted`."""

from .analytic import Analytic
from .data import PairData
from .fitted import Fitted
from .gallery_maps import Centred, Identity, Pca, RandomSubspace
from .generalised import GeneralisedNull, fit_path
from .joint import Cca, Plda, Regression
from .metric import Kissme, Procrustes
from .nullspace import NullSpace
from .weighted import NormWeighted

__all__ = [
    "Analytic",
    "Cca",
    "Centred",
    "Fitted",
    "GeneralisedNull",
    "Identity",
    "Kissme",
    "NormWeighted",
    "NullSpace",
    "PairData",
    "Pca",
    "Plda",
    "Procrustes",
    "RandomSubspace",
    "Regression",
    "fit_path",
]
