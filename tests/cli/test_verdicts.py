"""Verdicts of a collection: the stated rate on pictures never seen, and what keeps it true."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cli_helpers import pair_store, picture
from PIL import Image
from scipy.stats import betabinom

from cli import calibrating, workflows
from cli import verdicts as verdicts_module
from cli.calibrating import AS_THEY_ARE, OWN, SIMULATED, Photos
from cli.collection import Collection
from cli.knobs import SolveOptions
from cli.own_map import own_projection
from cli.solving import fit
from cli.verdicts import Judge, judge_for
from latentstore import attacks, results
from latentstore.encoders import PatchEncoder
from latentstore.results import Verdict
from latentstore.simulate import Diffusion, GaussianPrior, translate
from solvers.projection import Projection
from solvers.spectrum import fit_spectrum
from solvers.verdict import CANDIDATES, Calibration, Decision, Rates, verdict_map

SIZE = 64  # 256 numbers a latent
RARE = 1e-4  # of what a test calls impossible
Latents = npt.NDArray[np.float32]
Make = Callable[..., Collection]


def encoded(pictures: list[Image.Image], size: int = SIZE) -> Latents:
    small = [np.asarray(p.resize((size, size), Image.Resampling.BILINEAR)) for p in pictures]
    made = PatchEncoder(size).encode(np.stack(small), np.zeros(len(small), np.int64))
    return np.asarray(made, np.float32)


def detailed(seed: int) -> Image.Image:
    """A picture that varies in as many directions as its latent has: no few of them span a collection."""
    small = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def unlike(first: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.zeros(len(others), bool)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a collection of n pictures, each its own photo."""
    number = itertools.count()

    def collection(n: int, draw: Callable[[int], Image.Image] = lambda i: picture(i, SIZE)) -> Collection:
        folder = tmp_path_factory.mktemp(f"world {next(number)}")
        (folder / "images").mkdir()
        for i in range(n):
            draw(i).save(folder / f"images/{i:04d}.png", compress_level=1)
        workflows.run_encode(folder / "images", folder / "s.zarr", encoder="patch", image_size=SIZE)
        return Collection.open(folder / "s.zarr")

    return collection


@pytest.fixture(scope="module")
def few(make: Make) -> Collection:
    """160 pictures: fewer than dimensions, so that the fit spans no more than they do."""
    return make(160)


@pytest.fixture(scope="module")
def many(make: Make) -> Collection:
    """600 pictures: the fit takes the kept sums less those of the photos that are calibrated on."""
    return make(600)


@pytest.fixture(scope="module")
def strangers() -> list[Image.Image]:
    return [picture(50_000 + i, SIZE) for i in range(400)]


def judged(
    collection: Collection, W: Projection, latents: npt.NDArray[np.floating]
) -> tuple[Judge, npt.NDArray[np.int64], list[Verdict]]:
    judge, why = judge_for(collection, W)
    assert judge is not None, why
    references = np.asarray(W.references(collection.read(collection.gallery)))
    order = np.argsort(-(np.asarray(W.queries(latents)) @ references.T), axis=1)
    rows = collection.gallery[order[:, :CANDIDATES]]
    return judge, rows, judge.verdicts(latents, rows)


def check_rate(judge: Judge, verdicts: list[Verdict], *, reached: bool) -> None:
    """Hold the share of strangers that pass against the stated rate, and the chance of drawing both."""
    for decision, called in (("match", ("match",)), ("doubtful", ("match", "doubtful"))):
        n, m = judge.calibration.n, len(verdicts)
        j = round(judge.calibration.rates(decision).false_alarm * (n + 1))  # type: ignore[arg-type]
        law = betabinom(m, j, n + 1 - j)
        passed = sum(v.decision in called for v in verdicts)
        assert passed <= law.ppf(1 - RARE), (decision, passed / m, j / (n + 1))
        assert not reached or passed >= law.ppf(RARE), (decision, passed / m, j / (n + 1))


# --- the stated rate -----------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["few", "many"])
def test_the_stated_rate_holds_on_pictures_never_seen(
    request: pytest.FixtureRequest, strangers: list[Image.Image], world: str
) -> None:
    collection = request.getfixturevalue(world)
    W = own_projection(collection)[0]
    judge, _, verdicts = judged(collection, W, encoded(strangers))
    check_rate(judge, verdicts, reached=True)
    jpeg = encoded([attacks.jpeg(30)(p, i) for i, p in enumerate(strangers)])
    check_rate(judge, judged(collection, W, jpeg)[2], reached=True)
    gallery = collection.read(collection.gallery)
    spectrum = fit_spectrum([gallery], 256, len(gallery))
    prior = GaussianPrior.from_spectrum(spectrum.mean, spectrum.values, spectrum.vectors)
    moved = translate(encoded(strangers), prior, Diffusion(0.1, 0.3, seed=9), np.arange(400) + 10**6)
    check_rate(judge, judged(collection, W, moved)[2], reached=False)


