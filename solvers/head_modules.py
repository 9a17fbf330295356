"""The heads as torch modules; `heads` builds them. Importing this module imports torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .gallery_maps import random_orthonormal
from .heads import HeadSpec

ATTENTION_HEADS = 4
"""Heads of the attention layer, and values of a query or key of each."""
ATTENTION_WIDTH = 16
_FLOAT = 4


class Head(nn.Module):
    """A map of latents (b, dim) to embeddings (b, rank).

    Attributes
    ----------
    spec
        What it was built from.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self._rng = np.random.default_rng(spec.seed)

    def _gaussian(self, *shape: int, deviation: float) -> Any:
        """Return a parameter of seeded draws: torch's own initialisations use its global generator."""
        return nn.Parameter(torch.from_numpy(deviation * self._rng.standard_normal(shape)).float())

    def _linear(self) -> Any:
        """Return W (dim, rank) with orthonormal columns."""
        start = random_orthonormal(self.spec.dim, self.spec.rank, self.spec.seed)
        return nn.Parameter(torch.from_numpy(start.astype(np.float32)))

    @property
    def parameter_count(self) -> int:
        """Numbers that training sets."""
        return sum(p.numel() for p in self.parameters())

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one row, forward: one for every number of a matrix unless it is used again."""
        return self.parameter_count

    @property
    def row_bytes(self) -> int:
        """Bytes that a training step holds for a row, gradients counted, beside the row and its embedding."""
        return 0


class Linear(Head):
    """W alone: x W."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        self.weight = self._linear()

    def forward(self, x: Any) -> Any:
        """Return the embeddings of rows."""
        return x @ self.weight


class Mlp(Head):
    """W, then layers with ReLU and residual connections: h ← h + relu(h) W_i."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        self.weight = self._linear()
        # Small enough that a deep head starts as a slight change of x W, whatever its depth.
        deviation = 1.0 / (spec.layers * math.sqrt(spec.rank))
        self.residual = nn.ParameterList(
            self._gaussian(spec.rank, spec.rank, deviation=deviation) for _ in range(spec.layers - 1)
        )

    def forward(self, x: Any) -> Any:
        """Return the embeddings of rows."""
        h = x @ self.weight
        for matrix in self.residual:
            h = h + functional.relu(h) @ matrix
        return h

    @property
    def row_bytes(self) -> int:
        """Of every layer the rectified values, and a sum."""
        return _FLOAT * self.spec.rank * (len(self.residual) + 1)


class Convolution(Head):
    """One convolution of the latent, its channels and positions flattened to the embedding."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        assert spec.latent_shape is not None  # noqa: S101 - HeadSpec refuses that
        self.shape = channels, height, width = spec.latent_shape
        self.stride = next(
            s for s in range(1, max(height, width) + 1) if spec.rank % _positions(height, width, s) == 0
        )
        self.positions = _positions(height, width, self.stride)
        side = max(3, 2 * self.stride - 1)
        fan_in = channels * side * side
        self.weight = self._gaussian(
            spec.rank // self.positions, channels, side, side, deviation=1.0 / math.sqrt(fan_in)
        )

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one row, forward: the kernel at every position."""
        return self.parameter_count * self.positions

    @property
    def row_bytes(self) -> int:
        """Image and results, each with its gradient or a copy in the library's layout."""
        return _FLOAT * 2 * (self.spec.dim + self.spec.rank)

    def forward(self, x: Any) -> Any:
        """Return the embeddings of rows."""
        image = x.reshape(len(x), *self.shape)
        padding = self.weight.shape[-1] // 2
        return functional.conv2d(image, self.weight, stride=self.stride, padding=padding).flatten(1)


class Attention(Head):
    """Multi-head self-attention over positions with a residual connection, then W."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        assert spec.latent_shape is not None  # noqa: S101 - HeadSpec refuses that
        channels, height, width = spec.latent_shape
        self.tokens, inner = height * width, ATTENTION_HEADS * ATTENTION_WIDTH
        self.inward = self._gaussian(channels, 3 * inner, deviation=1.0 / math.sqrt(channels))
        self.outward = self._gaussian(inner, channels, deviation=1.0 / math.sqrt(inner))
        self.weight = self._linear()

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one row, forward: projections of every token, all pairs of tokens twice, W."""
        per_token = self.inward.numel() + self.outward.numel()
        pairs = 2 * self.tokens * self.tokens * ATTENTION_HEADS * ATTENTION_WIDTH
        return self.tokens * per_token + pairs + self.weight.numel()

    @property
    def row_bytes(self) -> int:
        """Queries, keys, values, what is mixed (in two layouts) and the tokens, each with its gradient.

        The pairs of tokens are not held: torch computes them in blocks.
        """
        channels, inner = self.outward.shape[1], self.outward.shape[0]
        return _FLOAT * 2 * self.tokens * (5 * inner + 4 * channels)

    def forward(self, x: Any) -> Any:
        """Return the embeddings of rows."""
        channels = self.inward.shape[0]
        tokens = x.reshape(len(x), channels, self.tokens).transpose(1, 2)
        parts = (tokens @ self.inward).reshape(len(x), self.tokens, 3, ATTENTION_HEADS, ATTENTION_WIDTH)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + mixed.transpose(1, 2).flatten(2) @ self.outward
        return tokens.transpose(1, 2).flatten(1) @ self.weight


def _positions(height: int, width: int, stride: int) -> int:
    return -(-height // stride) * -(-width // stride)


CLASSES: dict[str, type[Head]] = {
    "linear": Linear,
    "mlp": Mlp,
    "convolution": Convolution,
    "attention": Attention,
}
