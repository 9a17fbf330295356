"""The one place where a method has a name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from .errors import SolverUsageError
from .gallery_maps import Analytic, Centred, Identity, Pca
from .generalised import GeneralisedNull
from .nullspace import NullSpace
from .rank import check_rank
from .sgd import CosFace

__all__ = ["METHODS", "build", "check_rank", "get"]

METHODS: dict[str, Any] = {
    method.name: method for method in (Identity, Centred, Pca, NullSpace, GeneralisedNull, Analytic, CosFace)
}


def get(name: str) -> Any:
    """Return the method class called `name`; its class attributes declare what it needs.

    Raises
    ------
    SolverUsageError
        Listing the known names, and the likeliest meant.
    """
    if name in METHODS:
        return METHODS[name]
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