@pytest.mark.parametrize("kept_apart", [True, False])
def test_it_holds_for_a_map_that_has_seen_the_photos(
    make: Make, monkeypatch: pytest.MonkeyPatch, kept_apart: bool
) -> None:
    """Fully whitened, the fitted pictures are all equally far: what ranks first for one of them is chance.

    New pictures have a nearest one. The opposite: ranked by the map itself, negatives let too many pass.
    """
    collection = make(160, detailed)
    W = fit(collection, SolveOptions.of("pca", rank="all", exponent=0.5))[0]
    new = encoded([detailed(50_000 + i) for i in range(400)])
    if not kept_apart:
        ranked = calibrating._ranked

        def by_itself(collection: Collection, V: Projection, asked: Any, photos: Photos, blocks: Any) -> Any:
            return ranked(collection, W, asked, photos, collection.projected(W))

        monkeypatch.setattr(calibrating, "_ranked", by_itself)
    judge, rows, _ = judged(collection, W, new)
    # Of the kind that the new pictures are of: another kind may hide it.
    alike = {AS_THEY_ARE: judge.calibration.negatives[AS_THEY_ARE]}
    judge = dataclasses.replace(judge, calibration=Calibration(alike))
    if not kept_apart:
        judge = dataclasses.replace(judge, projection=verdict_map(W))
    with nullcontext() if kept_apart else pytest.raises(AssertionError):
        check_rate(judge, judge.verdicts(new, rows), reached=False)


def test_origins_are_found_and_strangers_are_not(few: Collection, strangers: list[Image.Image]) -> None:
    W = own_projection(few)[0]
    own = encoded([attacks.jpeg(60)(picture(i, SIZE), i) for i in range(100)])
    judge, rows, verdicts = judged(few, W, own)
    assert (rows[:, 0] == few.gallery[:100]).all()
    assert sum(v.decision == "match" for v in verdicts) > 80
    _, _, other = judged(few, W, encoded(strangers))
    assert sum(v.decision == "no origin here" for v in other) > 300
    for v in (*verdicts[:5], *other[:5]):
        assert v.false_alarm_interval[0] < v.false_alarm < v.false_alarm_interval[1]
        assert v.detection is not None
        assert v.detection_interval is not None
        assert v.detection_interval[0] <= v.detection <= v.detection_interval[1]
        assert v.n == judge.calibration.n == 80
        assert v.detection_of.startswith(SIMULATED)
    told = next(v for v in other if v.decision == "no origin here")
    assert f"{judge.calibration.denied:.0%} of {told.detection_of}" in told.note
    assert "darkened" not in told.note  # measured: the analytic map holds


