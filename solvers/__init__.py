"""Mathematics of origin identification: maps W, their fits, and exact retrieval metrics.

Works on plain array blocks; reads no image stores. Importing it loads no accelerator library.
"""

from .closed import (
    Analytic,
    Centred,
    Fitted,
    GeneralisedNull,
    Identity,
    NullSpace,
    PairData,
    Pca,
    RandomSubspace,
    fit_path,
)
from .methods import METHODS, build, get
from .metrics import average_precision
from .moments import Moments
from .projection import Projection, identity_hash
from .sgd import CosFace
from .spectrum import Spectrum, fit_spectrum
from .sums import PairSums, RowSums

__all__ = [
    "METHODS",
    "Analytic",
    "Centred",
    "CosFace",
    "Fitted",
    "GeneralisedNull",
    "Identity",
    "Moments",
    "NullSpace",
    "PairData",
    "PairSums",
    "Pca",
    "Projection",
    "RandomSubspace",
    "RowSums",
    "Spectrum",
    "average_precision",
    "build",
    "fit_path",
    "fit_spectrum",
    "get",
    "identity_hash",
]
