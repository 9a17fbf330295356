"""What must not leak: splits, copies, and the identities that a map has seen. Looked at before any figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from cli.account import left_out_copies
from cli.collection import Collection
from cli.ranked import Asked
from cli.render import counted
from latentstore.results import Figure
from solvers.methods import METHODS
from solvers.projection import Projection

GROUP = "leakage check"
_SHOWN = 3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        What was counted.
    count : int
    sentence : str
        What was found, in plain words.
    finding : bool
        Whether a figure may be too good because of it, or cannot be known not to be.
    examples : list of str
        The first few names.
    """

    name: str
    count: int
    sentence: str
    finding: bool = False
    examples: list[str] = field(default_factory=list)

    @property
    def figure(self) -> Figure:
        """The count, for the results."""
        return Figure(self.name, float(self.count), role="note", group=GROUP, note=self.said)

    @property
    def said(self) -> str:
        """The sentence with its examples."""
        shown = ", ".join(self.examples[:_SHOWN])
        more = ", …" if len(self.examples) > _SHOWN else ""
        return f"{self.sentence} ({shown}{more})" if shown else self.sentence


def look(gallery: Collection, asked: Asked, maps: Mapping[str, Projection]) -> list[Check]:
    """Look for what would make figures too good.

    Parameters
    ----------
    gallery : Collection
    asked : Asked
        Of the test split, those already left out of whose origin a copy stands in an earlier one.
    maps : mapping of name to Projection

    Returns
    -------
    list of Check
        In the order in which they are said; a map that has seen what is asked is refused elsewhere.
    """
    stores = [gallery, *(p.collection for p in asked.parts if p.collection is not gallery)]
    return [
        _splits(stores, "identity", "identities"),
        _splits(stores, "group", "photos"),
        _copies(asked),
        *(_used(name, W, stores) for name, W in maps.items()),
        *_same_files(gallery, asked),
        _near(gallery),
    ]


def _splits(stores: Sequence[Collection], column: str, what: str) -> Check:
    """Count names that stand in more than one split."""
    tables = [
        pa.table({"name": getattr(c, column)[c.ok].astype(str), "split": c.split[c.ok].astype(str)})
        for c in stores
    ]
    found = pa.concat_tables(tables).group_by("name").aggregate([("split", "count_distinct")])
    leaking = found.filter(pc.greater(found["split_count_distinct"], 1))["name"].to_pylist()
    name = f"{what} in more than one split"
    if leaking:
        n = len(leaking)
        text = f"{n:,} of {found.num_rows:,} {what} stand in more than one split: list one for each"
        return Check(name, n, text, True, sorted(leaking))
    return Check(name, 0, f"None of {found.num_rows:,} {what} stands in more than one split")


def _copies(asked: Asked) -> Check:
    name = "queries left out, a copy of whose origin stands in an earlier split"
    if asked.n_copies:
        return Check(name, asked.n_copies, left_out_copies(asked.n_copies).removesuffix("."), True)
    return Check(name, 0, "No query's origin has a known copy in a split that was fitted or chosen on")


def _used(subject: str, W: Projection, stores: Sequence[Collection]) -> Check:
    """Say what a map has seen; one that has seen a reported identity was refused.

    Identities are names: of another store's they may be names of other pictures, or other names of these.
    """
    name, n = f"names that {subject} was fitted or chosen on", len(W.used_identities)
    known = W.method in METHODS
    if n:
        what = counted(n, "identity or photo", "identities and photos")
        if W.data_hash and W.data_hash not in {store.data_hash for store in stores}:
            source = f" ({W.provenance['store']})" if W.provenance.get("store") else ""
            text = (
                f"{subject} was fitted or chosen on {what}; by name none of them is asked, but they are of "
                f"data that is not given here{source}, whose names need not be these"
            )
            return Check(name, n, text, True)
        return Check(name, n, f"{subject} was fitted or chosen on {what}; none of them is asked")
    if known and not METHODS[W.method].needs_pairs:
        return Check(name, 0, f"{subject} learned from no pairs, and nothing was chosen for it")
    text = f"What {subject} was fitted on is not recorded: it may have seen the identities that are asked"
    return Check(name, 0, text, True)


def _same_files(gallery: Collection, asked: Asked) -> list[Check]:
    """Count queries whose file is a file of the gallery: their own origin's, or another image's."""
    owner: dict[str, set[int]] = {}
    for sha, label in zip(gallery.sha256[gallery.gallery], asked.reference_labels.tolist(), strict=True):
        if sha:
            owner.setdefault(sha, set()).add(label)
    queries = zip(asked.column("sha256"), asked.labels.tolist(), asked.column("path"), strict=True)
    own, other = list[str](), list[str]()
    for sha, label, path in queries:
        if sha and sha in owner:
            (own if label in owner[sha] else other).append(str(path))
    out = [_own_file(own, len(asked))]
    if other:
        text = (
            f"{counted(len(other), 'query is', 'queries are')} byte for byte the file of another image than "
            "the named origin: the manifest is wrong there, or nothing can be found"
        )
        out.append(Check("queries that are another image's file", len(other), text, True, other))
    return out


def _own_file(own: list[str], n: int) -> Check:
    name = "queries that are their origin's file"
    if not own:
        return Check(name, 0, "No query is a file of the gallery")
    are = counted(len(own), "query is", "queries are")
    text = f"{are} byte for byte the origin itself, of {n:,}: finding it says nothing of translations"
    return Check(name, len(own), text, True, own)


def _near(gallery: Collection) -> Check:
    groups, why = gallery.near
    name = "groups of near-duplicates in the gallery"
    if groups is None:
        return Check(name, 0, why.removesuffix("."), True)
    n = len(groups.members)
    return Check(name, n, f"{counted(n, 'group')} of near-duplicates known; each counts as one origin")