def test_what_a_decision_is_worth_is_told_once(few: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    rates = Calibration.rates

    def counted(self: Calibration, decision: Decision) -> Rates:
        asked.append(decision)
        return rates(self, decision)

    monkeypatch.setattr(Calibration, "rates", counted)
    latents = encoded([picture(i, SIZE) for i in (*range(20), *range(60_000, 60_040))])
    verdicts = judged(few, own_projection(few)[0], latents)[2]
    assert len(asked) == len({v.decision for v in verdicts}) > 1


# --- what is calibrated on -----------------------------------------------------------------------


def test_rows_that_are_fitted_on_are_not_calibrated_on(few: Collection) -> None:
    judge, _ = judge_for(few, own_projection(few)[0])
    assert judge is not None
    asked = Photos.of(few, refitted=True).rows
    rest = np.setdiff1d(few.gallery, asked)
    assert len(asked) == len(rest) == 80
    mean = few.read(rest).astype(np.float64).mean(axis=0)
    # The map is kept in float32.
    assert np.abs(judge.projection.center - mean).max() <= np.finfo(np.float32).eps * np.abs(mean).max()


def test_sums_less_some_rows_are_the_sums_of_the_others(many: Collection) -> None:
    """The map that is fitted from the kept sums less some photos is the one that is fitted on the rest."""
    judge, _ = judge_for(many, own_projection(many)[0])
    photos = Photos.of(many, refitted=True)
    assert "train" not in many.split[photos.rows]  # enough are held out
    rest = many.read(many.gallery[photos.fitted])
    assert len(rest) > 256
    direct = fit_spectrum([rest], 256, len(rest))
    assert judge is not None
    # Products of float32 tiles: some eps32 of the largest eigenvalue, below which none is counted.
    n = len(judge.projection.spectrum)
    assert n > 100
    gap = np.abs(judge.projection.spectrum - direct.values[:n]).max()
    assert gap <= 64 * np.finfo(np.float32).eps * direct.values[0]


def test_a_photo_is_searched_for_without_its_own_copies_and_crops(tmp_path: Path) -> None:
    """Each photo stands there twice, and once more under another name of its group: none finds itself."""
    lines = ["path,identity,group"]
    for i in range(60):
        for name, group in ((f"{i}a", f"{i}"), (f"{i}b", f"{i}b"), (f"{i}c", f"{i}")):
            own = picture(i, SIZE)
            (attacks.jpeg(90)(own, 0) if name.endswith("c") else own).save(tmp_path / f"{name}.png")
            lines.append(f"{name}.png,{name},{group}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    workflows.run_encode(
        tmp_path, tmp_path / "s.zarr", manifest=tmp_path / "list.csv", encoder="patch", image_size=SIZE
    )
    collection = Collection.open(tmp_path / "s.zarr")
    photos = Photos.of(collection, refitted=True)
    assert len(np.unique(photos.mark)) == 60
    assert len(photos.rows) == 30
    W = fit(collection, SolveOptions.of("analytic", 64, alpha_bar=0.9))[0]
    judge, _, verdicts = judged(collection, W, collection.read(photos.rows))
    assert judge.calibration.positives_of == f"{SIMULATED} (ᾱ 0.9)"  # the map's own
    for scores in judge.calibration.negatives.values():
        assert scores.max() < min(v.score for v in verdicts)
    assert judge.calibration.found.mean() > 0.9


def test_a_verdict_is_the_same_in_any_company(few: Collection, strangers: list[Image.Image]) -> None:
    judge, rows, verdicts = judged(few, own_projection(few)[0], encoded(strangers))
    assert len(verdicts) > verdicts_module._BLOCK
    latents = encoded(strangers)
    for i in (0, 100, 399):
        (alone,) = judge.verdicts(latents[i : i + 1], rows[i : i + 1])
        assert alone.decision == verdicts[i].decision
        # Float64 sums in another order; the spread of the scores is some hundredth of them.
        assert alone.score == pytest.approx(verdicts[i].score, rel=1e-10)
    # An approximate index may find fewer than were asked for, or nothing.
    short = np.where(np.arange(rows.shape[1]) < 15, rows, -1)
    assert judge.verdicts(latents[:2], short[:2]) == judge.verdicts(latents[:2], rows[:2, :15])
    few_found = np.where(np.arange(rows.shape[1]) < 7, rows, -1)
    assert {v.score for v in judge.verdicts(latents[:20], few_found[:20])} == {0.0}
    (none,) = judge.verdicts(latents[:1], np.full((1, 40), -1))
    assert (none.decision, none.score) == ("no origin here", 0)


def test_rows_of_the_first_ones_photo_take_nothing_of_its_lead(
    few: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six rows of one origin behind it: by group or by looks they are left out. Else they take the lead."""
    W = own_projection(few)[0]
    own = encoded([attacks.jpeg(60)(picture(0, SIZE), 0)])
    judge, rows, (plain,) = judged(few, W, own)
    references = few.read(few.gallery)
    copies, names = few.gallery[-6:], few.group.astype(object)
    stored = dict.fromkeys(copies.tolist(), references[0])

    def read(wanted: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return np.stack([stored.get(row, references[row]) for row in wanted.tolist()])

    crowd = np.concatenate([rows[:, :1], copies[None], np.setdiff1d(rows, copies)[None]], axis=1)
    crowd = np.concatenate([crowd[:, :7], crowd[:, 7:][crowd[:, 7:] != rows[0, 0]][None]], axis=1)
    monkeypatch.setattr(few, "read", read)
    # Candidates that the copies stood in for may have been among the compared.
    near = pytest.approx(plain.score, rel=0.1)
    (unknown,) = judge.verdicts(own, crowd)
    assert unknown.score == near
    with monkeypatch.context() as blind:
        blind.setattr(verdicts_module, "alike", unlike)
        (collapsed,) = judge.verdicts(own, crowd)
        assert collapsed.score < 0.8 * plain.score
        names[copies] = names[rows[0, 0]]
        blind.setattr(few, "group", names)
        assert judge.verdicts(own, crowd)[0].score == near


@pytest.mark.parametrize("copies", [10, 120])
def test_a_crowd_of_its_own_re_saves_hides_no_origin(
    make: Make, strangers: list[Image.Image], monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    """Re-saves of one picture that nobody grouped, some or more than are compared: it is not denied.

    Strangers are let through no more often than stated. The opposite: seen as others, they bury it.
    """

    def draw(i: int) -> Image.Image:
        return picture(i, SIZE) if i < 160 else attacks.jpeg(60 + i % 37)(picture(0, SIZE), i)

    collection = make(160 + copies, draw)
    W = own_projection(collection)[0]
    own = np.concatenate([encoded([picture(0, SIZE)]), encoded([attacks.jpeg(80)(picture(0, SIZE), 0)])])
    judge, rows, verdicts = judged(collection, W, own)
    assert "no origin here" not in {v.decision for v in verdicts}
    check_rate(judge, judged(collection, W, encoded(strangers))[2], reached=False)
    # What is calibrated on is a picture without an origin here: no re-save of it is found.
    if copies == 10:  # of more, the score alone is left, and is worth less
        assert max(s.max() for s in judge.calibration.negatives.values()) < verdicts[0].score
    monkeypatch.setattr(verdicts_module, "alike", unlike)
    assert judge.verdicts(own, rows)[0].score < 0.95 * verdicts[0].score


def test_a_learned_map_stands_and_its_pairs_are_left_alone(tmp_path: Path) -> None:
    collection = Collection.open(pair_store(tmp_path, 0.3))
    W = fit(collection, SolveOptions.of("gnull", 16))[0]
    photos = Photos.of(collection, refitted=False)
    assert set(collection.split[photos.rows]) == {"validation", "test"}
    judge, _, verdicts = judged(collection, W, collection.read(photos.rows))
    assert judge.projection.fingerprint == verdict_map(W).fingerprint
    assert set(judge.calibration.negatives) == {AS_THEY_ARE, SIMULATED, OWN}
    assert verdicts[0].detection_of == OWN
    assert all("darkened, blurred or flattened" in v.note for v in verdicts if v.decision != "match")
    assert "darkened" in judge._note("doubtful")
    assert judge.calibration.n == len(judge.calibration.positives) == 24  # of the validation split


def test_no_verdict_where_nothing_is_left_to_calibrate_on(tmp_path: Path, make: Make) -> None:
    small = make(30)
    judge, why = judge_for(small, own_projection(small)[0])
    assert judge is None
    assert "15 of them (20 needed)" in why
    lines = [f"{i}.png,{i},reference,train" for i in range(60)]
    for i in range(60):
        picture(i, 32).save(tmp_path / f"{i}.png")
    (tmp_path / "list.csv").write_text("\n".join(["path,identity,role,split", *lines]))
    workflows.run_encode(
        tmp_path, tmp_path / "s.zarr", manifest=tmp_path / "list.csv", encoder="patch", image_size=32
    )
    trained = Collection.open(tmp_path / "s.zarr")
    learned = Projection(np.eye(64)[:, :8], np.eye(64)[:, :8], method="cosface")
    judge, why = judge_for(trained, learned)
    assert judge is None
    assert "0 of them outside of the training split" in why
    held_out = Collection.open(small.store.root)
    held_out.split[:] = "test"  # all are calibrated on: none is left to simulate translations from
    judge, why = judge_for(held_out, learned)
    assert judge is None
    assert "the collection has 0 of them (20 needed)" in why
    # A map that can be fitted again needs no held-out split.
    assert judge_for(trained, own_projection(trained)[0])[0] is not None
    assert not (tmp_path / "s.zarr/projections").joinpath("verdict").exists()


def test_pictures_that_are_all_alike_give_no_verdict(tmp_path: Path) -> None:
    for i in range(60):
        picture(0 if i < 59 else 1, 32).save(tmp_path / f"{i}.png", compress_level=i % 9)
    workflows.run_encode(tmp_path, tmp_path / "s.zarr", encoder="patch", image_size=32)
    collection = Collection.open(tmp_path / "s.zarr")
    judge, why = judge_for(collection, own_projection(collection)[0])
    assert judge is None
    assert why.startswith("No verdict: ")


# --- kept ----------------------------------------------------------------------------------------


def test_it_is_kept_and_made_anew_when_it_is_another_one(few: Collection, tmp_path: Path) -> None:
    shutil.copytree(few.store.root, tmp_path / "s.zarr")
    collection = Collection.open(tmp_path / "s.zarr")
    folder = tmp_path / "s.zarr/projections"
    for old in folder.glob("verdict-*"):
        old.unlink()
    W = own_projection(collection)[0]
    asked: list[int] = []

    def judge(W: Projection) -> tuple[Judge, bool]:
        asked.clear()
        made, why = judge_for(collection, W, on_start=lambda todo, total: asked.append(todo))
        assert made is not None, why
        return made, bool(asked)

    def kept() -> set[str]:
        return {p.name for p in folder.glob("verdict-*")}

    (first, fresh), files = judge(W), kept()
    assert fresh
    assert len(files) == 2
    query, rows = (
        few.read(few.gallery[:3]),
        np.stack([np.roll(few.gallery, -i)[:CANDIDATES] for i in range(3)]),
    )
    again, fresh = judge(W)
    assert not fresh
    assert again.verdicts(query, rows) == first.verdicts(query, rows)
    for name in files:  # either one, damaged
        path = folder / name
        path.write_bytes(path.read_bytes()[:-5])
        assert judge(W)[1]
        assert not judge(W)[1]
    assert judge(W.truncated(20))[1]
    assert len(kept()) == 4
    (mine,) = (name for name in files if name.endswith("-map.safetensors"))
    (other,) = (name for name in kept() - files if name.endswith("-map.safetensors"))
    shutil.copy(folder / other, folder / mine)  # whole, and not the one that was calibrated
    assert judge(W)[1]
    # Of other latents nothing is kept.
    (folder / f"verdict-{'0' * 16}-{'1' * 16}.safetensors").write_bytes(b"")
    judge(W.truncated(21))
    assert f"verdict-{'0' * 16}-{'1' * 16}.safetensors" not in kept()
    # A store that takes no file is judged all the same.
    shutil.rmtree(folder)
    folder.write_text("in the way")
    for _ in range(2):
        made, fresh = judge(W)
        assert fresh
        assert made.verdicts(query, rows) == first.verdicts(query, rows)


def test_an_index_gives_the_same_and_rows_are_counted(few: Collection, tmp_path: Path) -> None:
    shutil.copytree(few.store.root, tmp_path / "s.zarr")
    shutil.rmtree(tmp_path / "s.zarr/projections")
    collection = Collection.open(tmp_path / "s.zarr")
    W = own_projection(collection)[0].with_score("bias")
    started, done, given = list[int](), list[int](), list[int]()

    def blocks() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        for at in range(0, len(collection.gallery), 37):
            rows = collection.gallery[at : at + 37]
            given.append(len(rows))
            yield rows, np.asarray(W.references(collection.read(rows)), np.float32)

    judge, _ = judge_for(
        collection,
        W,
        blocks=blocks,
        on_start=lambda todo, total: started.append(todo),
        on_rows=lambda rows, bad: done.append(rows),
    )
    assert sum(given) == 160
    assert started == [sum(done)] == [3 * 160]
    for old in (tmp_path / "s.zarr/projections").glob("verdict-*"):
        old.unlink()
    other, _ = judge_for(collection, W)
    assert judge is not None
    assert other is not None
    latents = collection.read(collection.gallery)
    rows = np.tile(collection.gallery, (len(latents), 1))
    assert judge.verdicts(latents, rows) == other.verdicts(latents, rows)


# --- shown ---------------------------------------------------------------------------------------


def test_curves_are_shares_with_both_bars(few: Collection, tmp_path: Path) -> None:
    judge, _ = judge_for(few, own_projection(few)[0])
    assert judge is not None
    curves = judge.curves()
    assert [c.role for c in curves] == ["control", "control", "method", "note", "note"]
    for curve in curves[:3]:
        assert sum(curve.y) == pytest.approx(1)
        assert len(curve.x) == len(curve.y)
    bars = {c.label: c.x[0] for c in curves[3:]}
    assert bars["doubtful from here"] <= bars["match from here"]
    report = results.Report("match", "t", [], {}, curves=curves)
    report.write(tmp_path / "r.json")
    assert results.load(tmp_path / "r.json").curves == curves
    assert judge.verdicts(np.empty((0, 256), np.float32), np.empty((0, 5), np.int64)) == []
