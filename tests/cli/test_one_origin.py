"""duplicates, and what it changes: a group of near-duplicates is one origin to evaluate and to match."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_helpers import picture
from PIL import Image
from typer.testing import CliRunner

from cli import account, measure
from cli.app import app
from cli.collection import Collection
from cli.duplicates import run_duplicates
from cli.matching import run_match
from cli.workflows import run_encode, run_simulate
from latentstore.errors import UsageError
from latentstore.simulate import Diffusion


def said(*words: str, code: int = 0) -> str:
    """What a command prints: its answer, or its one paragraph."""
    done = CliRunner().invoke(app, words)
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout if code == 0 else done.stderr


def twice(here: Path, quality: int = 60) -> Path:
    """A folder with every picture and, under a name (so an identity and a split) of its own, a JPEG of it."""
    folder = here / "twice"
    shutil.copytree(here / "images", folder)
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            image.save(folder / f"again {path.name}", quality=quality)
    return folder


def pairs_store(here: Path, folder: Path) -> Path:
    run_encode(folder, here / "s.zarr", encoder="patch", image_size=64)
    run_simulate(here / "s.zarr", here / "pairs.zarr", Diffusion(0.9, 0.3), per_origin=2)
    return here / "pairs.zarr"


def raw_evaluation(store: Path) -> tuple[measure.Evaluation, Collection]:
    collection = Collection.open(store)
    control = {"raw": measure.fit_controls(collection, 8)["raw"]}
    return measure.evaluate(collection, collection.queries("test"), {}, control), collection


def caveats(evaluation: measure.Evaluation, collection: Collection) -> str:
    return "\n".join(account.caveats(collection, collection.queries("test"), evaluation))


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_shows_the_groups_and_how_the_threshold_was_set(here: Path) -> None:
    run_encode(twice(here), here / "s.zarr", encoder="patch", image_size=64)
    text = said("duplicates", "s.zarr")
    assert "60 groups of near-duplicates, 120 of 120 images in them, the largest of 2" in text
    for part in ("threshold 0.", "set by", "every pair", "again photo 00.jpg", "photo 00.jpg", "--json"):
        assert part in text
    assert text.count("  group ") == 10
    found = json.loads(said("duplicates", "s.zarr", "--json"))
    assert len(found["groups"]) == 60
    for group in found["groups"]:
        (one, score), (other, lower) = group
        assert {one, other} == {f"{'again ' * a}{one.removeprefix('again ')}" for a in (0, 1)}
        assert score == 1.0 >= lower >= found["settings"]["threshold"]
    assert (here / "s.zarr" / "duplicates" / "groups.parquet").exists()
    said("verify", "s.zarr")


def test_different_pictures_are_in_no_group(here: Path) -> None:
    run_encode(here / "images", here / "s.zarr", encoder="patch", image_size=64)
    found = run_duplicates(here / "s.zarr")
    assert (found.groups, found.rows) == ([], 0)


def test_a_named_threshold_is_kept_and_a_strict_one_finds_less(here: Path) -> None:
    run_encode(twice(here, quality=10), here / "s.zarr", encoder="patch", image_size=64)
    loose, strict = (run_duplicates(here / "s.zarr", threshold=t) for t in (0.8, 1.0))
    assert len(loose.groups) > len(strict.groups) == 0
    kept = json.loads((here / "s.zarr" / "duplicates" / "groups.json").read_text())
    assert (kept["threshold"], kept["set by"]) == (1.0, "--threshold")


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["nowhere.zarr"], 2, ["nowhere.zarr", "latentstore encode"]),
        (["images"], 2, ["images"]),
        (["few.zarr"], 2, ["5 images", "16"]),
        (["few.zarr", "--threshold", "1.5"], 2, ["--threshold", "1.5"]),
    ],
)
def test_bad_input_is_told_in_one_paragraph(
    here: Path, words: list[str], code: int, parts: list[str]
) -> None:
    few = here / "few"
    few.mkdir()
    for i in range(5):
        picture(i).save(few / f"{i}.png")
    run_encode(few, here / "few.zarr", encoder="patch", image_size=64)
    told = said("duplicates", *words, code=code)
    assert told.count("\n") == 1
    for part in parts:
        assert part in told
    assert [p.name for p in (here / "few.zarr" / "duplicates").iterdir()] == ["zarr.json"]


# --- what it changes --------------------------------------------------------------------------------------


def test_a_near_duplicate_of_the_origin_is_a_right_answer(here: Path) -> None:
    """Pictures and their twins in one split, so that no query is left out: Acc only tells the labels."""
    folder = twice(here)
    lines = [f"{p.name},{p.name.removeprefix('again ')}" for p in sorted(folder.iterdir())]
    (folder / "list.csv").write_text("path,group\n" + "\n".join(lines) + "\n")
    run_encode(folder, here / "s.zarr", manifest=folder / "list.csv", encoder="patch", image_size=64)
    # So weak a diffusion that every query finds its picture, but not which of the twins.
    run_simulate(here / "s.zarr", here / "pairs.zarr", Diffusion(0.5, 0.0), per_origin=8)
    before, _ = raw_evaluation(here / "pairs.zarr")
    run_duplicates(here / "pairs.zarr")
    after, collection = raw_evaluation(here / "pairs.zarr")
    (lied,), (true,) = before.rankings.values(), after.rankings.values()
    assert true.acc > 0.95
    assert lied.acc < true.acc - 0.2
    assert before.n_copies == after.n_copies == 0
    assert len(set(collection.labels(collection.identity).tolist())) == 60


def test_a_query_whose_near_duplicate_was_fitted_on_is_left_out_and_counted(here: Path) -> None:
    store = pairs_store(here, twice(here))
    before, collection = raw_evaluation(store)
    assert before.n_copies == 0, "no file is a copy"
    assert f"latentstore duplicates {store}" in caveats(before, collection)
    run_duplicates(store)
    after, collection = raw_evaluation(store)
    queries = collection.queries("test")
    other = {i: i.removeprefix("again ") if "again " in i else f"again {i}" for i in collection.identity}
    split = dict(zip(collection.identity, collection.split, strict=True))
    leaking = [i for i in queries.identity if split[other[i]] != "test"]
    assert leaking
    assert after.n_copies == len(leaking)
    assert after.n_copies + sum(len(r.ap) for r in after.rankings.values()) == len(queries.rows)
    text = caveats(after, collection)
    assert f"{after.n_copies} held-out queries were left out: a copy or near-duplicate" in text
    assert "latentstore duplicates" not in text


def test_a_leak_through_a_chain_is_a_leak_though_it_is_another_group(here: Path) -> None:
    run_encode(here / "images", here / "s.zarr", encoder="patch", image_size=64)
    collection = Collection.open(here / "s.zarr")
    rows = {
        s: int(collection.gallery[collection.split[collection.gallery] == s][0]) for s in ("train", "test")
    }
    train, test = rows["train"], rows["test"]
    low = min(train, test)
    collection.near_of = lambda relation: (  # type: ignore[method-assign]
        {train: train, test: test} if relation == "group" else {train: low, test: low}
    )
    identity = collection.identity[[train, test]]
    assert len(set(collection.labels(identity).tolist())) == 2
    assert collection.is_clean(identity, ["train", "test"]).tolist() == [True, False]


def test_match_lists_each_group_once_and_the_margin_is_to_another(here: Path) -> None:
    run_encode(twice(here), here / "s.zarr", encoder="patch", image_size=64)
    words = ("match", "images/photo 07.jpg", "--store", "s.zarr", "--top", "60")
    before = json.loads(said(*words, "--json"))
    assert "not looked for" in before["note"]
    listed = {c["path"]: c["score"] for c in before["matches"][0]["candidates"]}
    said("duplicates", "s.zarr")
    after = json.loads(said(*words, "--json"))
    (match,) = after["matches"]
    assert after["note"] == ""
    first, second = match["candidates"][:2]
    assert (first["path"], first["near"]) == ("photo 07.jpg", ["again photo 07.jpg"])
    assert len(match["candidates"]) == 60, "each picture once, though its twin stands close behind"
    assert len({c["path"].removeprefix("again ") for c in match["candidates"]}) == 60
    assert match["margin"] == pytest.approx(first["score"] - second["score"], abs=1e-6)
    twin = listed["again photo 07.jpg"]
    assert before["matches"][0]["margin"] == pytest.approx(first["score"] - twin, abs=1e-6)
    assert match["margin"] > before["matches"][0]["margin"] + 0.1
    text = said(*words)
    assert "+ 1 near-duplicate\n" in text
    assert "Note:" not in text


def test_groups_of_a_store_that_has_grown_are_not_used(here: Path) -> None:
    folder = twice(here)
    run_encode(folder, here / "s.zarr", encoder="patch", image_size=64)
    run_duplicates(here / "s.zarr")
    query = [here / "images" / "photo 07.jpg"]
    assert run_match(query, here / "s.zarr").matches[0].candidates[0].near
    picture(1000).save(folder / "new.png")
    run_encode(folder, here / "s.zarr", encoder="patch", image_size=64)
    found = run_match(query, here / "s.zarr")
    assert not found.matches[0].candidates[0].near
    assert "before its latents changed" in found.note
    assert f"latentstore duplicates {here / 's.zarr'}" in found.note
    run_duplicates(here / "s.zarr")
    assert run_match(query, here / "s.zarr").note == ""


def test_a_collection_without_originals_is_refused(here: Path) -> None:
    (here / "list.csv").write_text("path,identity,role\n" + "images/photo 01.jpg,a,query\n")
    run_encode(None, here / "q.zarr", manifest=here / "list.csv", encoder="patch", image_size=64)
    with pytest.raises(UsageError, match="no valid origin"):
        run_duplicates(here / "q.zarr")
