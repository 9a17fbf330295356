"""import: published latents go the whole way as encoded ones do; a published weight becomes a projection."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import Run, RunApart, pair_store, picture
from safetensors.torch import save_file
from typer.testing import CliRunner

from cli.app import app
from cli.importing import run_import_weight
from cli.matching import MatchOptions, run_match
from latentstore.encode import encode
from latentstore.encoders import PatchEncoder
from latentstore.errors import UsageError
from latentstore.images import load
from latentstore.sources import Source
from latentstore.store import open_store
from solvers.errors import ProjectionFormatError, SpaceError
from solvers.projection import Projection

DIM, RANK = 64, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of pictures encoded (``encoded.zarr``), and their latents as one .npy each with a manifest."""
    folder = tmp_path_factory.mktemp("world")
    store = pair_store(folder, 0.6, name="encoded.zarr")
    encoder, features = PatchEncoder(32), folder / "features"
    features.mkdir()
    for path in open_store(store).inputs()["path"].to_pylist():
        latent = encoder.encode(load(folder / path, 32).rgb[None], np.array([0]))
        np.save(features / f"{Path(path).stem}.npy", latent.reshape(4, 4, 4))
    listed = (folder / "encoded.zarr.csv").read_text().replace(".png,", ".npy,")
    (folder / "features.csv").write_text(listed)
    return folder


def command(*words: object, code: int = 0) -> Any:
    """Run a command in this process and return its JSON, or what it said."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.output, done.exception)
    return json.loads(done.stdout) if "--json" in words else done.output


@pytest.fixture(scope="module")
def published(world: Path) -> Path:
    store = world / "published.zarr"
    command(
        "import",
        world / "features",
        "--manifest",
        world / "features.csv",
        "--store",
        store,
        "--space-of",
        world / "encoded.zarr",
    )
    return store


@pytest.fixture(scope="module")
def named(world: Path) -> Path:
    store, listed = world / "named.zarr", world / "features.csv"
    words = ("--encoder-name", "OWNER/VAE", "--latent-shape", "4,4,4", "--store", store)
    command("import", world / "features", "--manifest", listed, *words)
    return store


def without(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of a report, without what names its own file."""
    return [f for f in report["figures"] if f["name"] in ("mAP", "Acc")]


def test_the_way_of_published_latents_is_that_of_encoded_ones(world: Path, published: Path) -> None:
    """Latents, W, evaluation and matches are equal: not nearly, but the same numbers."""
    encoded = world / "encoded.zarr"
    a, b = open_store(encoded), open_store(published)
    assert np.array_equal(a.reader.read(0, len(a)), b.reader.read(0, len(b)))
    assert a.data_hash() == b.data_hash()
    reports, maps = [], []
    for store in (encoded, published):
        out = world / f"W-{store.stem}.safetensors"
        solved = command("solve", "--method", "svd", "--rank", 16, "--store", store, "--out", out, "--json")
        evaluated = command("evaluate", "--projection", out, "--store", store, "--json")
        assert without(solved)
        reports.append((without(solved), without(evaluated)))
        maps.append(Projection.load(out))
    assert np.array_equal(maps[0].query_map, maps[1].query_map)
    assert reports[0] == reports[1]
    # A map of the one finds in the other, as they are of one space.
    found = [
        run_match([world / "80.png"], store, MatchOptions(world / "W-encoded.safetensors")).matches[0]
        for store in (encoded, published)
    ]
    ours, theirs = ([(Path(c.path).stem, c.score) for c in match.candidates] for match in found)
    assert ours == theirs
    assert found[1].candidates[0].identity == "80"


def test_a_named_space_meets_no_other(world: Path, published: Path, named: Path) -> None:
    """The opposite: the very same numbers under a name are solved and evaluated among themselves alone."""
    ours, W = world / "W-ours.safetensors", world / "W-named.safetensors"
    command("solve", "--method", "analytic", "--rank", 16, "--store", published, "--out", ours)
    command("solve", "--method", "analytic", "--rank", 16, "--store", named, "--out", W)
    command("evaluate", "--projection", W, "--store", named)
    assert "space" in command("evaluate", "--projection", ours, "--store", named, code=1)
    assert "space" in command("evaluate", "--projection", W, "--store", published, code=1)
    assert "space" in command("evaluate", "--projection", W, "--store", named, "--queries", published, code=1)
    # No picture can be encoded for it.
    assert "imported" in command("match", world / "80b.png", "--store", named, code=2)


