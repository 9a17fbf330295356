"""index: what a search may use of it, what it says, and that it stays right as the collection changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import Run, RunApart, pair_store, picture
from typer.testing import CliRunner

from cli.app import app
from cli.collection import Collection
from cli.indexing import WORTH, own_index, usable_index
from cli.own_map import own_projection
from cli.workflows import run_encode
from latentstore.index import MAP, Index, kept
from latentstore.removal import remove
from latentstore.search import has_faiss
from solvers.projection import Projection

S = Path("s.zarr")


def said(*words: Any, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["index", *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def told(*words: Any) -> Any:
    done = CliRunner().invoke(app, ["index", *map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty pictures of 64 pixels: 256 values each."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    add(range(40))
    return S


def add(numbers: range) -> None:
    for i in numbers:
        picture(i).save(f"in/{i:03d}.png")
    run_encode(Path("in"), S, encoder="patch", image_size=64)


def collection() -> Collection:
    return Collection.open(S)


def rows_and_vectors(index: Index) -> dict[int, bytes]:
    return {int(r): v.tobytes() for rows, block in index.blocks() for r, v in zip(rows, block, strict=True)}


def test_it_holds_the_gallery_under_the_collections_own_map(store: Path) -> None:
    made = told("--store", store)
    assert (made["images"], made["added"], made["removed"], made["kept"]) == (40, 40, 0, 0)
    W, index = own_index(collection()) or pytest.fail("it is current")
    assert W.fingerprint == index.map == made["map"]["fingerprint"]
    vectors = np.stack([np.frombuffer(v, np.float32) for _, v in sorted(rows_and_vectors(index).items())])
    whole = W.references(collection().read(collection().gallery))
    # One product of 1,024 rows and one of 40: sums of 256 float32 products of unit rows.
    np.testing.assert_allclose(vectors, whole, atol=256 * 2.0**-24)
    assert usable_index(collection(), W)[1] == ""


def test_added_and_removed_images_do_not_fit_the_map_anew(store: Path) -> None:
    before = told("--store", store)
    add(range(40, 50))
    assert own_index(collection()) is None
    stale = usable_index(collection(), Projection.load(kept(S)[0] / MAP))[1]
    assert "before the images changed" in stale
    assert "latentstore index --store s.zarr" in stale
    # A search that fits the map anew, as there is no current index, is told as well.
    assert "brings it up to date" in usable_index(collection(), own_projection(collection())[0])[1]
    after = told("--store", store)
    assert after["map"]["fingerprint"] == before["map"]["fingerprint"]
    assert after["map"]["fitted on"] == 40
    assert "fitted on 40 images; the collection has 50 now" in after["notes"][0]
    assert own_index(collection()) is not None

    remove(S, [3])
    W, index = own_index(collection()) or pytest.fail("a removal leaves it current")
    assert len(index) == 49
    assert 3 not in rows_and_vectors(index)

    refitted = told("--store", store, "--refit")
    assert refitted["map"]["fitted on"] == 49
    assert refitted["map"]["fingerprint"] != W.fingerprint
    assert kept(S) == [Path(refitted["folder"])], "one index of the collection's own"


def test_a_map_of_the_users_own(store: Path) -> None:
    told("--store", store)
    W, _ = own_index(collection()) or pytest.fail("it is current")
    W.truncated(16).with_score("bias").save("w.safetensors")
    made = told("--store", store, "--projection", "w.safetensors")
    assert made["width"] == 17, "the reference bias is one more column"
    assert len(kept(S)) == 2
    index, _ = usable_index(collection(), Projection.load("w.safetensors"))
    assert index is not None
    assert index.references.shape == (40, 17)
    own = own_index(collection()) or pytest.fail("the other one stays")
    assert own[0].fingerprint == W.fingerprint
    none, why = usable_index(collection(), W.truncated(8))
    assert (none, why) == (None, ""), "few images are projected in a moment"


def test_a_large_collection_is_told_what_an_index_would_spare(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, _, _ = own_projection(collection())
    monkeypatch.setattr("cli.indexing.WORTH", 40)
    assert WORTH > 40
    assert "all of its 40 images were projected" in usable_index(collection(), W)[1]


def test_check_finds_what_was_changed(store: Path) -> None:
    folder = Path(told("--store", store)["folder"])
    assert "whole" in said("--store", store, "--check")
    for name, text in (
        ("references.f32", "differ"),
        (MAP, "W.safetensors is missing"),
        ("index.json", "damaged"),
    ):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        out = said("--store", store, "--check", code=3)
        assert "DAMAGED" in out
        assert text in out
    made = told("--store", store, "--rebuild")
    assert made["added"] == 40
    assert "was damaged and was deleted" in made["notes"][0]
    assert "whole" in said("--store", store, "--check")


@pytest.mark.parametrize("given", [False, True])
def test_a_damaged_map_is_mended_as_advised(store: Path, given: bool) -> None:
    words: tuple[Any, ...] = ("--store", store)
    if given:
        own_projection(collection())[0].truncated(8).save("w.safetensors")
        words = (*words, "--projection", "w.safetensors")
    path = Path(told(*words)["folder"]) / MAP
    whole, made = path.read_bytes(), Projection.load(path)
    made.truncated(4).save("other.safetensors")
    for damaged in (b"", whole[:-5], Path("other.safetensors").read_bytes()):
        path.write_bytes(damaged)
        assert MAP in said("--store", store, "--check", code=3)
        said(*words, "--rebuild")
        assert "whole" in said("--store", store, "--check")
        assert Projection.load(path).fingerprint == made.fingerprint


def test_a_damaged_or_unfinished_index_is_not_used(store: Path) -> None:
    folder = Path(told("--store", store)["folder"])
    W = Projection.load(folder / MAP)
    body = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(body | {"data": ""}))
    assert own_index(collection()) is None
    assert "is not used" in usable_index(collection(), W)[1]
    assert usable_index(collection(), W)[0] is None


def test_an_index_elsewhere(store: Path) -> None:
    made = told("--store", store, "--out", "kept")
    assert made["folder"] == "kept"
    assert not kept(S)
    W = Projection.load(Path("kept") / MAP)
    assert usable_index(collection(), W, Path("kept"))[0] is not None
    assert "whole" in said("--store", store, "--check", "--out", "kept")
    (Path("other")).mkdir()
    W.truncated(4).save("w.safetensors")
    assert "of the map" in said("--store", store, "--out", "kept", "--projection", "w.safetensors", code=2)
    assert "whole" in said("--store", store, "--check", "--out", "kept"), "it has the map that it had"


@pytest.mark.skipif(not has_faiss(), reason="FAISS is not installed")
def test_an_approximate_part_is_measured_on_real_queries_or_simulated_ones(
    store: Path, tmp_path: Path
) -> None:
    text = said("--store", store, "--factory", "IVF2,Flat", "--parameters", "nprobe=2")
    assert "100.0 % of the first and 100.0 % of the first ten" in text
    assert "simulated translations" in text
    (tmp_path / "pairs").mkdir()
    pairs = pair_store(tmp_path / "pairs", 0.5)
    recall = told("--store", pairs, "--factory", "HNSW8")["approximate"]["recall"]
    assert recall["of"] == "translations of the test split"
    assert recall["n"] == 36
    assert 0.5 < recall["at_1"] <= 1


def test_mistakes_are_said(store: Path) -> None:
    for words, text in (
        (("--store", "nowhere"), "no store"),
        (("--store", S, "--projection", "nothing.safetensors"), "no projection"),
        (("--store", S, "--check"), "has no index to check"),
        (("--store", S, "--parameters", "nprobe=3"), "--factory"),
        (("--store", S, "--factory", "Nonsense"), "FAISS"),
    ):
        out = said(*words, code=2)
        assert text in out
        assert out.strip().splitlines()[-1].startswith("Error: ")
    assert not kept(S), "nothing was made before it failed"


def test_another_process_searches_what_was_kept(run: Run, run_apart: RunApart) -> None:
    run("latentstore", "encode", "--encoder=patch", "--image-size=64")
    out = run("latentstore", "index").stdout
    assert "60 images of 59 numbers" in out
    found = json.loads(
        run_apart("latentstore", "match", "images/photo 07.jpg", "--no-verdict", "--json").stdout
    )
    assert found["matches"][0]["candidates"][0]["path"] == "photo 07.jpg"
    assert not found["made"]
    assert "kept index" in found["searched"]


def test_indexing_and_searching_import_no_torch(store: Path) -> None:
    script = """
import sys
from pathlib import Path
import numpy as np
from cli.collection import Collection
from cli.indexing import IndexOptions, own_index, run_index
run_index(Path("s.zarr"), IndexOptions())
W, index = own_index(Collection.open(Path("s.zarr")))
index.search(np.asarray(index.references[:3]), 5, device="auto")
print(sorted({"torch", "faiss", "dask", "diffusers", "cupy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
