"""Which pictures are attacked, and how; and attacked pictures as files, to be encoded as queries."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cli.attack_tables import Step
from cli.collection import Collection, Rows
from cli.ranked import Asked
from cli.render import counted
from latentstore.attacks import FAMILIES, USUAL, Attack
from latentstore.errors import ImageError, UsageError
from latentstore.pictures import Pictures
from latentstore.schema import check_space
from latentstore.sources.places import SourceError

Count = Callable[[int, int], None]
NAMED = 3
"""Pictures that are named where some are left out."""


@dataclass(frozen=True)
class AttackOptions:
    """What is asked for.

    Attributes
    ----------
    attacks : str or None
        As :func:`parse_attacks` takes it.
    limit : int
        Queries at most, drawn with the seed.
    seed : int
        Of that draw; and, with a query's row, of its attacks.
    """

    attacks: str | None = None
    limit: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Chosen:
    """The pictures to attack.

    Attributes
    ----------
    asked : Asked
        Queries of one store.
    originals : bool
        Whether they are the originals themselves, for want of translations and queries.
    n_test : int
        Test pictures that could be asked for; those of ``asked`` were drawn from them.
    """

    asked: Asked
    originals: bool
    n_test: int

    @property
    def collection(self) -> Collection:
        """Whose pictures they are."""
        return self.asked.parts[0].collection

    @property
    def rows(self) -> Rows:
        """The (q,) rows."""
        return self.asked.parts[0].rows

    @property
    def described(self) -> str:
        """What they are called."""
        return "originals" if self.originals else "translations and queries"


@dataclass(frozen=True)
class Written:
    """A folder of attacked pictures: its manifest, how many, of how many queries, and those without any."""

    manifest: Path
    pictures: int
    queries: int
    lost: list[tuple[str, str]]
    originals: bool = False


def parse_attacks(text: str | None) -> list[Step]:
    """Return the attacks of a list like ``jpeg,blur=1:2:3``; None for the usual kinds, ``all`` for every one.

    A kind alone stands for its own intensities.

    Raises
    ------
    UsageError
        A name or an intensity that is none.
    """
    words = ",".join({None: USUAL, "all": tuple(FAMILIES)}.get(text, (text or "",)))
    out: dict[tuple[str, float], Step] = {}
    for word in words.split(","):
        name, equals, values = (part.strip() for part in word.partition("="))
        if name not in FAMILIES:
            near = difflib.get_close_matches(name, FAMILIES, 1)
            raise UsageError(
                f"--attacks names {name!r}, which is no attack{f' (is {near[0]} meant?)' if near else ''}. "
                f"There are {', '.join(FAMILIES)}, or all; intensities follow a name, as in jpeg=90:50:30."
            )
        family = FAMILIES[name]
        for value in _numbers(word, values) if equals else family.intensities:
            out[name, value] = Step(name, value, family.make(value))
    return list(out.values())


def _numbers(word: str, values: str) -> list[float]:
    try:
        return [float(value) for value in values.split(":")]
    except ValueError:
        raise UsageError(
            f"--attacks holds {word.strip()!r}; intensities are numbers between colons, as in jpeg=90:50:30."
        ) from None


def choose(gallery: Collection, queries: Path | None, options: AttackOptions) -> Chosen:
    """Choose the test pictures to attack: translations and queries, or where there are none the originals.

    The gallery's own originals alone stand in: a store that is named for its queries must hold some.

    Raises
    ------
    UsageError
        The store has no pictures, or of none in its test split can the origin be looked for.
    """
    asking = gallery if queries is None else Collection.open(queries)
    path = asking.store.path
    if asking.store.kind != "images":
        raise UsageError(
            f"{path} holds {asking.store.kind} latents, and attacks are made on pictures. Name a store made "
            "by latentstore encode, with --queries or --store."
        )
    check_space(asking.store.space.id, gallery.store.space.id, what=f"--queries {path}")
    found = asking.queries("test", "attacked", origins_elsewhere=queries is not None)
    originals = not len(found.rows)
    if originals and queries is not None:
        raise UsageError(
            f"--queries {path} holds no query in its test split: pictures of role translation or query. Name "
            "their role, their split and their origin's identity in a manifest when they are encoded, or "
            "leave --queries out to attack the pictures of --store."
        )
    if originals:
        found = replace(found, rows=asking.gallery[asking.split[asking.gallery] == "test"])
    asked = Asked.of(gallery, [found])
    if not len(asked):
        raise UsageError(
            f"{path} has {counted(len(found.rows), 'picture')} in its test split (one identity in ten, by "
            f"hash), and of none can the origin be looked for in {gallery.store.path}. Encode more pictures, "
            "or name a store of queries with --queries."
        )
    drawn = np.sort(np.random.default_rng(options.seed).permutation(len(asked))[: options.limit])
    part = replace(asked.parts[0], rows=asked.parts[0].rows[drawn])
    return Chosen(replace(asked, parts=(part,), labels=asked.labels[drawn]), originals, len(asked))


def write(
    store: Path,
    folder: Path,
    options: AttackOptions,
    *,
    queries: Path | None = None,
    on_start: Count = lambda todo, total: None,
    on_rows: Count = lambda rows, bad: None,
) -> Written:
    """Write the attacked test pictures of a store into a new folder, to be encoded as a store of queries.

    Parameters and errors as of :func:`cli.attacking.attack` and :func:`write_attacked`.
    """
    attacks = [step.attack for step in parse_attacks(options.attacks)]
    chosen = choose(Collection.open(store), queries, options)
    return write_attacked(chosen, attacks, folder, seed=options.seed, on_start=on_start, on_rows=on_rows)


def write_attacked(
    chosen: Chosen,
    attacks: Sequence[Attack],
    folder: Path,
    *,
    seed: int = 0,
    on_start: Count = lambda todo, total: None,
    on_rows: Count = lambda rows, bad: None,
) -> Written:
    """Write attacked pictures as PNG in their own size, with a manifest by which they are encoded as queries.

    The manifest, ``manifest.csv``, comes last and names path, identity, group, role, split and model (the
    attack). The same queries, attacks and seed give the same bytes.

    Raises
    ------
    UsageError
        The folder holds something, or cannot be made.
    """
    _make_empty(folder)
    collection, pictures = chosen.collection, Pictures(chosen.collection.store)
    lines: list[list[Any]] = []
    lost: list[tuple[str, str]] = []
    on_start(len(chosen.rows) * len(attacks), len(chosen.rows) * len(attacks))
    for row in chosen.rows.tolist():
        try:
            image = pictures.read(row)
        except (ImageError, SourceError) as exc:
            lost.append((str(collection.path[row]), str(exc)))
            on_rows(len(attacks), len(attacks))
            continue
        for number, made in enumerate(attacks):
            name = f"{row:08d}-{number:02d}.png"
            made(image, (seed, row)).save(folder / name)
            lines.append([name, collection.identity[row], collection.group[row], "query", "test", made.name])
            on_rows(1, 0)
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "identity", "group", "role", "split", "model"], *lines])
    return Written(manifest, len(lines), len(chosen.rows), lost, chosen.originals)


def _make_empty(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = next(folder.iterdir(), None)
    except OSError as exc:
        raise UsageError(f"--write is {folder}, and no folder can be made there: {exc.strerror}.") from exc
    if held is not None:
        raise UsageError(f"--write is {folder}, which holds {held.name} already. Name a new or empty folder.")


def listed(named: Sequence[tuple[str, str]]) -> str:
    """Return the first few pictures with what is wrong with them."""
    more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return "; ".join(f"{path}: {why}" for path, why in named[:NAMED]) + more
