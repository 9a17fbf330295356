"""The one place where a method has a name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from .analytic import Analytic
from .errors import SolverUsageError
from .gallery_maps import Centred, Identity, Pca
from .generalised import GeneralisedNull
from .joint import Cca, Plda, Regression
from .metric import Kissme, Procrustes
from .nullspace import NullSpace
from .rank import check_rank
from .sgd import CosFace
from .weighted import NormWeighted

__all__ = ["ALIASES", "METHODS", "build", "check_rank", "get"]

METHODS: dict[str, Any] = {
    method.name: method
    for method in (
        Identity,
        Centred,
        Pca,
        NullSpace,
        GeneralisedNull,
        Analytic,
        NormWeighted,
        Plda,
        Cca,
        Regression,
        Procrustes,
        Kissme,
        CosFace,
    )
}

ALIASES: dict[str, str] = {
    "lda": "plda spans the discriminants of identities that have two images each, and gnull does where "
    "origins and translations vary alike, with LDA's own scaling",
    "wccn": "gnull at full rank has W W^T = (S_t + lam I)^-1, the inverse of the within-class covariance",
    "rca": "gnull at full rank has W W^T = (S_t + lam I)^-1, the inverse of the chunklets' covariance",
    "learned-whitening": "gnull's columns are the principal components of the origins whitened by "
    "(S_t + lam I)^-1/2",
}
"""Other names of what a method here gives under the cosine, each with the equality (tested)."""


def get(name: str) -> Any:
    """Return the method class called `name`; its class attributes declare what it needs.

    Raises
    ------
    SolverUsageError
        Listing the known names, and the likeliest meant; for an alias, what equals it.
    """
    if name in METHODS:
        return METHODS[name]
    alias = name.lower().replace(" ", "-").replace("_", "-")
    if alias in ALIASES:
        raise SolverUsageError(f"{name} is no method of its own: {ALIASES[alias]}.")
    close = difflib.get_close_matches(name.lower(), METHODS, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    raise SolverUsageError(f"There is no method {name!r}; the methods are {', '.join(METHODS)}.{meant}")


def build(name: str, **knobs: Any) -> Any:
    """Return the method `name` with its knobs; None leaves a knob at its default.

    The rank may be "all" where the method can keep every direction it finds (`all_ranks`).
    """
    method = get(name)
    own = [f.name for f in dataclasses.fields(method) if f.init]
    given = {key: value for key, value in knobs.items() if value is not None}
    foreign = sorted(set(given) - set(own))
    if foreign:
        raise SolverUsageError(
            f"The method {name} has no knob {', '.join(foreign)}; its knobs are {', '.join(own) or 'none'}."
        )
    if given.get("rank") == "all":
        if not method.all_ranks:
            raise SolverUsageError(
                f"The method {name} needs a number as its rank, not 'all'. Give one up to the latents' "
                "dimension."
            )
        given["rank"] = None
    return method(**given)
