"""What is translated: originals of a folder, a manifest or a store, under which prompts, from which seeds."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from latentstore import images
from latentstore.errors import ImageError, ManifestError, UsageError
from latentstore.manifest import is_url
from latentstore.schema import OK, canonical_json
from latentstore.sources import Source
from latentstore.store import open_store

HOW_TO_PROMPT = (
    "Give --prompt TEXT (several are shared out), --prompts FILE.csv with the columns path or identity, and "
    "prompt (several rows of an image are several prompts), or originals whose manifest has a column prompt."
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Original:
    """One original: its row in the list, and what that says of it."""

    row: int
    path: str
    identity: str
    group: str
    role: str
    split: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Job:
    """One translation of an original, by whatever model and strength; ``k`` counts from 1."""

    original: Original
    k: int
    prompt: str


class Originals:
    """The origins and references of a list of images, with their pictures.

    Parameters
    ----------
    source : Source
    inputs : pyarrow.Table
        Of :data:`~latentstore.manifest.INPUT_SCHEMA`.
    sha256 : sequence of str, optional
        Of each row's file when it was encoded; an empty one stands for a row without a picture.
    max_pixels : int

    Attributes
    ----------
    listed : list of Original
        Every usable one, in the order of the list.
    unusable : list of (path, why)
        Those that no manifest can name.
    """

    def __init__(
        self,
        source: Source,
        inputs: pa.Table,
        *,
        sha256: Sequence[str] | None = None,
        max_pixels: int = images.MAX_PIXELS,
    ) -> None:
        self._source, self._inputs, self._sha256, self._max_pixels = source, inputs, sha256, max_pixels
        self.listed: list[Original] = []
        self.unusable: list[tuple[str, str]] = []
        columns = [
            inputs[name].to_pylist() for name in ("path", "identity", "group", "role", "split", "prompt")
        ]
        raw = inputs["path_raw"].to_pylist()
        for row, (path, identity, group, role, split, prompt) in enumerate(zip(*columns, strict=True)):
            if role not in ("origin", "reference") or (sha256 is not None and not sha256[row]):
                continue
            if raw[row] is not None:
                self.unusable.append((path, "its name is not UTF-8, and no manifest can hold it"))
            else:
                self.listed.append(Original(row, path, identity, group, role, split, prompt or ""))

    @classmethod
    def of_store(cls, path: Path) -> Originals:
        """Take the valid originals of a store that was made from images.

        Raises
        ------
        UsageError
            Its rows have no pictures.
        StoreIncompleteError
        """
        store = open_store(path)
        store.require_complete()
        if store.kind != "images":
            raise UsageError(
                f"{path} holds {store.kind} latents, and pictures are translated. Name a store made by "
                "latentstore encode, or the folder of the images."
            )
        ok = store.status() == OK
        held = store.manifest(["sha256"])["sha256"].to_pylist()
        return cls(
            Source.recorded(store.origin),
            store.inputs(),
            sha256=[known if valid else "" for known, valid in zip(held, ok, strict=True)],
            max_pixels=int(store.provenance.get("max_pixels") or images.MAX_PIXELS),
        )

    @classmethod
    def of_source(cls, source: Source) -> Originals:
        """Take the originals that a folder, tar shards, a URL or a manifest list."""
        inputs = source.list()
        source.require_some(inputs)
        return cls(source, inputs)

    @property
    def named(self) -> dict[str, str | None]:
        """Where they come from, to be compared with an earlier run."""
        here = self._source.describe()
        return {"root": here["root"], "manifest": here["manifest"]}

    def of_identity(self) -> dict[str, Original]:
        """Return the one original of each identity that is translated: the first origin, else reference."""
        found: dict[str, Original] = {}
        for original in self.listed:
            held = found.setdefault(original.identity, original)
            if held.role != "origin" and original.role == "origin":
                found[original.identity] = original
        return found

    def picture(self, original: Original, size: int) -> npt.NDArray[np.uint8]:
        """Return an original's (size, size, 3) pixels, resized as an encoder sees it.

        Raises
        ------
        ImageError
            It cannot be read, or is not the file that the store was made of.
        SourceError
            A URL does not answer.
        """
        listed = self._inputs.slice(original.row, 1).to_pylist()[0]
        found = self._source.load(listed, size, max_pixels=self._max_pixels)
        if self._sha256 is not None and found.sha256 != self._sha256[original.row]:
            raise ImageError("changed", "the file is not the one that was encoded")
        return found.rgb

    def is_there(self, original: Original) -> bool:
        """Tell whether a file on this machine is there and inside its folder; of others it is taken so."""
        source = self._source
        if source.is_remote(original.path):
            return True
        # A manifest's absolute paths may lead anywhere, those of a folder may not.
        if isinstance(source.root, Path) and not (source.follow_links or original.path.startswith("/")):
            place = source.root / original.path
            if not place.resolve().is_relative_to(source.root.resolve()):
                return False
        try:
            source.stat(self._inputs.slice(original.row, 1).to_pylist()[0])
        except ImageError:
            return False
        return True

    def location(self, original: Original) -> str:
        """Return a path or URL that means the same in a manifest elsewhere."""
        root = self.named["root"]
        plain = is_url(original.path) or original.path.startswith("/")
        return original.path if plain else f"{str(root).rstrip('/')}/{original.path}"


@dataclass(frozen=True)
class Prompts:
    """The prompts of each original.

    Attributes
    ----------
    shared : tuple of str
        Of every original; empty where each has its own.
    own : mapping
        Identity → prompts, in their order.
    seed : int
        Of which shared prompt an original begins with.
    strangers : int
        Rows of a file of prompts that name no original.
    """

    shared: tuple[str, ...] = ()
    own: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seed: int = 0
    strangers: int = 0

    def jobs(self, original: Original, per_origin: int | None) -> Iterator[Job]:
        """Yield the translations of an original: each of its prompts once, or as many as are asked for.

        Shared prompts are begun with at another place for each original, so that one translation of each
        uses all of them; own ones are taken in their order. After the last the first follows, with
        another seed.
        """
        prompts = self.shared or self.own.get(original.identity, ())
        first = draw(self.seed, original.identity) % len(prompts) if self.shared else 0
        for k in range(1, (per_origin or len(prompts)) + 1 if prompts else 1):
            yield Job(original, k, prompts[(first + k - 1) % len(prompts)])


def find_prompts(originals: Originals, prompt: Sequence[str], prompts: Path | None, seed: int) -> Prompts:
    """Return the prompts that are given, or those of the originals' own manifest.

    Raises
    ------
    UsageError
        There are none, or two kinds.
    ManifestError
        The file cannot be used.
    """
    if prompt and prompts is not None:
        raise UsageError(f"--prompt and --prompts {prompts} are both given. Leave one of the two out.")
    if prompt:
        return Prompts(shared=tuple(prompt), seed=seed)
    if prompts is not None:
        return _read_prompts(originals, prompts)
    own = {i: (o.prompt,) for i, o in originals.of_identity().items() if o.prompt}
    if not own:
        raise UsageError(f"No prompt is given, and the originals' list has none. {HOW_TO_PROMPT}")
    return Prompts(own=own)


def _read_prompts(originals: Originals, path: Path) -> Prompts:
    if not path.exists():
        raise ManifestError(f"There is no file of prompts {path} (looked in {Path.cwd()}). {HOW_TO_PROMPT}")
    try:
        if path.suffix.lower() == ".csv":
            types = {name: pa.string() for name in ("path", "identity", "prompt")}
            table = pacsv.read_csv(
                path,
                # Only an empty cell is empty: "NA" is a name like any other.
                convert_options=pacsv.ConvertOptions(
                    column_types=types, strings_can_be_null=True, null_values=[""]
                ),
                parse_options=pacsv.ParseOptions(newlines_in_values=True),
            )
        else:
            table = pq.read_table(path)
    except (pa.ArrowException, OSError) as exc:
        raise ManifestError(
            f"{path} is not a readable CSV or Parquet file: {str(exc).splitlines()[0].rstrip('.')}."
        ) from exc
    names = [name for name in ("identity", "path") if name in table.column_names]
    if not names or "prompt" not in table.column_names:
        raise ManifestError(
            f"{path} has the columns {', '.join(table.column_names)}; path or identity, and prompt, are "
            "needed."
        )
    by_path = {original.path: original.identity for original in originals.listed}
    known = originals.of_identity().keys()
    own: dict[str, list[str]] = {}
    strangers: Counter[str] = Counter()
    for number, row in enumerate(table.select([*names, "prompt"]).to_pylist(), 1):
        if not row["prompt"]:
            raise ManifestError(f"{path}: row {number} has an empty prompt.")
        named = str(row.get("identity") or row.get("path") or "")
        identity = named if row.get("identity") else by_path.get(named, "")
        if identity in known:
            own.setdefault(identity, []).append(str(row["prompt"]))
        else:
            strangers[named] += 1
    if not own:
        raise ManifestError(
            f"None of the {table.num_rows} rows of {path} names an original (the first: "
            f"{next(iter(strangers), '')!r}; the originals' first: {next(iter(known), 'none')!r}). Name "
            "paths or identities as the originals' folder or store lists them."
        )
    return Prompts(own=own, strangers=strangers.total())


def choose(
    originals: Originals, prompts: Prompts, *, split: str | None, limit: int | None, seed: int
) -> tuple[list[Original], int]:
    """Choose the originals to translate: those of a split that have prompts, in an order drawn by the seed.

    A larger limit adds to the smaller one's.

    Returns
    -------
    chosen, how many have no prompt

    Raises
    ------
    UsageError
        None is left.
    """
    here = [o for o in originals.of_identity().values() if split in (None, o.split)]
    prompted = [o for o in here if prompts.shared or o.identity in prompts.own]
    if not prompted:
        of = f" of the {split} split" if split else ""
        raise UsageError(
            f"There is nothing to translate: {len(here)} originals{of}, and none of them has a prompt. "
            f"{HOW_TO_PROMPT}"
        )
    ordered = sorted(prompted, key=lambda o: (draw(seed, o.identity), o.identity))
    return ordered[:limit], len(here) - len(prompted)


def draw(*of: object) -> int:
    """Return a number below 2^63 that is drawn by all that it is told, and by nothing else."""
    digest = hashlib.sha256(canonical_json(["latentstore translate 1", *of]).encode())
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def file_name(model: str, strength: float, identity: str, k: int) -> str:
    """Return a translation's path in its folder; one that is no plain name gets a part of its hash."""
    stem = identity
    if not _PLAIN_NAME.fullmatch(identity):
        mark = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        stem = f"{_NOT_PLAIN.sub('-', identity)[:80].strip('.-')}-{mark}".lstrip("-")
    return f"{model}/{strength!r}/{stem}_{k}.jpg"
