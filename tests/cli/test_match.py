"""match: whatever a query comes as, the same origins; a verdict beside them; a page that shows why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import picture
from typer.testing import CliRunner

from cli.app import app
from cli.collection import Collection
from cli.indexing import IndexOptions, run_index
from cli.matching import MatchOptions, run_match
from cli.own_map import own_projection
from cli.verdicts import Judge
from cli.workflows import run_encode
from latentstore.errors import UsageError
from latentstore.index import Index
from latentstore.removal import remove
from latentstore.results import load
from latentstore.store import open_store

N, SIDE = 160, 32
ROUNDING = 8 * float(np.finfo(np.float32).eps)
"""Scores are cosines; rows are projected in float32, in products of other shapes."""
HOSTILE = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of 160 pictures; suspects: seven of them as JPEG, three that are none of it."""
    root = tmp_path_factory.mktemp("match")
    (root / "images").mkdir()
    (root / "suspects").mkdir()
    for i in range(N):
        picture(i, 64).save(root / "images" / f"{i:03d}.png")
    for i in range(7):
        picture(i, 64).save(root / "suspects" / f"in {i}.jpg", quality=20)
    for i in range(3):
        picture(10_000 + i, 64).save(root / "suspects" / f"out {i}.jpg", quality=20)
    run_encode(root / "images", root / "s.zarr", encoder="patch", image_size=SIDE)
    run_encode(root / "suspects", root / "q.zarr", encoder="patch", image_size=SIDE)
    return root


