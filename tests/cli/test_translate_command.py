"""translate: pairs whose origins and splits agree, the same bytes however it is run, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import paragraph, picture
from PIL import Image, JpegImagePlugin
from typer.testing import CliRunner

from cli import translating
from cli.app import app
from cli.collection import Collection
from cli.translating import TranslateOptions, translate
from cli.translation_folder import Folder, opened
from cli.translation_plan import Originals, Prompts, file_name
from cli.workflows import run_encode
from latentstore.errors import StoreLockedError, UsageError
from latentstore.schema import identity_and_role, split_of
from latentstore.sources import Source
from latentstore.store import open_store

sys.path.insert(0, str(Path(__file__).parent.parent / "latentstore"))
from pipeline_worlds import SIZE, save_pipeline

SPLITS = ("train",) * 14 + ("validation",) * 3 + ("test",) * 3
QUICK = {"steps": 2, "batch": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and twenty originals: pairs of tiles of ten photos, with splits and prompts by a list."""
    root = tmp_path_factory.mktemp("world")
    for i, name in enumerate("ab"):
        save_pipeline(root / name, i, levels=4 + i)
    (root / "images").mkdir()
    lines = ["path,identity,group,role,split,prompt"]
    for i, split in enumerate(SPLITS):
        picture(i).save(root / "images" / f"{i:02d}.png")
        lines.append(
            f"{i:02d}.png,tile {i},photo {split} {i // 2},reference,{split},{'a cat' if i % 5 else ''}"
        )
    (root / "originals.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def source(world: Path) -> Source:
    return Source.of(world / "images", world / "originals.csv")


def made(source: Source, out: Path, world: Path, **options: Any) -> translating.Translated:
    models = tuple(str(world / name) for name in options.pop("models", "a"))
    asked = QUICK | {"prompt": ("cat", "dog"), "strengths": (0.5,), "device": "cpu"} | options
    return translate(Originals.of_source(source), out, TranslateOptions(models, **asked))


def pictures(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.jpg"))}


def tree(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def listed(out: Path) -> list[dict[str, str]]:
    with (out / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def command(*words: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


# --- the way from originals to figures ---------------------------------------------------------------


def test_from_a_store_to_pairs_to_figures(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """translate → encode → solve → evaluate: every pair is its origin's, and stands on its origin's side."""
    monkeypatch.chdir(tmp_path)
    run_encode(
        world / "images",
        Path("latents.zarr"),
        manifest=world / "originals.csv",
        encoder="patch",
        image_size=64,
    )
    models = [w for name in "ab" for w in ("--model", world / name)]
    steps = ["--strength", 0.5, "--strength", 1, "--steps", 2, "--device", "cpu"]
    done = json.loads(command("translate", "--store", "latents.zarr", *models, *steps, "--json").stdout)
    # Sixteen originals have a prompt; each by two models at two strengths.
    assert (done["originals"], done["unprompted"], done["made"], done["kept"]) == (16, 4, 64, 0)
    assert done["steps"] == {"0.5": 1, "1.0": 2}
    encode = ["encode", "--manifest", done["manifest"], "--store", "pairs.zarr"]
    command(*encode, "--encoder", "patch", "--image-size", 64)
    origins, pairs = Collection.open(Path("latents.zarr")), Collection.open(Path("pairs.zarr"))
    assert open_store(Path("pairs.zarr")).counts() == {"ok": 20 + 64}
    assert len(pairs.gallery) == 20  # also those that were not translated: the gallery is the collection
    assert Counter(pairs.role) == {"origin": 16, "reference": 4, "translation": 64}
    assert set(pairs.source[pairs.role == "translation"]) == {"translated"}
    known = dict(zip(origins.identity, zip(origins.group, origins.split, strict=True), strict=True))
    for identity, group, split in zip(pairs.identity, pairs.group, pairs.split, strict=True):
        assert known[identity] == (group, split)
    # The list's splits are not the hash's, so agreeing with them is no accident.
    assert any(split_of(group) != split for group, split in known.values())
    seen = {(i, m, s) for i, m, s in zip(pairs.identity, pairs.model, pairs.strength, strict=True) if m}
    assert len(seen) == 64
    assert {s for _, _, s in seen} == {0.5, 1.0}
    latents = dict(zip(origins.identity, origins.read(np.arange(20)), strict=True))
    for row in pairs.gallery:
        np.testing.assert_array_equal(pairs.read(np.array([row]))[0], latents[pairs.identity[row]])
    command("solve", "--method", "gnull", "--rank", 8, "--store", "pairs.zarr", "--out", "W.safetensors")
    found = json.loads(
        command("evaluate", "--store", "pairs.zarr", "--projection", "W.safetensors", "--json").stdout
    )
    assert max(figure["n"] or 0 for figure in found["figures"]) >= 12
    # A second time nothing is made.
    again = json.loads(command("translate", "--store", "latents.zarr", *models, *steps, "--json").stdout)
    assert (again["made"], again["kept"], again["models"]) == (0, 64, done["models"])


def test_what_a_person_sees(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "images", "images")
    Path("images/99.png").write_bytes(b"no picture")
    words = ["translate", "--model", f"A={world / 'a'}", "--prompt", "a long prompt of many letters"]
    done = command(*words, "--steps", 2, "--limit", 21, "--device", "cpu")
    assert done.stdout.startswith(
        "translations: 20 translations, listed with their originals in translations/manifest.csv\n"
    )
    assert "  of 21 originals by A; steps run: 1 at 0.9\n" in done.stdout
    assert "next: latentstore encode --manifest translations/manifest.csv --store pairs.zarr\n" in done.stdout
    assert "Note: 1 original could not be used: 99.png: not an image.\n" in done.stdout
    assert "Note: 1 prompt longer than the model reads: the rest was not read.\n" in done.stdout
    assert "99.png" not in Path("translations/manifest.csv").read_text()
    assert "  20 were there already\n" in command(*words, "--steps", 2, "--device", "cpu").stdout


# --- the same bytes ----------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_what_else_is_asked_for(source: Source, world: Path, tmp_path: Path) -> None:
    """One run, or a little more in each of several, in another order: equal files and manifests."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    made(source, whole, world, models="ab", strengths=(0.5, 1.0), split="test")
    made(source, parts, world, models="b", strengths=(1.0,), split="test", limit=1, per_origin=1)
    more = made(source, parts, world, models="b", strengths=(1.0,), split="test", limit=2)
    assert (more.made, more.kept) == (3, 1)
    last = made(source, parts, world, models="ba", strengths=(1.0, 0.5), split="test")
    assert (last.made, last.kept) == (4 * 6 - 4, 4)
    assert pictures(whole) == pictures(parts)
    assert len(set(pictures(whole).values())) == 4 * 6
    assert (whole / "manifest.csv").read_bytes() == (parts / "manifest.csv").read_bytes()
    other = tmp_path / "other"
    made(source, other, world, models="ab", strengths=(0.5, 1.0), split="test", seed=1)
    assert not set(pictures(whole).values()) & set(pictures(other).values())


def test_a_stopped_run_goes_on_to_the_same_bytes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between a file's rename and its line, with a torn line and a partial file lying there."""
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    words = ["translate", world / "images", "--manifest", world / "originals.csv", "--model", world / "a"]
    words += [
        "--prompt",
        "cat",
        "--prompt",
        "dog",
        "--split",
        "test",
        "--steps",
        2,
        "--device",
        "cpu",
        "--out",
    ]
    command(*words, undisturbed)
    whole, batches = Folder.add, []

    def add(self: Folder, files: Any, lines: Any) -> None:
        batches.append(len(files))
        if len(batches) == 2:
            whole(self, dict([*files.items()][:1]), [])
            raise KeyboardInterrupt
        whole(self, files, lines)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "add", add)
        said = command(*words, stopped, code=130).stderr
    assert said == "Stopped. Run the same command again to go on.\n"
    assert (batches, len(pictures(stopped))) == ([4, 2], 5)
    assert not (stopped / "manifest.csv").exists()
    with (stopped / "made.jsonl").open("ab") as file:
        file.write(b'{"identity":"tile 19","k":1,"mod')
    (stopped / "a" / "0.9" / "x.jpg.0123.partial").write_bytes(b"half")
    done = json.loads(command(*words, stopped, "--json").stdout)
    assert (done["made"], done["kept"]) == (2, 4)
    assert tree(stopped) == tree(undisturbed)


def test_a_lost_file_is_made_again(source: Source, world: Path, tmp_path: Path) -> None:
    made(source, tmp_path / "out", world, split="test")
    before = pictures(tmp_path / "out")
    lost = tmp_path / "out" / list(before)[2]
    lost.unlink()
    assert made(source, tmp_path / "out", world, split="test").made == 1
    assert pictures(tmp_path / "out") == before


def test_a_broken_original_costs_itself_alone(world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "images", tmp_path / "images")
    whole = made(Source.of(folder), tmp_path / "whole", world)
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:200])
    (folder / "08.png").unlink()
    (folder / "08.png").symlink_to(world / "images" / "08.png")  # leads outside, as encode refuses it
    part = made(Source.of(folder), tmp_path / "part", world)
    assert (whole.made, whole.n_bad, part.made, part.n_bad) == (40, 0, 36, 2)
    assert {path for path, _ in part.bad} == {"07.png", "08.png"}
    kept = {
        k: v for k, v in pictures(tmp_path / "whole").items() if not k.startswith(("a/0.5/07", "a/0.5/08"))
    }
    assert pictures(tmp_path / "part") == kept
    # Those that were not to be translated are listed if they are there.
    made(Source.of(folder), tmp_path / "few", world, limit=1, per_origin=1)
    for out in ("part", "few"):
        usable = {f"{i:02d}.png" for i in range(20)} - {"08.png"}
        assert {r["identity"] for r in listed(tmp_path / out)} - {"07.png"} == usable - {"07.png"}, out


def test_nothing_but_broken_originals(world: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"")
    words = ["--model", world / "a", "--prompt", "x", "--steps", 2, "--out", tmp_path / "out"]
    assert "the file is empty" in command("translate", tmp_path / "images", *words, code=1).stdout


def test_files_changed_since_they_were_encoded_are_left_out(world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "images", tmp_path / "images")
    run_encode(folder, tmp_path / "latents.zarr", encoder="patch", image_size=64)
    picture(500).save(folder / "03.png")
    options = TranslateOptions((str(world / "a"),), prompt=("cat",), **QUICK)
    done = translate(Originals.of_store(tmp_path / "latents.zarr"), tmp_path / "out", options)
    assert (done.made, done.bad) == (19, [("03.png", "the file is not the one that was encoded")])


# --- files -------------------------------------------------------------------------------------------


def test_files_are_jpegs_of_the_quality_asked_for(source: Source, world: Path, tmp_path: Path) -> None:
    made(source, tmp_path / "out", world, limit=1, quality=55)
    with Image.open(next((tmp_path / "out").rglob("*.jpg"))) as image:
        assert image.size == (SIZE, SIZE)
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
        picture(0).save(tmp_path / "known.jpg", quality=55)
        with Image.open(tmp_path / "known.jpg") as known:
            assert image.quantization == known.quantization


def test_names_are_plain_and_of_one_identity() -> None:
    odd = ["a/b.jpg", "a-b.jpg", "a b.jpg", "../up", ".hidden", "é" * 300, "", "x" * 200, "https://h/p?q=1"]
    names = [file_name("A", 0.5, identity, 1) for identity in odd]
    assert len(set(names)) == len(odd)
    for name in names:
        folder, _, file = name.rpartition("/")
        assert folder == "A/0.5"
        assert not file.startswith((".", "-"))
        assert len(file.encode()) < 128
    assert file_name("A", 0.9, "T000123", 1) == "A/0.9/T000123_1.jpg"
    # By OriPID's rule _0 is the origin: numbers begin with 1, so a name alone says what the manifest says.
    assert identity_and_role("A/0.9/T000123_1.jpg") == ("T000123", "translation")


# --- prompts -----------------------------------------------------------------------------------------


def test_shared_prompts_are_all_used_by_one_translation_each(source: Source) -> None:
    originals = Originals.of_source(source)
    prompts = Prompts(shared=("a", "b", "c"))
    first = Counter(job.prompt for o in originals.listed for job in prompts.jobs(o, 1))
    assert set(first) == {"a", "b", "c"}
    for original in originals.listed:
        jobs = list(prompts.jobs(original, 7))
        assert [job.k for job in jobs] == list(range(1, 8))
        assert jobs[:3] == list(prompts.jobs(original, None))
        assert {job.prompt for job in jobs[:3]} == {"a", "b", "c"}
        assert [job.prompt for job in jobs[3:6]] == [job.prompt for job in jobs[:3]]


@pytest.mark.parametrize("column", ["path", "identity"])
def test_a_file_of_prompts(source: Source, world: Path, tmp_path: Path, column: str) -> None:
    named = {"path": ("03.png", "05.png"), "identity": ("tile 3", "tile 5")}[column]
    lines = [
        f"{column},prompt,note",
        f'{named[0]},"a cat, or\ntwo",x',
        f"{named[1]},sea,",
        f"{named[0]},dog,NA",
    ]
    (tmp_path / "p.csv").write_text("\n".join([*lines, "stranger,cat,"]) + "\n")
    done = made(
        source, tmp_path / "out", world, prompt=(), prompts=tmp_path / "p.csv", steps=3, strengths=(0.5,)
    )
    assert (done.made, done.strangers, done.unprompted) == (3, 1, 18)
    rows = [r for r in listed(tmp_path / "out") if r["role"] == "translation"]
    assert [(r["identity"], r["prompt"]) for r in rows] == [
        ("tile 3", "a cat, or\ntwo"),
        ("tile 3", "dog"),
        ("tile 5", "sea"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no file of prompts"),
        ("path,text\n03.png,x\n", "has the columns path, text"),
        ("path,prompt\n03.png,\n", "row 1 has an empty prompt"),
        ("path,prompt\nnowhere.png,x\n", "None of the 1 rows"),
        ("path,prompt\n03.png\n", "not a readable CSV"),
    ],
)
def test_files_that_are_no_prompts(world: Path, tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "p.csv").write_text(text)
    words = ["--model", world / "a", "--prompts", tmp_path / "p.csv", "--out", tmp_path / "out"]
    assert said in paragraph(command("translate", world / "images", *words, code=2))


# --- what is refused ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settled(world: Path) -> Path:
    """Four translations of two originals. Nothing is to change it."""
    made(Source.of(world / "images", world / "originals.csv"), world / "settled", world, limit=2)
    return world / "settled"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 4}, "made with steps 2, and 4"),
        ({"guidance": 1.0}, "made with guidance 7.5, and 1.0"),
        ({"quality": 80}, "made with quality 90, and 80"),
        ({"seed": 1}, "made with seed 0, and 1"),
        ({"image_size": 32}, 'made with model a .*"size": 64.*"size": 32'),
        ({"prompt": ("dog", "sea")}, "under the prompt '(cat|dog)', and '(dog|sea)'"),
    ],
)
def test_other_settings_need_another_folder(
    source: Source, world: Path, settled: Path, changed: dict[str, Any], said: str
) -> None:
    before = tree(settled)
    with pytest.raises(UsageError, match=said):
        made(source, settled, world, **{"limit": 2} | changed)
    assert tree(settled) == before


