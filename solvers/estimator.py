"""A thin estimator over the methods: fit on pairs of arrays, transform either side."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from .arrays import is_array
from .data import PairData
from .errors import SolverUsageError
from .fitted import Fitted
from .methods import build
from .projection import Projection


class OriginFinder:
    """Fit a method on origins and their translations, and map latents so that inner products are scores.

    Parameters
    ----------
    method
        A name from `solvers.METHODS`.
    **knobs
        Of the method (``rank``, ``lam``, ...); what is left out keeps its default.

    Attributes
    ----------
    fitted_
        The fit's maps in float64 and its report (`Fitted`), after `fit`.
    projection_
        The same maps frozen in float32 (`Projection`): save it, or hand it to ``latentstore match``.

    Examples
    --------
    >>> import numpy as np
    >>> from solvers import OriginFinder
    >>> rng = np.random.default_rng(0)
    >>> origins = rng.standard_normal((500, 16))
    >>> translations = origins + 0.1 * rng.standard_normal((500, 16))
    >>> finder = OriginFinder("gnull", rank=8, lam=1.0).fit(origins, translations)
    >>> scores = finder.transform(translations[:3]) @ finder.transform_references(origins).T
    >>> scores.argmax(axis=1).tolist()
    [0, 1, 2]
    """

    def __init__(self, method: str = "gnull", **knobs: Any) -> None:
        self.method, self.knobs = method, knobs
        build(method, **knobs)  # a knob that the method has not is refused here, not after the fit

    def fit(self, origins: Any, translations: Any = None, *, gallery: Any = None) -> Self:
        """Fit on pairs of rows, or on a collection alone.

        Parameters
        ----------
        origins
            (n, d) latents; NumPy, CuPy or torch. Without translations they are the collection.
        translations
            (n, d): row i is a translation of row i of `origins`. None for methods that need no pairs.
        gallery
            (k, d) latents of the collection, for the methods that read its covariance; the origins by
            default.

        Raises
        ------
        NoPairsError
            The method learns from pairs, and there are no translations.
        SolverUsageError
            Shapes that do not fit, or a method that is trained by gradients.
        """
        method = build(self.method, **self.knobs)
        origins, translations, gallery = (_rows(x) for x in (origins, translations, gallery))
        if method.needs_torch:
            raise SolverUsageError(
                f"{self.method} is trained by gradients on labelled rows, not fitted on pairs: see "
                "solvers.CosFace."
            )
        if translations is None:
            data = PairData.from_gallery(origins if gallery is None else gallery)
        else:
            data = PairData.from_arrays(origins, translations, gallery=gallery)
        self.fitted_: Fitted = method.fit(data)
        self.projection_: Projection = self.fitted_.projection()
        return self

    def transform(self, latents: Any) -> Any:
        """Map queries (translations), (n, d) to (n, m), in their own library."""
        return self._fitted().queries(latents)

    def transform_references(self, latents: Any) -> Any:
        """Map references (origins), (n, d) to (n, m), in their own library."""
        return self._fitted().references(latents)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return what the estimator was made with, as scikit-learn asks for it."""
        return {"method": self.method, **self.knobs}

    def set_params(self, **params: Any) -> Self:
        """Change the method or its knobs, as scikit-learn's searches do."""
        method = params.pop("method", self.method)
        knobs = {**(self.knobs if method == self.method else {}), **params}
        build(method, **knobs)
        self.method, self.knobs = method, knobs
        return self

    def _fitted(self) -> Projection:
        if not hasattr(self, "projection_"):
            raise SolverUsageError("This estimator has not been fitted yet. Call fit first.")
        return self.projection_


def _rows(x: Any) -> Any:
    """Return rows as an array of their own library, NumPy's for lists, or say what is wrong with them."""
    if x is None:
        return None
    x = x if is_array(x) else np.asarray(x)
    if x.ndim != 2:
        raise SolverUsageError(f"Latents come as rows, (n, d); got an array of shape {tuple(x.shape)}.")
    return x