def test_a_folder_of_queries_is_one_of_latents_where_the_store_is(
    world: Path, published: Path, named: Path, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    (asked / "more").mkdir(parents=True)
    shutil.copy(world / "features" / "80b.npy", asked)
    shutil.copy(world / "features" / "81.npy", asked / "more")
    W = world / "W-folder.safetensors"
    command("solve", "--method", "svd", "--rank", 16, "--store", named, "--out", W)
    found = run_match([asked], named, MatchOptions(W))
    assert [Path(m.query).name for m in found.matches] == ["80b.npy", "81.npy"]
    # Pictures of a space that can be encoded are queries still.
    (tmp_path / "pictures").mkdir()
    shutil.copy(world / "80.png", tmp_path / "pictures")
    assert len(run_match([tmp_path / "pictures"], published).matches) == 1
    # A folder of latents alone asks an encoded store, too.
    (tmp_path / "nothing").mkdir()
    assert len(run_match([asked], world / "encoded.zarr").matches) == 2
    with pytest.raises(UsageError, match="no image files"):
        run_match([tmp_path / "nothing"], world / "encoded.zarr")


def test_said_once_it_is_known(world: Path, named: Path) -> None:
    words = ("import", world / "features", "--manifest", world / "features.csv", "--store", named)
    assert "were there already" in command(*words)
    again = command(*words, "--encoder-name", "OWNER/VAE", "--latent-shape", "4,4,4", "--json")
    assert (again["rows"], again["encoded"], again["counts"]) == (216, 0, {"ok": 216})
    assert "space" in command(*words, "--encoder-name", "OWNER/OTHER", "--latent-shape", "4,4,4", code=1)
    for more in (("--posterior", "mean"), ("--dtype", "float32"), ("--shard-rows", 168)):
        assert more[0] in command(*words, *more, code=2)


def test_wrong_words_are_told_before_anything_is_made(world: Path, tmp_path: Path) -> None:
    features, store = world / "features", tmp_path / "s.zarr"
    to = ("--store", store)
    assert "--encoder-name" in command("import", features, *to, code=2)
    assert "no folder" in command("import", tmp_path / "none", *to, "--encoder-name", "x", code=2)
    both = ("--encoder-name", "x", "--space-of", world / "encoded.zarr")
    assert "leave --encoder-name out" in command("import", features, *to, *both, code=2)
    assert "no store" in command("import", features, *to, "--space-of", tmp_path / "none.zarr", code=2)
    for shape in ("4,4", "4,4,x", "4,0,4"):
        assert "4,32,32" in command(
            "import", features, *to, "--encoder-name", "x", "--latent-shape", shape, code=2
        )
    assert "(4, 32, 32)" in command("import", features, *to, "--encoder-name", "x", code=2)
    assert "--key" in command("import", features, *to, "--encoder-name", "x", "--key", "w", code=2)
    assert not store.exists()


def test_bad_rows_are_findings_where_strict_and_a_failure_where_all_are(world: Path, tmp_path: Path) -> None:
    folder, store = tmp_path / "features", tmp_path / "s.zarr"
    shutil.copytree(world / "features", folder)
    (folder / "3.npy").write_bytes(b"\x93NUMPY, or so it says")
    words = ("import", folder, "--store", store, "--encoder-name", "x", "--latent-shape", "4,4,4")
    assert "3.npy: unreadable: not a .npy file" in command(*words)
    assert "1 unreadable" in command(*words, "--strict", code=3)
    for path in folder.iterdir():
        np.save(path, np.full(DIM, 1e6))  # each is a latent, and none fits float16
    words = ("import", folder, "--store", tmp_path / "none.zarr", "--encoder-name", "x")
    assert "216 not_finite" in command(*words, "--latent-shape", "4,4,4", code=1)


def test_the_whole_from_a_shell(run_apart: RunApart, run: Run, here: Path, world: Path) -> None:
    """As a user runs it, with OriPID's names and nothing else; output that is piped holds JSON alone."""
    (here / "published").mkdir()
    encoder = PatchEncoder(64)
    for i in range(60):
        for k in range(2):
            pixels = np.asarray(picture(i, 64))[None]
            latent = encoder.encode(pixels, np.array([0])) + np.float32(0.01 * k)
            np.save(here / "published" / f"T{i:06d}_{k}.npy", latent)
    words = ["latentstore", "import", "published", "--latent-shape", "4,8,8", "--encoder-name", "some VAE"]
    made = json.loads(run_apart(*words, "--json").stdout)
    assert made["counts"] == {"ok": 120}
    facts = command("info", "--json")
    assert facts["kind"] == "imported"
    assert facts["roles"] == {"origin": 60, "translation": 60}
    assert facts["space"]["posterior"] == "sample"
    torch.save(torch.eye(256)[:32], here / "weight.pth")
    said = command("import", "weight.pth", "--space-of", "latents.zarr")
    assert "W-imported.safetensors: 32 x 256 of weight.pth, for latents of 256 numbers to 32" in said
    command("evaluate", "--projection", "W-imported.safetensors")
    refused = run("latentstore", "import", "no.pth", code=2)
    assert refused.stderr.startswith("Error: There is no weight no.pth")


# --- weights -------------------------------------------------------------------------------------------

WEIGHT = torch.randn(RANK, DIM, generator=torch.Generator().manual_seed(0))
HEAD = torch.ones(100, RANK)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (WEIGHT, ""),
        (WEIGHT.T.contiguous(), ""),
        (WEIGHT.T, ""),
        (torch.nn.Parameter(WEIGHT), ""),
        (OrderedDict({"module.weight": WEIGHT}), "module.weight"),
        ({"weight": WEIGHT, "bias": torch.zeros(RANK)}, "weight"),
        (
            {"epoch": 25, "state_dict": {"module": {"weight": WEIGHT}, "head": HEAD}},
            "state_dict.module.weight",
        ),
        (torch.nn.Linear(DIM, RANK, bias=False).state_dict() | {"weight": WEIGHT}, "weight"),
    ],
)
def test_a_weight_is_found_and_turned_by_the_latents_length(tmp_path: Path, content: Any, key: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    W = run_import_weight(tmp_path / "w.pth", tmp_path / "W.safetensors", latent_shape=(4, 4, 4))
    back = Projection.load(tmp_path / "W.safetensors")
    for p in (W, back):
        assert np.array_equal(p.query_map, WEIGHT.numpy().T)
        assert (p.symmetric, p.score, p.space_id, p.provenance["key"]) == (True, "cosine", "", key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_and_other_precisions(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"layer.weight": WEIGHT.to(dtype)}, tmp_path / "w.safetensors")
    W = run_import_weight(tmp_path / "w.safetensors", tmp_path / "W.safetensors", latent_shape=(4, 4, 4))
    assert np.array_equal(W.query_map, WEIGHT.to(dtype).float().numpy().T)


def test_the_published_size_needs_no_words(tmp_path: Path) -> None:
    """512 x 4,096, in both orientations; a square weight is taken as torch keeps it."""
    weight = torch.randn(512, 4096, generator=torch.Generator().manual_seed(1))
    for content in (weight, weight.T.contiguous()):
        torch.save(content, tmp_path / "w.pth")
        W = run_import_weight(tmp_path / "w.pth", tmp_path / "W.safetensors")
        assert np.array_equal(W.query_map, weight.numpy().T)
    square = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2))
    torch.save(square, tmp_path / "w.pth")
    W = run_import_weight(tmp_path / "w.pth", tmp_path / "W.safetensors", latent_shape=(4, 4, 4))
    assert np.array_equal(W.query_map, square.numpy().T)


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_weight_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    mark, path = tmp_path / "executed", tmp_path / "w.pth"
    contents = (Evil(mark), {"weight": WEIGHT, "extra": Evil(mark)})
    for content in contents:
        torch.save(content, path, pickle_protocol=protocol)
        assert "never pickled objects" in command("import", path, code=1)
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert "never pickled objects" in command("import", path, code=1)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # noqa: S301 (the opposite: the pickle does what it says)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": WEIGHT, "b": WEIGHT}, "by its key"),
        ({"weight": WEIGHT, "bias": torch.ones(RANK)}, "bias"),
        ({"module.weight": WEIGHT, "module.bias": torch.ones(RANK)}, "bias"),
        ({"head": HEAD}, "a side of 64"),
        (WEIGHT[:, :63], "a side of 64"),
        (WEIGHT[None], "two-dimensional"),
        ({}, "no tensors"),
        (3, "no tensors"),
        (torch.ones(RANK, DIM, dtype=torch.int64), "int64"),
        (torch.full((RANK, DIM), torch.nan), "not finite"),
        (torch.zeros(RANK, DIM), "nothing but zeros"),
        (torch.ones(2 * DIM, DIM), "none larger"),
        (torch.ones(1).expand(RANK, DIM), "its numbers are repeated"),
        ({"weight": WEIGHT, "bias": torch.ones(1).expand(1 << 40)}, "its numbers are repeated"),
        (torch.eye(DIM).to_sparse(), "sparse_coo"),
        (torch.empty(RANK, DIM, device="meta"), "on the device meta"),
    ],
)
def test_what_is_no_such_weight_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ProjectionFormatError, match=says):
        run_import_weight(tmp_path / "w.pth", tmp_path / "W.safetensors", latent_shape=(4, 4, 4))
    assert not (tmp_path / "W.safetensors").exists()


