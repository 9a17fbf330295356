"""Mathematics of origin identification: maps W, their fits, and exact retrieval metrics.

Works on plain array blocks; reads no image stores. Importing it loads no accelerator library.
"""

from .closed import (
    Analytic,
    Cca,
    Centred,
    Fitted,
    GeneralisedNull,
    Identity,
    Kissme,
    NormWeighted,
    NullSpace,
    PairData,
    Pca,
    Plda,
    Procrustes,
    RandomSubspace,
    Regression,
    fit_path,
)
from .estimator import OriginFinder
from .methods import ALIASES, METHODS, build, get
from .metrics import average_precision
from .moments import Moments
from .projection import Projection, identity_hash
from .sgd import CosFace
from .spectrum import Spectrum, fit_spectrum
from .sums import PairSums, RowSums

__all__ = [
    "ALIASES",
    "METHODS",
    "Analytic",
    "Cca",
    "Centred",
    "CosFace",
    "Fitted",
    "GeneralisedNull",
    "Identity",
    "Kissme",
    "Moments",
    "NormWeighted",
    "NullSpace",
    "OriginFinder",
    "PairData",
    "PairSums",
    "Pca",
    "Plda",
    "Procrustes",
    "Projection",
    "RandomSubspace",
    "Regression",
    "RowSums",
    "Spectrum",
    "average_precision",
    "build",
    "fit_path",
    "fit_spectrum",
    "get",
    "identity_hash",
]
