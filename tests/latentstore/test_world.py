"""The miniature world's experiment with two random pipelines: what leaks, what repeats, what turns."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline_worlds import save_pipeline

from benchmarks import world, world_findings, world_maps, world_models, world_pictures, world_plan
from cli.collection import Collection
from cli.likeness import BY_CONSTRUCTION
from latentstore import results
from latentstore.report import reading
from latentstore.report.grids import laid_out
from latentstore.results import Figure, Report
from latentstore.training.fit_patch import held_out
from solvers.projection import Projection, identity_hash

PLAN = replace(
    world_plan.SMALL,
    prompts=(("a", 2), ("b", 1)),
    train_strengths=(0.9,),
    origins=16,
    references=10,
    encoder="patch",
    batch=4,
    theory=False,
)
WORDS = ("cat", "dog", "tree", "house", "sea")


def picture(seed: int, size: int = 64) -> Image.Image:
    """Smooth colour fields: no two are alike."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def save_photos(folder: Path) -> Path:
    """Save 20 pictures that are held out and 12 that are not, with their classes."""
    folder.mkdir()
    names = [f"p{i:03d}.png" for i in range(400)]
    kept = [n for n in names if held_out(n)][:20] + [n for n in names if not held_out(n)][:12]
    assert len(kept) == 32
    with (folder / "SOURCES.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "class"])
        for i, name in enumerate(sorted(kept)):
            picture(i).save(folder / name)
            writer.writerow([name, WORDS[i % len(WORDS)]])
    return folder


@dataclass(frozen=True)
class Made:
    photos: Path
    models: dict[str, Path]
    work: Path
    out: Path

    def run(self, plan: world_plan.Plan = PLAN) -> None:
        world.run([self.photos], self.models, self.work, self.out, plan)

    def bytes(self) -> dict[str, str]:
        """SHA-256 of every file that the experiment wrote."""
        files = [p for root in (self.work, self.out.parent) for p in root.rglob("*") if p.is_file()]
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("world")
    (root / "out").mkdir()
    models = {"a": save_pipeline(root / "a", 0), "b": save_pipeline(root / "b", 1, levels=5)}
    found = Made(save_photos(root / "photos"), models, root / "work", root / "out" / "world.json")
    found.run()
    return found


@pytest.fixture
def inside(made: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.chdir(made.work)
    return made


def rows(made: Made) -> list[dict[str, str]]:
    with (made.work / "translations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_no_test_original_and_nothing_by_b_is_learned_from(inside: Made) -> None:
    del inside
    photos = world_pictures.read_photos()
    tested = {p.name for p in photos.of("test")}
    stored = Collection.open(world_plan.WORLD)
    for split in ("train", "validation"):
        origins, translated = stored.pairs(split)
        assert len(translated)
        assert set(stored.model[translated].tolist()) == {"a"}
        assert not set(stored.identity[origins].tolist()) & tested
    assert set(stored.model[stored.pairs("test")[1]].tolist()) == {"a", "b"}
    used = identity_hash(sorted(tested | {f"group {name}" for name in tested}))
    learned = [p for p in world_maps.MAPS.glob("*.safetensors") if "checkpoint" not in p.name]
    assert len(learned) == 4
    for path in learned:
        W = Projection.load(path)
        assert len(W.used_identities)
        assert not np.intersect1d(W.used_identities, used).size, path
    both = Collection.open(world_plan.BOTH)
    origins, translated = both.pairs("train")
    of = {m: sorted(both.identity[origins[both.model[translated] == m]].tolist()) for m in ("a", "b")}
    assert of["a"] == of["b"]
    assert len(of["a"]) == len(photos.of("train")) * len(PLAN.train_strengths)
    without = Collection.open(world_plan.WITHOUT)
    left = set(without.identity[without.gallery].tolist())
    assert left == set(stored.identity[stored.gallery].tolist()) - tested


def test_originals_are_held_out_photos(inside: Made) -> None:
    del inside
    for photo in world_pictures.read_photos().listed:
        assert held_out(f"{photo.name}.png") == photo.origin


def test_both_models_have_the_same_prompts_and_no_photo_its_own_words(inside: Made) -> None:
    from latentstore.training.diffusion import DESIGNS

    words = {p.name: p.words for p in world_pictures.read_photos().listed}
    drawn: dict[str, dict[tuple[str, str, str], str]] = {"a": {}, "b": {}}
    for row in rows(inside):
        before, after = DESIGNS[row["model"]].template.split("{}")
        word = row["prompt"].removeprefix(before).removesuffix(after)
        assert word in WORDS
        assert word != words[row["identity"]]
        key = row["identity"], row["strength"], Path(row["path"]).stem.rpartition("_")[2]
        drawn[row["model"]][key] = word
    shared = drawn["a"].keys() & drawn["b"].keys()
    assert shared == drawn["b"].keys()
    assert all(drawn["a"][key] == drawn["b"][key] for key in shared)


def test_a_rerun_changes_no_byte(made: Made) -> None:
    before = made.bytes()
    assert len(before) > 100
    made.run()
    assert made.bytes() == before


def test_the_results_are_laid_out_like_the_paper_and_name_no_place(made: Made) -> None:
    reports = reading.read(made.out)
    assert reports[0].title.startswith("The miniature world")
    assert {g.key for g in laid_out(reports[0])} >= {"table3", "table8"}
    assert {g.key for r in reports for g in laid_out(r)} >= {"table1", "table3", "table8"}
    held = made.out.read_text()
    assert str(made.work.parent) not in held
    assert reports[0].summary[1:] == [
        f"{f['claim']}: {f['outcome']}. {f['because']}" for f in reports[0].data["findings"]
    ]
    assert Image.open(made.out.with_suffix(".jpg")).width > 300
    assert made.out.with_suffix(".html").stat().st_size > 10_000


def test_other_settings_and_wrong_paths_are_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(made.photos), "--small", "--out", str(tmp_path / "w.json"), "--b", str(made.models["b"])]
    assert world.main([*words, "--a", str(made.models["a"]), "--work", str(made.work)]) == 2
    assert "train_strengths [0.9], and [0.6, 0.9] is asked for" in capsys.readouterr().err
    assert world.main([*words, "--a", str(tmp_path), "--work", str(tmp_path / "w")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


# --- findings ----------------------------------------------------------------------------------------------


def test_an_interval_decides_and_nothing_else() -> None:
    assert world_findings.above((0.1, 0.3)) == "holds"
    assert world_findings.above((-0.3, -0.1)) == "does not hold"
    assert world_findings.above((-0.1, 0.1)) == "cannot be told"
    assert world_findings.above(None) == "cannot be told"
    assert world_findings.above((0.1, 0.3), 0.2) == "cannot be told"
    assert world_findings.below((-0.3, -0.1)) == "holds"
    assert world_findings.below((0.1, 0.3)) == "does not hold"
    assert world_findings.apart((0.5, 0.6), (0.3, 0.4)) == "holds"
    assert world_findings.apart((0.3, 0.4), (0.5, 0.6)) == "does not hold"
    assert world_findings.apart((0.3, 0.5), (0.4, 0.6)) == "cannot be told"
    assert world_findings.every("holds", "cannot be told") == "cannot be told"
    assert world_findings.every("holds", "does not hold") == "does not hold"


def test_a_cosine_inside_the_random_band_tells_nothing() -> None:
    assert world_findings.observed(0.95, (0.9, 0.99)) == "cannot be told"
    assert world_findings.observed(0.999, (0.9, 0.99)) == "holds"
    assert world_findings.observed(0.8, (0.9, 0.99)) == "does not hold"
    assert world_findings.observed(1.0, (0.9, 0.99), BY_CONSTRUCTION) == "cannot be told"


@pytest.mark.parametrize(
    ("value", "interval", "outcome"),
    [
        (0.05, (0.01, 0.09), "holds"),
        (-0.05, (-0.09, -0.01), "does not hold"),
        (0.0, (-0.05, 0.05), "cannot be told"),
    ],
)
def test_findings_follow_the_figures(
    made: Made, value: float, interval: tuple[float, float], outcome: str
) -> None:
    stages = {p.stem: results.load(p) for p in (made.work / "stages").glob("*.json")}
    paired = stages["paired"]

    def turned(f: Figure) -> Figure:
        return replace(f, value=value, interval=interval)

    stages["paired"] = replace(paired, figures=[turned(f) for f in paired.figures])
    found = world_findings.find(stages)
    decided = [f for f in found if "points" in f.because and "Two layers" not in f.because]
    assert len(decided) >= 10
    assert {f.outcome for f in decided if "every control" not in f.claim} == {outcome}
    assert all(f"{100 * value:+.1f} points" in f.because for f in decided if "every control" not in f.claim)
    # Two claims that no figure of this stage decides stay as they are.
    before = {f.claim: f for f in world_findings.find({**stages, "paired": paired})}
    same = [f for f in found if f.claim.startswith(("Table 4", "A small classifier"))]
    assert len(same) == 2
    assert all(before[f.claim] == f for f in same)


# --- telling models apart ----------------------------------------------------------------------------------


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("differ", [True, False])
def test_the_classifier_tells_models_by_their_noise_and_by_nothing_else(told: Path, differ: bool) -> None:
    listed = []
    for i in range(60):
        for model in ("a", "b"):
            pixels = np.asarray(picture(i), np.float64)
            noise = np.random.default_rng([i, model == "b"]).normal(0, 8, pixels.shape)
            # Model b's noise is smoothed, where they differ: as strong, and elsewhere in the spectrum.
            noise = noise + np.roll(noise, 1, 0) if differ and model == "b" else noise * 2**0.5
            path = f"{model}/0.9/{i}_1.jpg"
            (told / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
            split = "train" if i < 30 else "test"
            listed.append(
                {"path": path, "identity": str(i), "role": "translation", "split": split}
                | {"model": model, "prompt": "", "strength": 0.9}
            )
    world_pictures.write_table(Path("translations.csv"), listed)
    report = world_models.tell_apart()
    accuracy, control = (_accuracy(report, role) for role in ("method", "control"))
    assert accuracy > 0.95 if differ else accuracy < 0.75
    # Of 30 photos, by labels that mean nothing: three standard deviations are 3 x 0.5 / sqrt(30).
    assert abs(control - 0.5) < 0.28


def _accuracy(report: Report, role: str) -> float:
    found = report.find(world_models.ACCURACY, group=world_models.TOLD_APART)
    return next(f.value for f in found if f.role == role)


def test_pictures_of_one_model_alone_are_left_out() -> None:
    one = {"identity": "x", "strength": 0.9, "path": "a/x_1.jpg", "model": "a"}
    other = {**one, "model": "b", "path": "b/x_1.jpg"}
    alone = {**one, "path": "a/x_2.jpg"}
    assert world_models.matched([one, other, alone]) == [one, other]