def test_a_mapping_that_holds_itself_is_read_once(tmp_path: Path) -> None:
    """Sixteen ways back at each of the depths would be billions of tensors."""
    content: dict[str, Any] = {"weight": WEIGHT}
    content |= {f"m{i}": content for i in range(16)}
    torch.save(content, tmp_path / "w.pth")
    W = run_import_weight(tmp_path / "w.pth", tmp_path / "W.safetensors", latent_shape=(4, 4, 4))
    assert W.provenance["key"] == "weight"


def test_a_negated_view_is_its_numbers(tmp_path: Path) -> None:
    torch.save(torch._neg_view(WEIGHT), tmp_path / "w.pth")
    W = run_import_weight(tmp_path / "w.pth", tmp_path / "W.safetensors", latent_shape=(4, 4, 4))
    assert np.array_equal(W.query_map, -WEIGHT.numpy().T)


def test_an_archive_that_would_grow_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, path = tmp_path / "plain.pth", tmp_path / "w.pth"
    torch.save(WEIGHT, plain)
    with zipfile.ZipFile(plain) as read, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in read.namelist():
            packed.writestr(name, read.read(name))
    assert torch.equal(torch.load(path, weights_only=True), WEIGHT)  # torch itself takes it
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpacked"))
    assert "a compressed archive" in command("import", path, "--latent-shape", "4,4,4", code=1)
    path.write_bytes(plain.read_bytes()[:-8])
    assert "cannot be read as plain torch weights" in command("import", path, code=1)


