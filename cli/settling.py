"""What is settled before a solve, and said beside it: files, processes, the start, the rank, the shape."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from cli import choosing
from cli.collection import Collection
from cli.knobs import AUTO, STORED, SolveOptions, has_rank
from latentstore.errors import UsageError
from solvers.distributed import World
from solvers.errors import SolverError
from solvers.methods import get
from solvers.projection import Projection


def load_projection(
    path: Path, without: str = "leave --projection out to use the collection's own analytic map"
) -> Projection:
    """Load a Projection; ``without`` says what else can be done.

    Raises
    ------
    UsageError
        There is no such file.
    """
    if not path.is_file():
        raise UsageError(
            f"There is no projection {path} (looked in {Path.cwd()}). Make one with solve, or {without}."
        )
    return Projection.load(path)


def check_writable(out: Path, name: str = "--out") -> None:
    """Refuse before any work what could not be written after it.

    Raises
    ------
    UsageError
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder; {name} names the file to write.")
    if not out.parent.is_dir():
        raise UsageError(f"{name} is {out}, but there is no folder {out.parent}. Make it, or choose another.")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"{name} is {out}, but the folder {out.parent.absolute()} cannot be written to.")


def check_files(**named: Path | None) -> None:
    """Check every file that was named, by the option that names it.

    Raises
    ------
    UsageError
    """
    for name, path in named.items():
        if path is not None:
            check_writable(path, f"--{name}")
            if name == "plot" and path.suffix.lower() != ".png":
                raise UsageError(f"--plot is {path}; the picture is a PNG. Give the name such an ending.")


def check_start(options: SolveOptions, init: Path | None) -> None:
    """Refuse two starts of one W.

    Raises
    ------
    UsageError
    """
    if init is not None and "weight_init" in options.recipe:
        raise UsageError("--init says where W starts, and so does --weight-init. Leave one of them out.")


def default_out(options: SolveOptions) -> Path:
    """Return where W goes where no file was named: ``W-METHOD-RANK.safetensors``."""
    own_rank = options.method != AUTO and has_rank(options.method)
    rank = f"-{options.rank}" if own_rank else ""
    return Path(f"W-{options.method}{rank}.safetensors")


def world(options: SolveOptions) -> World | None:
    """Join the processes that torchrun started; a closed form has no use for them.

    Raises
    ------
    UsageError
    """
    trained = options.method != AUTO and get(options.method).needs_torch
    if trained:
        return World.from_environment(options.recipe.get("device", "auto"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and --method {options.method} is solved "
            "by one. Run it without torchrun; cosface alone trains in several."
        )
    return None


def start(path: Path, collection: Collection) -> Projection:
    """Return the map that a training run starts at.

    Raises
    ------
    UsageError, SpaceError
        There is none, or it is not one of these latents.
    """
    init = load_projection(path, "leave --init out")
    init.check_space(collection.store.space.id)
    if init.dim != collection.store.layout.dim:
        raise UsageError(
            f"--init {path} takes latents of {init.dim} numbers, and those of {collection.store.path} have "
            f"{collection.store.layout.dim}. Solve a W for these latents first."
        )
    return init


def settled_rank(options: SolveOptions, dim: int, init: Projection | None) -> tuple[SolveOptions, list[str]]:
    """Return the options with a rank that can be had, and what is to be said of it.

    Raises
    ------
    UsageError
        A rank was named, and the map to start at has fewer columns.
    """
    if options.method == AUTO or not has_rank(options.method) or isinstance(options.rank, str):
        return options, []
    limits = [(dim, f"the latents have {dim} dimensions")]
    if init is not None:
        limits.append((init.rank, f"the map of --init has {init.rank} columns"))
    most, why = min(limits)
    if options.rank <= most:
        return options, []
    if not options.rank_named:
        note = f"W has rank {most}, not the usual {options.rank}: {why}."
        return replace(options, rank=most), [note]
    if most < dim:
        raise UsageError(f"--rank is {options.rank}, and {why}. Ask for at most {most}, or leave --init out.")
    return options, []  # refused with the method's own words


def replaced(out: Path, projection: Projection) -> list[str]:
    """Say that a W of other data stood where one is about to be written; nothing where it was of the same."""
    if not out.exists():
        return []
    try:
        old = Projection.load(out)
    except (SolverError, OSError):
        return [f"{out} was replaced: it held something else than a projection."]
    if old.data_hash == projection.data_hash:
        return []
    made = " ".join(filter(None, [old.provenance.get("store"), old.provenance.get("created")]))
    return [f"{out} was replaced: it held a W of other data (fitted on {made or 'unnamed data'})."]


def at_an_edge(options: SolveOptions, choices: list[dict[str, Any]]) -> list[str]:
    """Say that the chosen ridge is the first or last of those tried, where it beat its neighbours."""
    best = next((c for c in choices if c.get("chosen")), None)
    lam = None if best is None or "lam" in options.knobs else best["knobs"].get("lam")
    if best is None or lam not in (choosing.LAMBDAS[0], choosing.LAMBDAS[-1]):
        return []
    rest = {k: v for k, v in best["knobs"].items() if k != "lam"}
    others = [
        c["map"]
        for c in choices
        if c["method"] == best["method"]
        and c["rank"] == best["rank"]
        and c["knobs"].get("lam") not in (None, lam)
        and {k: v for k, v in c["knobs"].items() if k != "lam"} == rest
    ]
    if not others or best["map"] <= max(others):
        return []
    further = 10 * lam if lam == choosing.LAMBDAS[-1] else lam / 10
    text = (
        f"The λ that did best on validation, {lam:g}, lies at the edge of those tried "
        f"({choosing.LAMBDAS[0]:g} to {choosing.LAMBDAS[-1]:g}): try --lam {further:g} beside it."
    )
    return [text]


def with_shape(options: SolveOptions, collection: Collection) -> SolveOptions:
    """Return the options with the encoder's shape where it was asked for.

    Raises
    ------
    UsageError
        A shape was named that is not the encoder's.
    """
    asked, own = options.knobs.get("latent_shape"), tuple(collection.store.space.latent_shape)
    if asked == STORED:
        return replace(options, knobs={**options.knobs, "latent_shape": own})
    # A space whose shape is not known has all its numbers in one row.
    if asked is not None and own[1:] != (1, 1) and tuple(asked) != own:
        shapes = [",".join(map(str, shape)) for shape in (asked, own)]
        raise UsageError(
            f"--latent-shape is {shapes[0]}, and the encoder of {collection.store.path} gives {shapes[1]}. "
            "Leave the numbers to the store: --latent-shape store."
        )
    return options