def test_other_weights_or_originals_need_another_folder(source: Source, world: Path, tmp_path: Path) -> None:
    made(source, tmp_path / "out", world, limit=1)
    renamed = f"a={world / 'b'}"
    options = TranslateOptions((renamed,), (0.5,), ("cat", "dog"), limit=1, **QUICK)
    with pytest.raises(UsageError, match="made with model a"):
        translate(Originals.of_source(source), tmp_path / "out", options)
    with pytest.raises(UsageError, match="made with originals"):
        made(Source.of(world / "images"), tmp_path / "out", world, limit=1)


def test_a_run_that_made_nothing_settles_nothing(source: Source, world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiples of 8"):
        made(source, tmp_path / "out", world, limit=1, image_size=60, steps=4)
    assert made(source, tmp_path / "out", world, limit=1, steps=6).made == 2


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out), pytest.raises(StoreLockedError, match="another process"), opened(out):
        pass
    with opened(out):
        pass


def test_a_split_without_a_prompt(source: Source, world: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("path,prompt\n03.png,cat\n")
    with pytest.raises(UsageError, match="nothing to translate: 3 originals of the test split"):
        made(source, tmp_path / "out", world, prompt=(), prompts=tmp_path / "p.csv", split="test")


def test_refusals(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "images", "images")
    Path("other").mkdir()
    Path("other/file").touch()
    a, plain = ("--model", world / "a"), ("--prompt", "cat")
    for words, said in [
        ((*plain,), "No model is named"),
        ((*a,), "No prompt is given"),
        ((*a, *plain, "--prompts", "p.csv"), "both given"),
        ((*a, *plain, "--strength", 0.01), "0.2 steps"),
        ((*a, *plain, "--model", "nowhere"), "no model nowhere"),
        ((*a, *a, *plain), "both called 'a'"),
        (("--model", f"x/y={world / 'a'}", *plain), "cannot be called 'x/y'"),
        ((*a, *plain, "--out", "images/new"), "inside"),
        ((*a, *plain, "--out", "other"), "not made by translate"),
        ((*a, *plain, "--out", "other/file"), "no folder can be made"),
        (("images", *a, *plain, "--store", "s.zarr"), "both name originals"),
        ((*a, *plain, "--store", "s.zarr"), "no store at s.zarr"),
        (("nowhere", *a, *plain), "no folder nowhere"),
    ]:
        assert said in paragraph(command("translate", *words, code=2)), words
    assert not (tmp_path / "translations").exists()
