"""The pictures behind a store's rows, read again where they were read then: for reports and attacks."""

from __future__ import annotations

import base64
import io
from functools import cached_property
from typing import Any

import pyarrow as pa
from PIL import Image

from latentstore.errors import ImageError
from latentstore.images import decode
from latentstore.sources import Source, SourceError
from latentstore.store import LatentStore

SIDE = 160
"""Pixels of a thumbnail's longer side."""


class Pictures:
    """A store's pictures, by row.

    Parameters
    ----------
    store : LatentStore
        One made from images: the rows of imported and simulated stores have no pictures.
    """

    def __init__(self, store: LatentStore) -> None:
        self.store = store

    @cached_property
    def _source(self) -> Source:
        return Source.recorded(self.store.origin)

    @cached_property
    def _inputs(self) -> pa.Table:
        return self.store.inputs().select(["path", "path_raw"])

    @cached_property
    def _sha256(self) -> list[Any]:
        found: list[Any] = self.store.manifest(["sha256"])["sha256"].to_pylist()
        return found

    def read(self, row: int) -> Image.Image:
        """Return a row's picture, upright and in RGB, in its own size.

        Raises
        ------
        ImageError
            It is gone, unreadable, or no longer the file that was encoded.
        SourceError
            A URL does not answer.
        """
        if self.store.kind != "images":
            raise ImageError("missing", f"rows of a store of {self.store.kind} latents have no picture")
        facts = self._source.read(self._inputs.slice(row, 1).to_pylist()[0])
        known = self._sha256[row]
        if known and facts.sha256 != known:
            raise ImageError("changed", "the file is not the one that was encoded")
        return decode(facts.data)[0]

    def thumbnail(self, row: int, side: int = SIDE) -> str:
        """Return a row's picture as a small ``data:`` URI, or an empty string where there is none."""
        try:
            return thumbnail_uri(self.read(row), side)
        except (ImageError, SourceError):
            return ""


def thumbnail_uri(image: Image.Image, side: int = SIDE) -> str:
    """Return an RGB image, ``side`` pixels at most, as the ``data:`` URI of a JPEG."""
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
