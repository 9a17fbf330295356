"""Table 4: how alike two autoencoders are, by the cosines of their weights and of their embeddings.

A low cosine does not say that two encoders see different things. Turning the channels of a latent around
changes nothing that a linear W cannot undo, and takes both cosines down: that is the control beside each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from latentstore.encoders import Encoder, blank_batch
from latentstore.encoders.base import Latents, Pictures
from latentstore.errors import UsageError


@dataclass(frozen=True)
class Likeness:
    """Cosines between two autoencoders.

    Attributes
    ----------
    conv : float or None
        Of the weights of the last convolution of the two encoders; None where shapes differ, or one of
        them is no network.
    embed : float or None
        Of the flattened embeddings of a picture, mean over pictures; None where the latents' shapes differ.
    conv_turned, embed_turned : float or None
        Of the first encoder with itself, its channels moved on by one: the same code, to a linear map.
    embed_unrelated : float or None
        Of embeddings of two different pictures, one by each encoder.
    n : int
        Pictures.
    """

    conv: float | None
    embed: float | None
    conv_turned: float | None
    embed_turned: float
    embed_unrelated: float | None
    n: int


def likeness(a: Encoder, b: Encoder, pictures: Pictures) -> Likeness:
    """Compare two encoders on (n, size, size, 3) pictures.

    Raises
    ------
    UsageError
        Fewer than two pictures: an embedding could not be told from that of another.
    """
    if len(pictures) < 2:
        raise UsageError(
            f"Two autoencoders are compared on at least 2 pictures, and {len(pictures)} can be read. Name "
            "a folder with more."
        )
    x, y = _embeddings(a, pictures), _embeddings(b, pictures)
    # Of one length but another shape, place k of one is not place k of the other.
    comparable_latents = a.space.latent_shape == b.space.latent_shape
    turned = np.roll(x.reshape(len(x), *a.space.latent_shape), 1, axis=1).reshape(x.shape)
    one, other = _last_convolution(a), _last_convolution(b)
    comparable = one is not None and other is not None and one.shape == other.shape
    return Likeness(
        conv=_cosine(one, other) if comparable else None,
        embed=_mean_cosine(x, y) if comparable_latents else None,
        conv_turned=None if one is None else _cosine(one, np.roll(one, 1, axis=0)),
        embed_turned=_mean_cosine(x, turned),
        embed_unrelated=_mean_cosine(x, np.roll(y, 1, axis=0)) if comparable_latents else None,
        n=len(pictures),
    )


def _embeddings(encoder: Encoder, pictures: Pictures) -> Latents:
    out = []
    for at in range(0, len(pictures), encoder.batch):
        here = pictures[at : at + encoder.batch]
        batch = blank_batch(encoder)
        batch[: len(here)] = here
        out.append(encoder.encode(batch, np.full(encoder.batch, -1))[: len(here)])
    return np.concatenate(out)


def _last_convolution(encoder: Encoder) -> Any:
    """Return the (out, in, h, w) weights of the encoder's last convolution, or None of no network."""
    import torch

    model = getattr(encoder, "model", None)
    if model is None:
        return None
    layers = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    return layers[-1].weight.detach().float().cpu().numpy()


def _cosine(a: Any, b: Any) -> float:
    a, b = (np.asarray(v, np.float64).ravel() for v in (a, b))
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0


def _mean_cosine(x: Latents, y: Latents) -> float:
    return float(np.mean([_cosine(a, b) for a, b in zip(x, y, strict=True)]))
