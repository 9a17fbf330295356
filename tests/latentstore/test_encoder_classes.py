"""Every class of autoencoder gives the numbers of the model itself, and only its encoder's half is kept."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from store_worlds import SIZE
from vae_worlds import SETTINGS, build, load, pictures, reload, save, unit

from latentstore.encoders.checkpoints import CLASSES
from latentstore.errors import EncoderError

SD3 = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609}
# class, options, how to read the model's output, posterior, shape at 64 pixels
MODELS = {
    "sd2": ("AutoencoderKL", {}, lambda out: out.latent_dist.mean, "mean", (4, 8, 8)),
    "sd3": ("AutoencoderKL", SD3, lambda out: out.latent_dist.mean, "mean", (16, 8, 8)),
    "asymmetric": ("AsymmetricAutoencoderKL", {}, lambda out: out.latent_dist.mean, "mean", (4, 8, 8)),
    "consistency": ("ConsistencyDecoderVAE", {}, lambda out: out.latent_dist.mean, "mean", (4, 8, 8)),
    "taesd": ("AutoencoderTiny", {}, lambda out: out.latents, "deterministic", (4, 8, 8)),
    "movq": ("VQModel", {}, lambda out: out.latents, "deterministic", (4, 8, 8)),
    "dc": ("AutoencoderDC", {}, lambda out: out.latent, "deterministic", (8, 16, 16)),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, (kind, options, *_) in MODELS.items():
        save(folder / name, kind, **options)
    return folder


def test_every_class_is_tried():
    assert {kind for kind, *_ in MODELS.values()} == set(CLASSES) == set(SETTINGS)


@pytest.mark.parametrize("name", MODELS)
def test_the_latents_are_the_models(checkpoints, name):
    import torch

    kind, _, read, posterior, shape = MODELS[name]
    encoder, model, x = load(checkpoints / name, batch=3), reload(checkpoints / name, kind), pictures(3)
    assert (encoder.space.encoder, encoder.space.posterior) == (kind, posterior)
    assert encoder.space.latent_shape == shape
    with torch.inference_mode():
        expected = read(model.encode(unit(x))).flatten(1).numpy()
    latents = encoder.encode(x, np.arange(3))
    assert latents.dtype == np.float32
    # The same sums in another memory order: float32, some dozen layers.
    np.testing.assert_allclose(latents, expected, rtol=1e-4, atol=1e-5)
    for row in range(3):  # and they are those of these pictures
        others = np.delete(expected, row, 0)
        assert np.abs(latents[row] - others).max(1).min() > 100 * np.abs(latents[row] - expected[row]).max()


@pytest.mark.parametrize("name", MODELS)
def test_only_the_encoder_is_kept(checkpoints, name):
    model = reload(checkpoints / name, MODELS[name][0])
    encoders = ("encoder.", "quant_conv.")
    needed = {k: v.numel() for k, v in model.state_dict().items() if k.startswith(encoders)}
    kept = load(checkpoints / name).model
    assert {k: v.numel() for k, v in kept.state_dict().items()} == needed
    assert sum(needed.values()) < 0.8 * sum(p.numel() for p in model.parameters())


def test_sd3_has_16384_numbers(checkpoints):
    encoder = load(checkpoints / "sd3", image_size=256)
    assert encoder.space.dim == 16_384
    assert encoder.encode(pictures(1, 256), np.arange(1)).shape == (1, 16_384)
    assert encoder.facts["shift_factor"] == 0.0609


def test_movq_is_taken_before_its_codebook(checkpoints, tmp_path):
    import torch

    model, x = reload(checkpoints / "movq", "VQModel"), pictures(2)
    with torch.inference_mode():
        quantised = model.quantize(model.encode(unit(x)).latents)[0].flatten(1).numpy()
    assert np.abs(load(checkpoints / "movq").encode(x, np.arange(2)) - quantised).max() > 1e-3
    for key, changes in {"quantize.embedding.weight": False, "quant_conv.weight": True}.items():
        model = build("VQModel")
        with torch.no_grad():
            model.state_dict()[key].flatten()[0] += 1e-3
        model.save_pretrained(tmp_path / key)
        assert (load(tmp_path / key).space.id != load(checkpoints / "movq").space.id) is changes


def test_the_unet_of_a_consistency_decoder_changes_no_space(checkpoints, tmp_path):
    import torch

    model = build("ConsistencyDecoderVAE")
    with torch.no_grad():
        model.decoder_unet.conv_in.weight += 1
    model.save_pretrained(tmp_path)
    assert load(tmp_path).space == load(checkpoints / "consistency").space


@pytest.mark.parametrize(("name", "subfolder"), [("sd2", "vae"), ("movq", "movq"), ("dc", "vae")])
def test_pipelines_keep_it_in_a_subfolder(checkpoints, tmp_path, name, subfolder):
    shutil.copytree(checkpoints / name, tmp_path / subfolder)
    (tmp_path / "model_index.json").write_text('{"_class_name": "AnyPipeline"}')
    assert load(tmp_path).space == load(checkpoints / name).space


def test_the_classes_are_named_to_who_brings_another(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(EncoderError, match="AutoencoderKLWan") as caught:
        load(tmp_path)
    assert all(kind in str(caught.value) for kind in CLASSES)


@pytest.mark.parametrize(("name", "size"), [("dc", 62), ("sd2", 4)])
def test_a_size_that_does_not_fit_is_one_paragraph(checkpoints, name, size):
    with pytest.raises(EncoderError, match=f"{size} x {size}") as caught:
        load(checkpoints / name, image_size=size)
    assert "\n" not in str(caught.value)
    assert load(checkpoints / name, image_size=SIZE).space.image_size == SIZE


def test_a_model_of_grey_pictures_is_one_paragraph(tmp_path):
    save(tmp_path, "AutoencoderKL", in_channels=1)
    with pytest.raises(EncoderError, match="cannot encode RGB"):
        load(tmp_path)
