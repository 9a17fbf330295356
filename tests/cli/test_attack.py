"""attack: nothing changes where nothing is attacked, nothing but the queries is touched, seeds decide all."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import SPLITS, pair_store, paragraph, picture
from PIL import Image
from typer.testing import CliRunner

from cli import attack_pictures, attacking, measure
from cli.app import app
from cli.attack_latents import Latents, encode_attacked
from cli.attack_pictures import AttackOptions, parse_attacks
from cli.attack_tables import BEST_PCA, UNATTACKED, Attacked, intensities
from cli.collection import Collection, Queries
from cli.solving import SolveOptions, fit
from cli.workflows import run_encode, run_simulate
from latentstore import attacks, results
from latentstore.encoders import load_for
from latentstore.errors import UsageError
from latentstore.simulate import Diffusion
from solvers.errors import LeakError
from solvers.projection import Projection

N_TEST = len(SPLITS["test"])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 36 test pictures blended with others: hard enough that no map finds all of them."""
    return pair_store(tmp_path_factory.mktemp("pairs"), 0.62)


@pytest.fixture(scope="module")
def own_map(pairs: Path) -> Path:
    W, _, _ = fit(Collection.open(pairs), SolveOptions(method="analytic", rank=32))
    path = pairs.parent / "W.safetensors"
    W.save(path)
    return path


def run(store: Path, projection: Path, text: str, **more: Any) -> Attacked:
    options = {name: more.pop(name) for name in ("seed", "limit") if name in more}
    return attacking.attack(store, [projection], AttackOptions(text, **options), **more)


def command(*words: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["attack", *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def values(attacked: Attacked) -> dict[tuple[str, str], tuple[float, float]]:
    return {(r.step.attack.name, r.subject): (r.map, r.acc) for r in attacked.rows}


# --- figures ----------------------------------------------------------------------------------------------


def test_no_attack_is_what_evaluate_says_and_empty_attacks_change_nothing(pairs: Path, own_map: Path) -> None:
    attacked = run(pairs, own_map, "rotation=0,watermark=0,blur=3")
    collection, W = Collection.open(pairs), Projection.load(own_map)
    queries = collection.queries("test")
    ladder = measure.fit_controls(collection, W.rank)
    found = measure.evaluate(collection, queries, {"analytic": W}, ladder, every_rank=True)
    mine = {subject: figures for (name, subject), figures in values(attacked).items() if name == UNATTACKED}
    theirs = {
        f.subject: f.value for f in found.figures if f.name == "mAP" and f.role in ("method", "control")
    }
    for subject in ("analytic", "raw", "centred", "norm-weighted"):
        assert mine[subject][0] == pytest.approx(theirs[subject], abs=1e-12)  # the same ranks, summed
        assert 0 < mine[subject][0] < 1
    best = max(value for subject, value in theirs.items() if subject.startswith("PCA-whitened"))
    assert mine[BEST_PCA][0] == pytest.approx(best, abs=1e-12)
    for row in attacked.rows:
        if row.step.attack.name in ("rotation 0°", "watermark 0"):
            assert (row.map, row.acc) == mine[row.subject]
            assert (row.difference, row.difference_interval) == (0, (0, 0))
    assert any(r.difference != 0 for r in attacked.rows if r.step.attack.name == "blur 3 px")


def test_a_symmetric_collection_does_not_feel_a_flip(tmp_path: Path, pairs: Path, own_map: Path) -> None:
    lines = ["path,identity,role,split"]
    for i in range(30):
        half = np.asarray(picture(i, 32))[:, :16]
        whole = Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1))
        whole.save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i},origin,{'test' if i < 10 else 'train'}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    run_encode(tmp_path, tmp_path / "s.zarr", manifest=tmp_path / "list.csv", encoder="patch", image_size=32)
    symmetric = attacking.attack(tmp_path / "s.zarr", [], AttackOptions("flip"))
    by_name = {(r.step.attack.name, r.subject): r.difference for r in symmetric.rows}
    assert by_name["flip left-right", "raw"] == by_name["flip left-right", "analytic"] == 0
    assert by_name["flip top-bottom", "raw"] < 0
    other = {(r.step.attack.name, r.subject): r.difference for r in run(pairs, own_map, "flip=1").rows}
    assert other["flip left-right", "raw"] < 0


