"""How the encoder computes: what is asked for reaches it, and a store goes on as it was begun."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_helpers import picture

from cli.workflows import run_encode, what_to_encode
from latentstore.errors import UsageError
from latentstore.store import open_store


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder of pictures and a small autoencoder."""
    import diffusers
    import torch

    root = tmp_path_factory.mktemp("options")
    (root / "images").mkdir()
    for i in range(5):
        picture(i).save(root / "images" / f"{i}.png")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        force_upcast=False,
    ).save_pretrained(root / "vae")
    return root


def made_with(store):
    facts = open_store(store).provenance["encoder"]
    return facts["dtype"], facts["batch"], facts["compiled"]


def test_a_store_goes_on_in_its_precision_and_batch(here, tmp_path):
    store = tmp_path / "s.zarr"
    options = {"encoder": str(here / "vae"), "image_size": 32, "device": "cpu"}
    run_encode(here / "images", store, **options, precision="bf16", batch=3)
    assert made_with(store) == ("bfloat16", 3, False)
    _, recipe = what_to_encode(here / "images", store, device="cpu")
    assert (recipe["precision"], recipe["batch"], recipe["compiled"]) == ("bf16", 3, False)
    # Workers get the arguments, and build the encoder themselves.
    assert all(isinstance(value, str | int | bool | None) for value in recipe.values())
    picture(9).save(here / "images" / "9.png")
    summary = run_encode(here / "images", store, device="cpu")
    assert (summary.appended, summary.warnings) == (1, [])
    picture(10).save(here / "images" / "99.png")
    summary = run_encode(here / "images", store, device="cpu", precision="fp32")
    assert summary.warnings == ["dtype was bfloat16, now float32"]


def test_defaults_are_float32_on_a_cpu(here, tmp_path):
    store = tmp_path / "s.zarr"
    run_encode(here / "images", store, encoder=str(here / "vae"), image_size=32, device="cpu")
    assert made_with(store) == ("float32", 1, False)


def test_the_patch_encoder_takes_no_precision(here, tmp_path):
    with pytest.raises(UsageError, match="no network"):
        run_encode(here / "images", tmp_path / "s.zarr", encoder="patch", image_size=32, precision="fp16")
    assert not (tmp_path / "s.zarr").exists()
    run_encode(here / "images", tmp_path / "s.zarr", encoder="patch", image_size=32, batch=2)


@pytest.mark.parametrize("words", [["--precision", "int8"], ["--batch", "0"]])
def test_wrong_options_are_usage(here, tmp_path, words):
    script = "import sys; sys.argv[0] = 'latentstore'; from cli.app import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", script, "encode", "images", "--store", str(tmp_path / "s.zarr"), *words],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert words[0] in run.stderr
