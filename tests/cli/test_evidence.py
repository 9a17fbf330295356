"""Figures that cannot lie: copies of a file, leaks between splits, shuffled pairs, sampled queries."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import picture

from cli import measure, solving
from cli.asked import encode_files
from cli.collection import Collection
from cli.workflows import run_encode, run_simulate
from latentstore.simulate import Diffusion
from solvers.errors import LeakError


def pairs_store(
    here: Path, name: str, folder: Path, manifest: Path | None = None, *, alpha_bar: float = 0.1
) -> Collection:
    run_encode(folder, here / f"{name}.zarr", manifest=manifest, encoder="patch", image_size=64)
    run_simulate(here / f"{name}.zarr", here / f"{name}-pairs.zarr", Diffusion(alpha_bar, 0.3), per_origin=3)
    return Collection.open(here / f"{name}-pairs.zarr")


def test_copies_of_a_file_count_as_one_origin(here: Path) -> None:
    """With a copy of every picture no origin can win strictly, unless copies count as one."""
    twice = here / "twice"
    shutil.copytree(here / "images", twice)
    lines = ["path,group"]
    for path in sorted(twice.iterdir()):
        shutil.copy(path, twice / f"copy of {path.name}")
        lines += [f"{path.name},{path.name}", f"copy of {path.name},{path.name}"]
    manifest = twice / "list.csv"
    manifest.write_text("\n".join(lines) + "\n")
    plain = pairs_store(here, "one", here / "images", alpha_bar=0.9)
    doubled = pairs_store(here, "two", twice, manifest, alpha_bar=0.9)
    for collection in (plain, doubled):
        control = {"raw": measure.fit_controls(collection, 32)["raw"]}
        evaluation = measure.evaluate(collection, collection.queries("test"), {}, control)
        (ranking,) = evaluation.rankings.values()
        assert ranking.acc > 0.9
        assert evaluation.n_copies == 0, "a photo and its copy share a group, and so a split"


def test_queries_whose_origin_has_a_copy_in_training_are_left_out(here: Path) -> None:
    twice = here / "twice"
    shutil.copytree(here / "images", twice)
    for path in sorted(twice.iterdir()):
        shutil.copy(path, twice / f"copy of {path.name}")  # its own identity, its own split
    collection = pairs_store(here, "two", twice)
    queries = collection.queries("test")
    evaluation = measure.evaluate(
        collection, queries, {}, {"raw": measure.fit_controls(collection, 8)["raw"]}
    )
    kept = sum(len(r.ap) for r in evaluation.rankings.values())
    assert evaluation.n_copies > 0
    assert evaluation.n_copies + kept == len(queries.rows)


def test_report_on_what_was_learned_is_refused(here: Path) -> None:
    collection = pairs_store(here, "p", here / "images")
    W, _, _ = solving.fit(collection, solving.SolveOptions("gnull", 16))
    for split in ("train", "validation"):
        with pytest.raises(LeakError):
            measure.evaluate(collection, collection.queries(split), {"gnull": W}, {})
    measure.evaluate(collection, collection.queries("test"), {"gnull": W}, {})


def test_a_tile_of_a_training_photo_under_another_name_is_refused(here: Path) -> None:
    manifest = here / "tiles.csv"
    lines = [f"photo {i:02d}.jpg,tile {i},photo {i // 6},origin" for i in range(60)]
    manifest.write_text("path,identity,group,role\n" + "\n".join(lines) + "\n")
    collection = pairs_store(here, "t", here / "images", manifest)
    if not len(collection.pairs("train")[1]):
        pytest.skip("no tile in the training split")
    W, _, _ = solving.fit(collection, solving.SolveOptions("gnull", 8, {"lam": 1.0}))
    rows = collection.pairs("train")[1][:1]
    other = Collection.open(here / "t-pairs.zarr")
    other.identity = np.array([f"alias of {i}" for i in other.identity], dtype=object)
    with pytest.raises(LeakError):
        measure.refuse_leak(W, measure.used_names(other, rows))


@pytest.mark.parametrize("method", ["svd", "gnull", "cosface"])
def test_shuffled_pairs_report_no_gain(here: Path, method: str) -> None:
    """A solver fed wrong pairs must not be said to beat the best control."""
    many = here / "many"
    many.mkdir()
    for i in range(240):
        picture(i, 64).save(many / f"{i:03d}.png")
    collection = pairs_store(here, "many", many)
    control_set = measure.fit_controls(collection, 24)
    reached = {}
    for shuffled in (False, True):
        fresh = Collection.open(here / "many-pairs.zarr")
        if shuffled:
            for split in ("train", "validation"):
                rows = fresh.translations[fresh.split[fresh.translations] == split]
                # Rolled by one identity: no pair is left right.
                fresh.identity[rows] = np.roll(fresh.identity[rows], 3)
        W, _, _ = solving.fit(fresh, solving.SolveOptions(method, 24, budget=5))
        done = measure.evaluate(collection, collection.queries("test"), {method: W}, control_set)
        (reached[shuffled],) = done.methods
    low = reached[True].gain_interval
    assert low is not None
    assert low[0] <= 0, reached[True].verdict
    assert " beat " not in reached[True].verdict
    assert not np.array_equal(reached[False].ranking.ap, reached[True].ranking.ap)


def test_a_sampled_query_does_not_find_the_row_in_its_place(here: Path) -> None:
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    from latentstore.encoders import load_encoder

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
    ).save_pretrained(here / "vae")  # fmt: skip
    encoder = load_encoder(str(here / "vae"), image_size=32, posterior="sample")
    images = sorted((here / "images").iterdir())
    _, gallery, _ = encode_files(images[:30], encoder)
    _, queries, _ = encode_files(images[30:36], encoder)
    scores = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    ).T
    own_place = scores[np.arange(6), np.arange(6)]
    # Independent noise of d numbers: cosines scatter around those of other places.
    assert np.abs(own_place - np.median(scores, axis=1)).max() < 6 / np.sqrt(gallery.shape[1]) + scores.std()
    assert own_place.max() < 0.9