def test_the_seed_decides_and_the_company_does_not(pairs: Path, own_map: Path) -> None:
    first = run(pairs, own_map, "crop=0.6,noise=80", seed=3)
    again = run(pairs, own_map, "noise=80,jpeg=50,crop=0.6", seed=3)
    alone = {key: value for key, value in values(again).items() if key[0] != "JPEG 50"}
    assert values(first) == alone
    other = run(pairs, own_map, "crop=0.6,noise=80", seed=4)
    assert values(other)["crop 60 %", "raw"] != values(first)["crop 60 %", "raw"]
    assert values(other)[UNATTACKED, "raw"] == values(first)[UNATTACKED, "raw"]


def test_little_memory_gives_the_same_ranks(
    pairs: Path, own_map: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(pairs, own_map, "crop=0.8,flip")
    monkeypatch.setattr(attacking, "HELD", 1)  # one attack's queries at a time
    assert values(run(pairs, own_map, "crop=0.8,flip")) == values(whole)


def test_references_are_not_touched(pairs: Path, own_map: Path) -> None:
    before = tree(pairs)
    projected: dict[str, Any] = {}
    collection, W = Collection.open(pairs), Projection.load(own_map)
    projected["before"] = collection.references(W, collection.gallery)
    attacked = run(pairs, own_map, "jpeg=5")
    assert tree(pairs) == before
    assert attacked.report.data["references ranked"] == len(collection.gallery) == 108
    projected["after"] = Collection.open(pairs).references(W, collection.gallery)
    assert projected["before"].tobytes() == projected["after"].tobytes()


def test_originals_are_attacked_where_there_is_nothing_else(
    tmp_path: Path, pairs: Path, own_map: Path
) -> None:
    store = pair_store(tmp_path, 0.5, splits=("train",))
    attacked = attacking.attack(store, [], AttackOptions("jpeg=90,crop=0.5", limit=20))
    found = values(attacked)
    assert found[UNATTACKED, "analytic"] == found[UNATTACKED, "raw"] == (1, 1)  # each finds itself
    assert found["crop 50 %", "raw"][0] < 1
    assert {r.n for r in attacked.rows} == {20}
    assert attacked.report.data["attacked"] == "originals"
    said = " ".join(attacked.report.caveats)
    assert "are not translations" in said
    assert f"20 of {N_TEST}" in said
    assert not any("are not translations" in caveat for caveat in run(pairs, own_map, "flip").report.caveats)


def test_a_store_of_translations_alone_is_attacked_as_queries(
    tmp_path: Path, pairs: Path, own_map: Path
) -> None:
    def alone(name: str, role: str, ending: str) -> Path:
        listed = tmp_path / f"{name}.csv"
        lines = [f"{i}{ending}.png,{i},{role},test" for i in SPLITS["test"]]
        listed.write_text("\n".join(["path,identity,role,split", *lines]))
        run_encode(pairs.parent, tmp_path / f"{name}.zarr", manifest=listed, encoder="patch", image_size=32)
        return tmp_path / f"{name}.zarr"

    # JPEG draws nothing by chance: the same pictures give the same figures, in whichever rows they stand.
    attacked = run(pairs, own_map, "jpeg=20", queries=alone("translations", "translation", "b"))
    assert attacked.report.data["attacked"] == "translations and queries"
    assert values(attacked) == values(run(pairs, own_map, "jpeg=20"))
    with pytest.raises(UsageError, match=r"--queries .*originals.zarr holds no query"):
        run(pairs, own_map, "jpeg=20", queries=alone("originals", "origin", ""))


def test_intervals_over_few_photographs_settle_nothing(pairs: Path, own_map: Path) -> None:
    few, enough = (run(pairs, own_map, "rotation=90", limit=n) for n in (measure.ROUGH - 1, measure.ROUGH))
    assert "9 translations and queries of 9 photos, attacked in 1 way, were" in few.report.summary[0]
    for said, rough in ((few.report, True), (enough.report, False)):
        assert len(said.summary) == 3
        assert all(("(rough: 9 photographs)" in line) == rough for line in said.summary[1:])
        assert all(("(by 95 % intervals)" in line) != rough for line in said.summary[1:])
        assert any("come from 9 photographs: intervals" in c for c in said.caveats) == rough


def test_lost_pictures_are_counted_and_the_rest_is_measured(tmp_path: Path) -> None:
    store = pair_store(tmp_path, 0.62)
    collection = Collection.open(store)
    W = tmp_path / "W.safetensors"
    fit(collection, SolveOptions(method="analytic", rank=16))[0].save(W)
    whole = run(store, W, "crop=0.7")
    (tmp_path / "72b.png").unlink()
    picture(1, 32).save(tmp_path / "80b.png")
    (tmp_path / "100b.png").write_bytes(b"no picture")
    left = run(store, W, "crop=0.7")
    assert {r.n for r in left.rows} == {N_TEST - 3}
    assert left.report.data["without a picture"] == 3
    said = next(c for c in left.report.caveats if "left out" in c)
    assert all(part in said for part in ("3 pictures", "72b.png: missing", "80b.png: changed", "100b.png"))
    # What is left is ranked as before: the three that are gone had an AP from 0 to 1 each.
    before, after = values(whole), values(left)
    for key in before.keys() - {(group, BEST_PCA) for group, _ in before}:
        assert -1e-9 <= N_TEST * before[key][0] - (N_TEST - 3) * after[key][0] <= 3 + 1e-9
    for i in SPLITS["test"]:
        (tmp_path / f"{i}b.png").unlink(missing_ok=True)
    with pytest.raises(UsageError, match=rf"None of the {N_TEST} query pictures .*missing.*and 33 more"):
        run(store, W, "crop=0.7")


def test_each_picture_has_its_own_seed(tmp_path: Path, pairs: Path) -> None:
    collection = Collection.open(pairs)
    chosen = attack_pictures.choose(collection, None, AttackOptions(limit=5))
    seen: list[Any] = []

    def keep(image: Image.Image, seed: attacks.Seed) -> Image.Image:
        seen.append(seed)
        return image

    wanted = [(9, row) for row in chosen.rows.tolist()]
    attack_pictures.write_attacked(chosen, [attacks.Attack("kept", keep)], tmp_path / "w", seed=9)
    assert seen == wanted
    seen.clear()
    encoder = load_for(collection.store.space, collection.store.provenance["encoder"])
    with Latents(1, 5, collection.store.layout) as held:
        made = [attacks.Attack("kept", keep)]
        nobody: Any = lambda first, second: None  # noqa: E731
        lost = encode_attacked(
            collection, chosen.rows, made, encoder, 9, held, on_start=nobody, on_rows=nobody
        )
        # Encoded as the store was, to the bit.
        np.testing.assert_array_equal(held.read(0, np.ones(5, bool)), collection.read(chosen.rows))
    assert sorted(seen) == wanted
    assert lost == {}


def test_latents_come_back_by_attack(tmp_path: Path, pairs: Path) -> None:
    layout = Collection.open(pairs).store.layout
    made = np.random.default_rng(0).normal(size=(3, 5, layout.dim)).astype(layout.dtype)
    with Latents(3, 5, layout) as held:
        for query in range(5):
            for attack in (2, 0, 1):
                held.put(attack, query, made[attack, query])
        kept = np.array([True, False, True, True, False])
        for attack in range(3):
            np.testing.assert_array_equal(held.read(attack, kept), made[attack, kept])


# --- pictures as files ------------------------------------------------------------------------------------


def test_written_pictures_encoded_as_queries_are_found_as_well(
    tmp_path: Path, pairs: Path, own_map: Path
) -> None:
    text = "crop=0.8,watermark=0.6"
    done = command("--store", pairs, "--attacks", text, "--write", tmp_path / "a", "--json")
    assert json.loads(done.stdout)["pictures"] == 2 * N_TEST
    with (tmp_path / "a" / "manifest.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert {(x["role"], x["split"]) for x in lines} == {("query", "test")}
    assert {x["model"] for x in lines} == {"crop 80 %", "watermark 0.6"}
    assert {int(x["identity"]) for x in lines} == set(SPLITS["test"])
    listed = tmp_path / "a" / "manifest.csv"
    run_encode(tmp_path / "a", tmp_path / "a.zarr", manifest=listed, encoder="patch", image_size=32)
    queries = Collection.open(tmp_path / "a.zarr")
    found = values(run(pairs, own_map, text))
    gallery, W = Collection.open(pairs), Projection.load(own_map)
    for name in ("crop 80 %", "watermark 0.6"):
        asked = Queries(queries, np.flatnonzero(queries.model == name), name)
        evaluation = measure.evaluate(gallery, asked, {"analytic": W}, {})
        assert evaluation.rankings["analytic", name].map == pytest.approx(
            found[name, "analytic"][0], abs=1e-12
        )
    # They are pictures like any others: they can be attacked in their turn.
    twice = run(pairs, own_map, "flip=1", queries=tmp_path / "a.zarr")
    assert {r.n for r in twice.rows} == {2 * N_TEST}


def test_writing_is_seeded_and_overwrites_nothing(tmp_path: Path, pairs: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        command("--store", pairs, "--attacks", "crop=0.5", "--write", tmp_path / name, "--seed", seed)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "c")
    before = tree(tmp_path / "a")
    assert "new or empty" in paragraph(command("--store", pairs, "--write", tmp_path / "a", code=2))
    assert tree(tmp_path / "a") == before
    said = paragraph(command("--store", pairs, "--write", tmp_path / "d", "--plot", "x.png", code=2))
    assert "--plot" in said
    assert not (tmp_path / "d").exists()
    assert "--write" in paragraph(command("--store", pairs, "--write", pairs / "zarr.json", code=2))


def test_attacked_pictures_of_a_limited_draw(tmp_path: Path, pairs: Path) -> None:
    chosen = attack_pictures.choose(Collection.open(pairs), None, AttackOptions(limit=4, seed=2))
    again = attack_pictures.choose(Collection.open(pairs), None, AttackOptions(limit=4, seed=2))
    assert chosen.rows.tolist() == again.rows.tolist() == sorted(chosen.rows.tolist())
    other = attack_pictures.choose(Collection.open(pairs), None, AttackOptions(limit=4, seed=3))
    assert chosen.rows.tolist() != other.rows.tolist()
    written = attack_pictures.write_attacked(chosen, [attacks.flip(1)], tmp_path / "w")
    assert (written.pictures, written.queries, written.lost) == (4, 4, [])


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_measured(tmp_path: Path, pairs: Path, own_map: Path) -> None:
    other = tmp_path / "W2.safetensors"
    fit(Collection.open(pairs), SolveOptions(method="analytic", rank=8))[0].save(other)
    files = {name: tmp_path / f"r.{name}" for name in ("json", "csv", "png", "html")}
    done = command(
        *("--store", pairs, "--projection", own_map, "--projection", other, "--attacks", "jpeg=20:90,flip"),
        *("--out", files["json"], "--csv", files["csv"], "--plot", files["png"], "--html", files["html"]),
    )
    report = results.load(files["json"])
    assert report.kind == "attack"
    for text in ("W ", "W2", "raw", "PCA-whitened, best", "JPEG 20", "flip top-bottom", *report.summary):
        assert text in done.stdout
    maps = report.find("mAP", subject="W2")
    assert {f.group for f in maps} == {UNATTACKED, "JPEG 20", "JPEG 90", "flip left-right", "flip top-bottom"}
    assert {(f.axes["attack"], f.axes.get("intensity")) for f in maps} == {
        *(("none", None), ("jpeg", 20), ("jpeg", 90), ("flip", 1), ("flip", 2)),
    }
    assert all(f.interval and f.interval[0] <= f.value <= f.interval[1] for f in maps)
    plots = {c.plot for c in report.curves}
    assert plots == {"Under attack: JPEG compression", "Under attack: Flip"}
    for curve in report.curves:
        # From the value without an attack on, to the hardest.
        at = 110 if "JPEG" in curve.plot else 0
        unattacked = next(f for f in report.find("mAP", subject=curve.label, group=UNATTACKED))
        assert (curve.x[0], curve.y[0]) == (at, unattacked.value)
        assert curve.x == sorted(curve.x, reverse="JPEG" in curve.plot)
        assert len(curve.x) == 3
    with files["csv"].open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 6
    by_key = {(line["group"], line["subject"]): float(line["mAP"]) for line in lines}
    assert by_key == {(f.group, f.subject): f.value for f in report.find("mAP") if f.role != "chance"}
    with Image.open(files["png"]) as plot:
        assert plot.format == "PNG"
        assert plot.width > plot.height
    assert "JPEG 20" in files["html"].read_text(encoding="utf-8")
    machine = command("--store", pairs, "--projection", own_map, "--attacks", "flip=1", "--json")
    assert json.loads(machine.stdout)["kind"] == "attack"
    assert machine.stderr == ""


def test_a_control_has_nothing_to_beat(tmp_path: Path, pairs: Path) -> None:
    path = tmp_path / "W.safetensors"
    fit(Collection.open(pairs), SolveOptions(method="pca", rank=8))[0].save(path)
    attacked = run(pairs, path, "flip=2")
    assert attacked.rivals == []
    assert not attacked.report.find("gain over best control")
    assert "costs, in points of mAP, pca" in attacked.report.summary[-1]


def test_attack_lists() -> None:
    assert {s.family for s in parse_attacks(None)} == set(attacks.USUAL)
    assert {s.family for s in parse_attacks("all")} == set(attacks.FAMILIES)
    steps = parse_attacks(" jpeg = 30:90 , blur,jpeg=30")
    assert [s.attack.name for s in steps] == ["JPEG 30", "JPEG 90", *(f"blur {n} px" for n in (1, 2, 3, 5))]
    assert intensities(steps) == {"jpeg": [90, 30], "blur": [1, 2, 3, 5]}  # the strongest last


WRONG = [
    (["--attacks", "jpg"], ["'jpg'", "is jpeg meant?", "blur"]),
    (["--attacks", "jpeg,"], ["''", "jpeg=90:50:30"]),
    (["--attacks", "jpeg=90.5"], ["90.5", "whole number"]),
    (["--attacks", "jpeg="], ["'jpeg='", "between colons"]),
    (["--attacks", "blur=1:two"], ["blur=1:two", "between colons"]),
    (["--attacks", "crop=1.5"], ["1.5", "between 0 and 1"]),
    (["--projection", "nowhere.safetensors"], ["nowhere.safetensors"]),
    (["--queries", "nowhere.zarr"], ["nowhere.zarr"]),
    (["--plot", "x.jpg"], ["x.jpg", "PNG"]),
    (["--out", "nowhere/r.json"], ["nowhere"]),
]


@pytest.mark.parametrize(("words", "parts"), WRONG, ids=lambda v: " ".join(v[:2]))
def test_what_cannot_be_is_told_before_any_work(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(pairs)
    said = paragraph(command("--store", pairs, *words, code=2))
    assert all(part in said for part in parts), said
    assert tree(pairs) == before
    assert not list(tmp_path.iterdir())


def test_stores_without_pictures_and_maps_of_other_latents_are_refused(
    tmp_path: Path, pairs: Path, own_map: Path
) -> None:
    run_simulate(pairs, tmp_path / "simulated.zarr", Diffusion(0.2, 0.3))
    with pytest.raises(UsageError, match="simulated latents, and attacks are made on pictures"):
        run(tmp_path / "simulated.zarr", own_map, "flip")
    # As a gallery it will do: the pictures are those of another store.
    assert run(tmp_path / "simulated.zarr", own_map, "flip=1", queries=pairs).rows
    W = Projection.load(own_map)
    wide = np.eye(100, 4, dtype=np.float32)
    Projection(wide, wide, method="mine").save(tmp_path / "wide.safetensors")
    with pytest.raises(UsageError, match=r"mine takes latents of 100 numbers.* have 64"):
        run(pairs, tmp_path / "wide.safetensors", "flip")
    W.using([str(SPLITS["test"][0])]).save(tmp_path / "leaked.safetensors")
    with pytest.raises(LeakError):
        run(pairs, tmp_path / "leaked.safetensors", "flip")


def test_a_store_without_test_pictures_says_so(tmp_path: Path) -> None:
    for i in range(4):
        picture(i, 32).save(tmp_path / f"{i}.png")
    (tmp_path / "l.csv").write_text("path,split\n" + "\n".join(f"{i}.png,train" for i in range(4)))
    run_encode(tmp_path, tmp_path / "s.zarr", manifest=tmp_path / "l.csv", encoder="patch", image_size=32)
    with pytest.raises(UsageError, match="0 pictures in its test split"):
        attacking.attack(tmp_path / "s.zarr", [], AttackOptions("flip"))
