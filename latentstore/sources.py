"""Where the images of a store come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentstore import images
from latentstore.errors import UsageError
from latentstore.manifest import list_folder, list_manifest


@dataclass(frozen=True)
class Source:
    """Where the images come from.

    Attributes
    ----------
    root : Path
        Folder that the listed paths are relative to.
    manifest : Path or None
        The list, when it is not the folder's own contents.
    follow_links : bool
        Accept links that lead out of ``root``.
    """

    root: Path
    manifest: Path | None = None
    follow_links: bool = False

    @classmethod
    def of(cls, folder: Path | None, manifest: Path | None, *, follow_links: bool = False) -> Source:
        """Take a folder, or a manifest whose paths are relative to the folder (by default its own)."""
        if manifest is not None:
            return cls(folder or manifest.parent, manifest, follow_links)
        return cls(folder or Path("images"), None, follow_links)

    def list(self) -> pa.Table:
        """List the inputs, sorted."""
        if self.manifest is not None:
            return list_manifest(self.manifest)
        return list_folder(self.root, follow_links=self.follow_links)

    def require_some(self, inputs: pa.Table) -> None:
        """Refuse a list of which nothing is there: the folder it is relative to is likely another.

        Raises
        ------
        UsageError
        """
        if self.manifest is None:
            return
        paths = inputs["path"].to_pylist()
        if not any((self.root / p).exists() for p in paths):
            raise UsageError(
                f"None of the {len(paths)} files that {self.manifest} lists is there; its paths were taken "
                f"as relative to {self.root.absolute()} (the first: {paths[0]}). Name the folder they are "
                f"relative to: latentstore encode FOLDER --manifest {self.manifest}."
            )

    def load(
        self, listed: Mapping[str, Any], size: int, *, max_pixels: int = images.MAX_PIXELS
    ) -> images.Pixels:
        """Read, hash, decode and resize one listed image.

        Parameters
        ----------
        listed : mapping
            ``path`` and ``path_raw`` of :data:`~latentstore.manifest.INPUT_SCHEMA`.
        size : int
            Side of the square result, in pixels.
        max_pixels : int

        Raises
        ------
        ImageError
            With the row's ``status`` and ``reason``.
        """
        raw = listed.get("path_raw")
        name = os.fsdecode(raw) if raw is not None else str(listed["path"])
        # An absolute path in a manifest is meant; a relative one stays in the folder.
        anywhere = self.follow_links or Path(name).is_absolute()
        return images.load(
            self.root / name, size, root=None if anywhere else self.root, max_pixels=max_pixels
        )

    def describe(self) -> dict[str, Any]:
        """Return what the store records of its source."""
        return {
            "root": str(self.root.absolute()),
            "manifest": None if self.manifest is None else str(self.manifest.absolute()),
            "follow_links": self.follow_links,
        }
