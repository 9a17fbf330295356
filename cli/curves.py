"""The course of a training run: what every validation found, in the terminal, as JSON lines and as curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cli.choosing import Judge
from cli.collection import Collection, Queries, Rows
from cli.simulating import SimulatedPairs
from latentstore.results import Curve, Role
from solvers.projection import Projection

PAIRS = 256
"""Pairs of each kind whose cosine is followed: a validation is to stay cheap."""
LOSS, RETRIEVAL, COSINE = "CosFace: loss", "CosFace: validation", "CosFace: cosine after W"
STRANGERS = ", non-pairs"
"""What the label of a control has behind that of its pairs."""
TRAINING = "training identities"
SEEN, UNSEEN = "new identities, seen models", "new identities, unseen models"
_SHORT = {TRAINING: "training", SEEN: "seen", UNSEEN: "unseen"}


@dataclass(frozen=True, eq=False)
class Sample:
    """Pairs whose cosine is followed: the same ones at every validation.

    Attributes
    ----------
    label : str
        Of which models and identities they are.
    origins, translations : (n, d) arrays
        In the stored dtype.
    names : (n,) array of str
        What counts as the origin of each pair.
    """

    label: str
    origins: npt.NDArray[Any]
    translations: npt.NDArray[Any]
    names: npt.NDArray[Any]

    def cosines(self, projection: Projection) -> dict[str, float]:
        """Return the mean cosine of translation and origin; beside it, of all non-pairs among them."""
        every = projection.queries(self.translations) @ projection.references(self.origins).T
        found = {self.label: float(np.diagonal(every).mean())}
        strangers = self.names[:, None] != self.names
        if strangers.any():
            found[self.label + STRANGERS] = float(every[strangers].mean())
        return found


def samples(collection: Collection, asked: Queries, simulated: SimulatedPairs | None = None) -> list[Sample]:
    """Draw the pairs that are followed: training pairs, and validation pairs of seen and of unseen models.

    A model is seen when training has translations by it. The draw is seeded and at most 256 pairs a kind.
    """
    models = np.array([m or "unnamed" for m in collection.model], dtype=object)
    if simulated is None:
        origins, translated = collection.pairs("train")
        seen = set(models[translated].tolist())
        kept = _drawn(len(origins))
        own, other = origins[kept], translated[kept]
        out = [_sample(TRAINING, collection, own, collection, other)]
    else:
        seen = set()
        out = [_simulated(simulated)]
    # Beside queries of another store the store's own: what a new model costs is not what a new identity does.
    own_queries = [] if asked.collection is collection else [collection.queries("validation")]
    for queries in (*own_queries, asked):
        known = np.array([m or "unnamed" for m in queries.collection.model[queries.rows]], dtype=object)
        origin, by_seen = collection.origin_rows(queries.identity), np.isin(known, list(seen))
        for label, of_kind in ((SEEN, by_seen), (UNSEEN, ~by_seen)):
            here = np.flatnonzero(of_kind & (origin >= 0))
            here = here[_drawn(len(here))]
            if len(here) and label not in {s.label for s in out}:
                out.append(_sample(label, collection, origin[here], queries.collection, queries.rows[here]))
    return out


def _drawn(n: int) -> Rows:
    return np.sort(np.random.default_rng(0).permutation(n)[:PAIRS])


def _sample(
    label: str, gallery: Collection, origins: Rows, collection: Collection, translated: Rows
) -> Sample:
    names = gallery.labels(gallery.identity[origins]).astype(str)
    return Sample(label, gallery.read(origins), collection.read(translated), names)


def _simulated(pairs: SimulatedPairs) -> Sample:
    """Take the first block: which pairs it holds depends on the store alone."""
    origins, translated = next(iter(pairs.pairs()))
    kept = _drawn(len(origins))
    names = pairs.collection.labels(pairs.collection.identity[pairs.rows[kept]]).astype(str)
    return Sample(TRAINING, origins[kept], translated[kept], names)


class Course:
    """Judges the W of every validation, follows cosines, and keeps the account.

    Parameters
    ----------
    judge : Judge or None
    followed : list of Sample
    log : Path, optional
        A file of JSON lines, one a validation.
    resumed : bool
        Whether the run goes on from a checkpoint: lines of the log before its first validation then stay.
    say : callable
        Takes one line a validation.

    Attributes
    ----------
    records : list of dict
        What the training reported, with ``acc`` and ``cosine`` (by label).
    """

    def __init__(
        self,
        judge: Judge | None,
        followed: Sequence[Sample],
        *,
        log: Path | None = None,
        resumed: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.judge, self.followed, self.log, self.say = judge, list(followed), log, say
        self.records: list[dict[str, Any]] = []
        self._earlier = _read(log) if resumed and log is not None else []
        if not resumed:
            self._write([], "w")  # lines of another run
        self._found: list[dict[str, Any]] = []

    def validate(self, snapshot: Any) -> float:
        """Return the validation mAP of a snapshot's W."""
        assert self.judge is not None  # noqa: S101 - given to a training only when there is one
        W = Projection(snapshot.weights, snapshot.weights)
        ranking = self.judge.ranking(W)
        cosine = {k: v for sample in self.followed for k, v in sample.cosines(W).items()}
        found = {"step": snapshot.step, "map": ranking.map, "acc": ranking.acc, "cosine": cosine}
        self._found.append(found)
        if snapshot.step == 0:
            # A run that is stopped before its next validation goes on without judging its start again.
            self._write([{"loss": None, **found}], "a")
        return ranking.map

    def observe(self, record: dict[str, Any]) -> None:
        """Take what the training says of a validation."""
        if not self.records:
            self._begin(record["step"])
        self._add({**record, **next((f for f in self._found if f["step"] == record["step"]), {})})
        self._found.clear()

    def _begin(self, step: int) -> None:
        """Take up the log of the run so far, or begin one with the start."""
        # Of several starts that were judged the best was taken, the first among equals.
        starts = [r for r in self._earlier if r["step"] == 0]
        fresh = [{"loss": None, **f} for f in self._found if f["step"] == 0]
        # What a killed run wrote after its last checkpoint is found again, and would stand there twice.
        held = ([max(starts, key=_map)] if starts else []) + [
            r for r in self._earlier if 0 < r["step"] < step
        ]
        self.records = held
        self._write(held, "w")
        if fresh:
            self._add(max(fresh, key=_map))

    def _add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._write([record], "a")
        self.say(line(record))

    def _write(self, records: Iterable[dict[str, Any]], mode: str) -> None:
        if self.log is not None:
            with self.log.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(r, default=float) + "\n" for r in records)

    def curves(self) -> list[Curve]:
        """Return loss, validation mAP and Acc, and the cosines, over the steps."""
        records = self.records or self._earlier
        labels = dict.fromkeys(label for r in records for label in r.get("cosine", {}))
        found = [
            _curve(LOSS, "loss", "loss", records, lambda r: r.get("loss")),
            _curve(RETRIEVAL, "mAP", "validation, %", records, lambda r: _percent(r.get("map"))),
            _curve(RETRIEVAL, "Acc", "validation, %", records, lambda r: _percent(r.get("acc"))),
            *(
                _curve(COSINE, label, "mean cosine", records, lambda r, k=label: r.get("cosine", {}).get(k))
                for label in labels
            ),
        ]
        return [curve for curve in found if curve.x]