def test_what_cannot_be_written_is_refused_and_what_is_replaced_is_told(tmp_path: Path) -> None:
    weight, out = tmp_path / "w.pth", tmp_path / "W.safetensors"
    torch.save(WEIGHT, weight)
    words = ("import", weight, "--latent-shape", "4,4,4", "--out")
    weight.with_name("broken.pth").write_bytes(b"nothing")
    assert "no folder" in command(
        "import", tmp_path / "broken.pth", "--out", tmp_path / "no" / out.name, code=2
    )
    for _ in range(2):
        assert "replaced" not in command(*words, out)  # new; and then the same once more
    torch.save(2 * WEIGHT, weight)
    assert f"{out} was replaced: it held another W (torch weight, 64 x 8)." in command(*words, out)
    torch.save(WEIGHT, weight)
    assert "was replaced" in command(*words, out, "--json")["notes"][0]
    out.write_bytes(b"something else")
    assert "it held something else than a projection" in command(*words, out)


def test_of_several_tensors_the_named_one_is_taken(tmp_path: Path) -> None:
    torch.save({"model": {"weight": WEIGHT}, "ema": {"weight": 2 * WEIGHT}}, tmp_path / "w.pth")
    words = ("import", tmp_path / "w.pth", "--out", tmp_path / "W.safetensors", "--latent-shape", "4,4,4")
    assert "model.weight (8, 64), ema.weight (8, 64)" in command(*words, code=1)
    made = command(*words, "--key", "ema.weight", "--json")
    assert (made["key"], made["left_out"]) == ("ema.weight", ["model.weight"])
    assert np.array_equal(Projection.load(tmp_path / "W.safetensors").query_map, 2 * WEIGHT.numpy().T)


def test_a_weight_of_a_space_is_refused_for_others(world: Path, tmp_path: Path) -> None:
    torch.save(WEIGHT, tmp_path / "w.pth")
    W = tmp_path / "W.safetensors"
    said = command("import", tmp_path / "w.pth", "--space-of", world / "encoded.zarr", "--out", W)
    assert open_store(world / "encoded.zarr").space.id in said
    assert "trained on is not known" in said
    command("evaluate", "--projection", W, "--store", world / "encoded.zarr")
    picture(0, 64).save(tmp_path / "a.png")
    encode(Source(tmp_path), tmp_path / "larger.zarr", PatchEncoder(64))
    with pytest.raises(SpaceError):
        Projection.load(W).check_space(open_store(tmp_path / "larger.zarr").space.id)
    with pytest.raises(ProjectionFormatError, match="a side of 256"):
        run_import_weight(tmp_path / "w.pth", W, space_of=tmp_path / "larger.zarr")
    with pytest.raises(ProjectionFormatError, match="a projection already"):
        run_import_weight(W, tmp_path / "again.safetensors", latent_shape=(4, 4, 4))
    with pytest.raises(UsageError, match="the weight itself"):
        run_import_weight(W, W)
    assert "--encoder-name" in command("import", tmp_path / "w.pth", "--encoder-name", "x", code=2)
