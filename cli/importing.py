"""What import does, without Typer: published latents into a store, a published weight into a Projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.render import counted, printable
from cli.settling import check_writable, replaced
from latentstore.encode import EncodeSummary
from latentstore.errors import UsageError
from latentstore.features import PUBLISHED_SHAPE, Features
from latentstore.importing import Origin, import_features
from latentstore.schema import LATENTS, Posterior
from latentstore.store import exists, locate, open_store
from solvers.projection import Projection
from solvers.weight import SAFETENSORS, TORCH_SUFFIXES

Shape = tuple[int, int, int]
SUFFIXES = (*TORCH_SUFFIXES, SAFETENSORS)


def parse_shape(text: str) -> Shape:
    """Return the latents' shape as ``--latent-shape`` has it.

    Raises
    ------
    UsageError
    """
    try:
        channels, height, width = (int(word) for word in text.split(","))
    except ValueError:
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise UsageError(
            f"--latent-shape is {text!r}; it must be channels, height and width between commas: 4,32,32."
        )
    return channels, height, width


def is_weight(published: Path) -> bool:
    """Tell whether a weight is named, and not a folder of features."""
    return published.is_file() or (not published.is_dir() and published.suffix.lower() in SUFFIXES)


@dataclass(frozen=True)
class Said:
    """What the user says of the published latents. What is left open comes from the store, where it is there.

    Attributes
    ----------
    encoder_name : str or None
        The name of the encoder: a space of its own.
    space_of : Path or None
        A store whose space the latents are said to be of.
    latent_shape, image_size, posterior
        Of a space that is only named.
    """

    encoder_name: str | None = None
    space_of: Path | None = None
    latent_shape: Shape | None = None
    image_size: int | None = None
    posterior: Posterior | None = None

    def origin(self, store: Path) -> Origin:
        """Return what stands in the encoder's place.

        Raises
        ------
        UsageError
            Neither a name nor a store, or both.
        """
        named = self.encoder_name is not None or self._details()
        if self.space_of is not None:
            if named:
                given = "--encoder-name" if self.encoder_name is not None else self._details()[0]
                raise UsageError(
                    f"--space-of {self.space_of} says all of the latents' space; leave {given} out."
                )
            return Origin.of_store(open_store(self.space_of))
        if exists(store) and locate(store)[1] == LATENTS:
            present = open_store(store)
            if not named:
                return Origin(present.space, present.provenance.get("encoder", {}), "")
            if self.encoder_name is None:
                raise UsageError(
                    f"{self._details()[0]} is settled in {store}; leave it out to go on, or give "
                    "--encoder-name with it and another --store."
                )
        if self.encoder_name is None:
            raise UsageError(
                "Whose latents these are must be said, for only latents of one encoder may meet. Name it: "
                "--encoder-name stabilityai/stable-diffusion-2, say; or name a store that was made with it: "
                "--space-of STORE."
            )
        return Origin.named(
            self.encoder_name,
            latent_shape=self.latent_shape or PUBLISHED_SHAPE,
            image_size=self.image_size or 256,
            posterior=self.posterior or "sample",
        )

    def _details(self) -> list[str]:
        given = {
            "--latent-shape": self.latent_shape,
            "--image-size": self.image_size,
            "--posterior": self.posterior,
        }
        return [name for name, value in given.items() if value is not None]


def run_import(
    folder: Path,
    store: Path,
    said: Said,
    *,
    manifest: Path | None = None,
    dtype: str | None = None,
    shard_rows: int | None = None,
    codec: str | None = None,
    follow_links: bool = False,
    **options: Any,
) -> EncodeSummary:
    """Read a folder of features, or those that a manifest lists, into a store; run again, it goes on.

    ``options`` are :func:`~latentstore.importing.import_features`'s.

    Raises
    ------
    UsageError
        Another dtype, shard size or codec than the existing store's, or as ``import_features``.
    SpaceMismatchError
    """
    origin = said.origin(store)
    if exists(store):
        layout = open_store(store).layout
        settled = (
            ("dtype", dtype, layout.dtype),
            ("shard-rows", shard_rows, layout.shard_rows),
            ("codec", codec, layout.codec),
        )
        for name, asked, has in settled:
            if asked not in (None, has):
                raise UsageError(
                    f"--{name} is {asked}, but {store} was made with {has}; it is settled when a store is "
                    f"made. Leave --{name} out to go on, or choose another --store."
                )
    source = Features(folder, manifest, follow_links, latent_shape=origin.space.latent_shape)
    return import_features(
        source, store, origin, dtype=dtype or "float16", shard_rows=shard_rows, codec=codec, **options
    )


def run_import_weight(
    weight: Path,
    out: Path,
    *,
    space_of: Path | None = None,
    latent_shape: Shape | None = None,
    key: str | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Projection:
    """Write a published weight as a Projection.

    Parameters
    ----------
    weight : Path
    out : Path
    space_of : Path, optional
        The store whose latents it is for: it is then refused for those of any other space. Without it the
        space is unknown, and any latents of the right length are taken.
    latent_shape : (C, H, W), optional
        Of the latents, where no store tells; their length tells how the weight is turned.
    key : str, optional
        The tensor, where the file holds several.
    on_note : callable, optional
        Called with what else is to be told: that another W was replaced.

    Raises
    ------
    UsageError
    ProjectionFormatError
    """
    check_writable(out)
    if not weight.is_file():
        raise UsageError(f"There is no weight {weight} (looked in {Path.cwd()}).")
    if out.suffix != SAFETENSORS:
        raise UsageError(f"--out is {out}; a projection is a .safetensors file.")
    if out.exists() and out.samefile(weight):
        raise UsageError(f"--out {out} is the weight itself; name another file.")
    space = None if space_of is None else open_store(space_of).space
    if space is not None and latent_shape is not None:
        raise UsageError(f"--space-of {space_of} says the latents' shape; leave --latent-shape out.")
    dim = math.prod(latent_shape or PUBLISHED_SHAPE) if space is None else space.dim
    W = Projection.from_weight(weight, dim=dim, key=key, space_id="" if space is None else space.id)
    notes = _replaced(out, W)
    W.save(out)
    if on_note is not None:
        for note in notes:
            on_note(note)
    return W


def _replaced(out: Path, W: Projection) -> list[str]:
    """Say that another W stood where one is about to be written. Imported ones are told by their numbers."""
    notes = replaced(out, W)
    if notes or not out.exists():
        return notes
    old = Projection.load(out)
    if old.query_map.shape == W.query_map.shape and (old.query_map == W.query_map).all():
        return []
    shape = " x ".join(str(n) for n in old.query_map.shape)
    return [f"{out} was replaced: it held another W ({old.method}, {shape})."]


def imported(summary: EncodeSummary) -> str:
    """Return what an import did, in a few lines."""
    total = summary.seconds.get("total", 0.0)
    lines = [f"{summary.store}: {counted(summary.rows, 'row')}"]
    if summary.encoded:
        rate = f", {summary.encoded / total:,.0f} rows/s" if total > 0 else ""
        lines.append(f"  imported {summary.encoded:,} now in {total:.1f} s{rate}")
    if summary.rows > summary.encoded:
        lines.append(f"  {summary.rows - summary.encoded:,} were there already")
    if summary.appended:
        lines.append(f"  {summary.appended:,} new files were appended behind the others")
    bad = {status: n for status, n in summary.counts.items() if status != "ok"}
    lines.append(f"  {summary.counts.get('ok', 0):,} ok" + "".join(f", {n:,} {s}" for s, n in bad.items()))
    lines += [f"    {printable(path)}: {status}: {reason}" for path, status, reason in summary.bad]
    more = sum(bad.values()) - len(summary.bad)
    if summary.bad and more > 0:
        lines.append(f"    and {more:,} more; all are in the manifest")
    if "link_outside" in bad:
        lines.append("    --follow-links accepts links that lead out of the folder")
    if bad.keys() - {"removed"} and not summary.encoded:
        lines.append("    --retry-bad reads files that were mended")
    if summary.changed:
        counts = ", ".join(f"{n:,} {what}" for what, n in summary.changed.items())
        named = ", ".join(printable(path) for path, _ in summary.changed_first)
        lines.append(f"  Warning: committed files are not as they were read: {counts} ({named}). Their rows")
        lines.append("  are kept; --retry-changed reads those that hold something else.")
    return "\n".join(lines)


def imported_weight(W: Projection, out: Path) -> str:
    """Return what is known of a weight that was written as a Projection, and what is not."""
    facts = W.provenance
    shape = " x ".join(str(n) for n in facts["shape"])
    called = f" ({printable(facts['key'])})" if facts["key"] else ""
    space = f"of space {W.space_id}" if W.space_id else "of any space: none was named (--space-of STORE)"
    lines = [
        f"{out}: {shape}{called} of {facts['file']}, for latents of {W.dim} numbers to {W.rank}",
        f"  for latents {space}",
        "  What it was trained on is not known: evaluate cannot leave out the identities that it has seen.",
    ]
    if facts["left_out"]:
        lines.append(f"  Not used of the file: {printable(', '.join(facts['left_out'][:8]))}")
    return "\n".join(lines)