def said(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["match", *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def same(a: list[tuple[str, float]], b: list[tuple[str, float]], tolerance: float) -> None:
    assert [path for path, _ in a] == [path for path, _ in b]
    np.testing.assert_allclose([s for _, s in a], [s for _, s in b], rtol=0, atol=tolerance)


def first(found: object) -> list[tuple[str, float]]:
    return [(m.candidates[0].path, m.candidates[0].score) for m in found.matches]


def test_files_folders_latents_and_stores_find_the_same(world: Path, tmp_path: Path) -> None:
    store, plain = world / "s.zarr", MatchOptions(verdicts=False)
    files = sorted((world / "suspects").iterdir())
    by_file = run_match(files, store, plain)
    assert [c for c, _ in first(by_file)[:7]] == [f"{i:03d}.png" for i in range(7)]
    by_folder = run_match([world / "suspects"], store, plain)
    assert [m.query for m in by_folder.matches] == [m.query for m in by_file.matches]
    same(first(by_folder), first(by_file), ROUNDING)
    # The query store keeps float16: its scores differ by that, its ranks do not.
    by_store = run_match([world / "q.zarr"], store, plain)
    same(first(by_store), first(by_file), 4 * float(np.finfo(np.float16).eps))
    latents = open_store(world / "q.zarr").reader.gather(np.arange(10)).astype(np.float32)
    np.save(tmp_path / "all.npy", latents)
    np.save(tmp_path / "one.npy", latents[3])
    by_latents = run_match([tmp_path / "all.npy", tmp_path / "one.npy"], store, plain)
    same(first(by_latents)[:10], first(by_store), ROUNDING)
    same(first(by_latents)[10:], first(by_store)[3:4], ROUNDING)
    assert by_latents.matches[3].query == f"{tmp_path / 'all.npy'} row 3"


def test_latents_that_cannot_be_compared_are_named(world: Path, tmp_path: Path) -> None:
    dim = open_store(world / "s.zarr").layout.dim
    rows = np.zeros((2, dim), np.float32)
    rows[0] = 1
    rows[1, 5] = np.nan
    np.save(tmp_path / "some.npy", rows)
    np.save(tmp_path / "other.npy", np.ones(dim + 1, np.float32))
    text = said(tmp_path / "some.npy", tmp_path / "other.npy", "--store", world / "s.zarr", code=1)
    assert "some.npy row 1 cannot be read: not_finite" in text
    assert re.search(r"other.npy cannot be read: unreadable: an array of shape", text)


def test_a_query_that_the_map_takes_out_of_range_is_named_and_the_others_are_answered(
    world: Path, tmp_path: Path
) -> None:
    store = open_store(world / "s.zarr")
    rows = store.reader.gather(np.arange(3)).astype(np.float32)
    rows[1] = np.where(np.arange(rows.shape[1]) % 2, 3e38, -3e38)
    np.save(tmp_path / "some.npy", rows)
    np.save(tmp_path / "none.npy", rows[:0])
    W = own_projection(Collection.open(world / "s.zarr"))[0]
    large = np.where(np.arange(W.dim) % 2, 4.0, -4.0)[:, None] * np.ones((1, W.rank))
    replace(W, query_map=W.query_map + large).save(tmp_path / "w.safetensors")
    options = MatchOptions(projection=tmp_path / "w.safetensors", verdicts=False)
    found = run_match([tmp_path / "some.npy", tmp_path / "none.npy"], world / "s.zarr", options)
    assert [m.query[-5:] for m in found.matches] == ["row 0", "row 2"]
    assert [m.candidates != [] for m in found.matches] == [True, True]
    assert dict(found.unreadable) == {
        f"{tmp_path / 'some.npy'} row 1": "not_finite: the map takes it out of float32's range",
        f"{tmp_path / 'none.npy'}": "unreadable: it holds no rows",
    }
    np.save(tmp_path / "some.npy", rows[1:2])
    with pytest.raises(UsageError, match=r"None of the 2 queries.*no rows.*out of float32's range"):
        run_match([tmp_path / "some.npy", tmp_path / "none.npy"], world / "s.zarr", options)


def test_how_many_are_asked_for_changes_no_verdict(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged, verdicts = [], Judge.verdicts

    def judging(self: Judge, latents: Any, rows: Any) -> Any:
        judged.append(rows)
        return verdicts(self, latents, rows)

    monkeypatch.setattr(Judge, "verdicts", judging)
    few, many = (run_match([world / "suspects"], world / "s.zarr", MatchOptions(top=n)) for n in (1, 150))
    np.testing.assert_array_equal(*judged)
    for a, b in zip(few.matches, many.matches, strict=True):
        assert a.verdict is not None
        assert b.verdict is not None
        assert (a.verdict.p, a.verdict.decision) == (b.verdict.p, b.verdict.decision)


def test_a_verdict_tells_those_that_are_here_from_those_that_are_not(world: Path) -> None:
    found = run_match([world / "suspects"], world / "s.zarr")
    verdicts = {Path(m.query).stem: m.verdict for m in found.matches}
    assert all(v is not None for v in verdicts.values()), found.no_verdict
    here = [v for name, v in verdicts.items() if name.startswith("in")]
    away = [v for name, v in verdicts.items() if name.startswith("out")]
    # At JPEG 20 and 32 x 32 pixels not all pass the highest bar; none is denied.
    decided = [v.decision for v in here]
    assert "no origin here" not in decided
    assert decided.count("match") >= 5
    assert "match" not in [v.decision for v in away]
    assert max(v.p for v in here) < min(v.p for v in away)
    for v in (*here, *away):
        low, high = v.false_alarm_interval
        assert 0 <= low <= v.false_alarm <= high <= 1
        assert v.n >= 20
        assert v.detection is not None
        assert v.detection_of
    text = said(world / "suspects" / "in 0.jpg", "--store", world / "s.zarr")
    assert "match (p = " in text
    assert "false alarms" in text
    assert "origins found" in text


def test_the_page_shows_both_pictures_and_where_they_agree(world: Path, tmp_path: Path) -> None:
    query = tmp_path / HOSTILE
    picture(5, 64).save(query)
    page, out = tmp_path / "why.html", tmp_path / "why.json"
    words = (query, world / "suspects" / "out 1.jpg", "--store", world / "s.zarr", "--top", 2)
    text = said(*words, "--html", page, "--out", out)
    assert f"Written: {page}" in text
    html = page.read_text()
    assert "<img src=x" not in html
    assert page.stat().st_size < 5_000_000
    report = load(out)
    assert report.kind == "match"
    match = report.matches[0]
    assert match.candidates[0].path == "005.png"
    assert match.thumbnail.startswith("data:image/jpeg;base64,")
    for candidate in match.candidates:
        assert candidate.thumbnail.startswith("data:image/jpeg;base64,")
        assert candidate.heat.startswith("data:image/png;base64,")
        assert candidate.thumbnail in html
    assert match.candidates[0].heat in html
    assert report.curves, "the scores that the verdict rests on"
    assert "2 queries were compared with 160 pictures" in report.summary[0]


def test_an_index_changes_nothing_but_the_time(world: Path, tmp_path: Path) -> None:
    store, images = tmp_path / "s.zarr", tmp_path / "images"
    shutil.copytree(world / "images", images)
    run_encode(images, store, encoder="patch", image_size=SIDE)
    files = [world / "suspects"]
    before = run_match(files, store)
    assert CliRunner().invoke(app, ["index", "--store", str(store)]).exit_code == 0
    after = run_match(files, store)
    assert after.searched != before.searched
    for a, b in zip(after.matches, before.matches, strict=True):
        same(*([(c.path, c.score) for c in match.candidates] for match in (a, b)), ROUNDING)
        assert a.verdict is not None
        assert b.verdict is not None
        assert a.verdict.decision == b.verdict.decision
    assert after.notes == []
    # A collection that has grown: said, and searched whole all the same.
    picture(10_000, 64).save(images / "new.png")
    run_encode(images, store, encoder="patch", image_size=SIDE)
    late = run_match([world / "suspects" / "out 0.jpg"], store)
    assert late.matches[0].candidates[0].path == "new.png"
    assert any("latentstore index" in note for note in late.notes)


@pytest.mark.parametrize("during", ["the search", "the calibration"])
def test_an_index_that_is_changed_beneath_a_search(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """An image is removed, and its place taken by a new one, while the index is read."""
    store, images = tmp_path / "s.zarr", tmp_path / "images"
    images.mkdir()
    for path in sorted((world / "images").iterdir())[:60]:
        shutil.copy(path, images)
    run_encode(images, store, encoder="patch", image_size=SIDE)
    run_index(store, IndexOptions())
    read, scans = Index.blocks, []

    def changed_after(self: Index, first: int = 0) -> Iterator[Any]:
        scans.append(self)
        if len(scans) == 1 + (during == "the calibration"):
            remove(store, [3])
            picture(10_000, 64).save(images / "new.png")
            run_encode(images, store, encoder="patch", image_size=SIDE)
            run_index(store, IndexOptions())
        yield from read(self, first)

    monkeypatch.setattr(Index, "blocks", changed_after)
    found = run_match([world / "suspects" / "in 3.jpg", world / "suspects" / "out 0.jpg"], store)
    if during == "the calibration":
        assert "was changed while it was read" in found.no_verdict
        assert first(found)[0][0] == "003.png"
        return
    assert any("was changed while it was searched" in note for note in found.notes)
    assert found.searched == "projected for this search"
    assert all(c.path != "003.png" for m in found.matches for c in m.candidates)
    assert first(found)[1][0] == "new.png"
    assert first(found)[1][1] > 0.5


def test_what_cannot_be_done_is_refused_before_the_work(world: Path, tmp_path: Path) -> None:
    words = (world / "suspects" / "in 0.jpg", "--store", world / "s.zarr")
    assert "no folder" in said(*words, "--html", tmp_path / "nowhere" / "p.html", code=2)
    assert "latentstore index" in said(*words, "--approximate", code=2)
    other = tmp_path / "other.zarr"
    run_encode(world / "suspects", other, encoder="patch", image_size=2 * SIDE)
    assert "space" in said(other, "--store", world / "s.zarr", code=1)


def test_json_holds_the_verdicts(world: Path) -> None:
    found = json.loads(said(world / "suspects" / "in 2.jpg", "--store", world / "s.zarr", "--json"))
    verdict = found["matches"][0]["verdict"]
    assert verdict["decision"] == "match"
    assert 0 < verdict["p"] <= 0.05
    none = json.loads(
        said(world / "suspects" / "in 2.jpg", "--store", world / "s.zarr", "--json", "--no-verdict")
    )
    assert none["matches"][0]["verdict"] is None