def _curve(
    plot: str,
    label: str,
    y_label: str,
    records: Sequence[dict[str, Any]],
    value: Callable[..., float | None],
) -> Curve:
    """Return a value of the records over their steps, without those that lack it."""
    points = [(float(r["step"]), y) for r in records if (y := value(r)) is not None]
    role: Role = "control" if label.endswith(STRANGERS) else "method"
    return Curve(plot, label, [x for x, _ in points], [y for _, y in points], "step", y_label, role=role)


def line(record: dict[str, Any]) -> str:
    """Return a validation in one line: ``step 120: loss 3.210; mAP 81.2 %; ...``."""
    parts = [f"loss {record['loss']:.3f}" if record.get("loss") is not None else "the start"]
    found = [(name, record.get(key)) for name, key in (("mAP", "map"), ("Acc", "acc"))]
    parts += [f"{name} {100 * value:.1f} %" for name, value in found if value is not None]
    cosines = record.get("cosine", {})
    shown = [f"{v:.2f} {_SHORT[k]}" for k, v in cosines.items() if k in _SHORT]
    strangers = [v for k, v in cosines.items() if k.endswith(STRANGERS)]
    shown += [f"{max(strangers):.2f} non-pairs"] if strangers else []
    parts += [f"cosine {', '.join(shown)}"] if shown else []
    return f"step {record['step']:,}: {'; '.join(parts)}"


def _map(record: dict[str, Any]) -> float:
    return float(record["map"])


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _read(log: Path) -> list[dict[str, Any]]:
    """Return the records of a log; a line that a kill cut off is no record."""
    if not log.is_file():
        return []
    out = []
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            out.append(record)
    return out
