"""Encoders: the right numbers, the same in any batch, and a space id that follows what decides them."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from store_worlds import SIZE, encode_patch, picture
from vae_worlds import SETTINGS, build, load, pictures, save

import latentstore
from latentstore.encode import Source, encode
from latentstore.encoders import PatchEncoder, load_encoder, load_for, patches, row_noise
from latentstore.encoders.checkpoints import hash_model
from latentstore.errors import EncoderError, SpaceMismatchError, UsageError
from latentstore.store import open_store

# --- patch -------------------------------------------------------------------------------------------


def test_patch_is_an_orthogonal_projection():
    encoder = PatchEncoder(SIZE)
    x = patches(pictures(8)).astype(np.float64)
    rows = np.arange(8)
    latents = encoder.encode(pictures(8), rows)
    flat = encoder.decode(latents).reshape(8, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 64, 192)
    W, mean = encoder._components.astype(np.float64), encoder._mean
    # Float32 with sums of 192 products of numbers up to 2.
    np.testing.assert_allclose(W @ W.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose((flat - mean) @ W.T, (x - mean) @ W.T, atol=1e-4)  # idempotent
    error = x - flat
    np.testing.assert_allclose(error @ W.T, 0, atol=1e-4)  # orthogonal
    assert np.linalg.norm(error) > 0.01 * np.linalg.norm(x)  # and it does lose something
    # Pythagoras, so no other code on these directions comes nearer.
    np.testing.assert_allclose(
        np.sum((x - mean) ** 2), np.sum(error**2) + np.sum((flat - mean) ** 2), rtol=1e-5
    )


def test_patch_decodes_to_the_picture_it_saw():
    # A picture of one grey a patch is near the code's span: the first number is brightness.
    encoder = PatchEncoder(SIZE)
    grey = picture(1, 8, 8).convert("L").convert("RGB")
    image = np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.NEAREST))[None]
    back = encoder.decode(encoder.encode(image, np.arange(1)))[0]
    wrong = np.abs(back - (image[0] / 127.5 - 1)).mean()
    assert wrong < 0.05
    assert np.abs(back.transpose(1, 0, 2) - (image[0] / 127.5 - 1)).mean() > 3 * wrong  # rows are rows


def test_patch_order_is_channels_rows_columns():
    encoder = PatchEncoder(SIZE)
    base = np.full((1, SIZE, SIZE, 3), 128, np.uint8)
    touched = base.copy()
    touched[0, 8 * 2 : 8 * 3, 8 * 5 : 8 * 6] = (255, 0, 60)
    moved = np.flatnonzero(encoder.encode(touched, [0]) != encoder.encode(base, [0]))
    assert set(moved % 64) == {2 * 8 + 5}
    assert encoder.space.latent_shape == (4, 8, 8)


def test_patch_rows_do_not_depend_on_the_batch():
    encoder = PatchEncoder(SIZE)
    x = pictures(64)
    whole = encoder.encode(x, np.arange(64))
    order = np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(encoder.encode(x[order], order), whole[order])


@pytest.mark.parametrize("size", [0, 7, 12, -8, 250])
def test_patch_sizes(size):
    with pytest.raises(UsageError, match="multiple of 8"):
        PatchEncoder(size)


def test_the_patch_card():
    import hashlib

    folder = Path(latentstore.__file__).parent / "data"
    card = json.loads((folder / "patch.json").read_text())
    assert 15 < card["psnr_held_out_db"] < 40
    assert hashlib.sha256((folder / "patch.safetensors").read_bytes()).hexdigest() == card[
        "weights_sha256"
    ] or (PatchEncoder().space.weights == card["weights_sha256"])
    assert card["data"]
    assert "photos_held_out" in card


def test_patch_needs_no_torch():
    code = (
        "import sys; from latentstore.encode import encode; from latentstore.encoders import load_encoder; "
        "load_encoder('patch', image_size=64); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'faiss')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr


def test_the_image_size_is_part_of_the_space(photos, undisturbed):
    assert PatchEncoder(64).space.id != PatchEncoder(128).space.id
    assert PatchEncoder(64).space.id == PatchEncoder(64).space.id == open_store(undisturbed).space.id
    with pytest.raises(SpaceMismatchError):
        encode_patch(photos, undisturbed, encoder=PatchEncoder(72))


def test_row_noise():
    a = row_noise(1, 2, 5000)
    np.testing.assert_array_equal(a, row_noise(1, 2, 5000))
    keys = [(2, 1, 0), (1, 3, 0), (1, 2, 1), (2, 2, 0), *((1, 2 + 2**k, 0) for k in range(1, 33))]
    others = [row_noise(seed, row, 5000, stream=stream) for seed, row, stream in keys]
    for other in others:
        # Independent normals: 5 standard deviations of a correlation.
        assert abs(np.corrcoef(a, other)[0, 1]) < 5 / np.sqrt(5000)
    assert abs(a.mean()) < 5 / np.sqrt(5000)
    assert abs(a.var() - 1) < 5 * np.sqrt(2 / 5000)


# --- tiny, the default ---------------------------------------------------------------------------------


def test_the_default_is_tiny_and_of_patchs_shape():
    encoder = load_encoder(image_size=SIZE, device="cpu")
    assert encoder.facts["name"] == "tiny"
    assert encoder.space == load_encoder("tiny", image_size=SIZE, device="cpu").space
    assert encoder.space.latent_shape == PatchEncoder(SIZE).space.latent_shape
    assert encoder.space.id != PatchEncoder(SIZE).space.id


@pytest.mark.parametrize("size", [8, 72])
def test_tiny_takes_the_sizes_that_patch_takes(size):
    encoder = load_encoder(image_size=size, device="cpu")
    assert encoder.encode(pictures(1, size), np.arange(1)).shape == (1, PatchEncoder(size).space.dim)


@pytest.mark.parametrize("size", [0, 7, 65, 250, -8])
def test_tiny_refuses_the_sizes_that_patch_refuses(size):
    with pytest.raises(UsageError, match="multiple of 8"):
        load_encoder(image_size=size, device="cpu")


# --- diffusers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl") / "vae"
    build("AutoencoderKL").save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "taesd"
    build("AutoencoderTiny").save_pretrained(folder, safe_serialization=True)
    return folder


def test_kl_latents_are_the_raw_posterior_mean(kl, photos, tmp_path):
    import diffusers
    import torch

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        picture(i, 90, 70).save(folder / f"{i:02d}.png")
    encode(Source(folder), tmp_path / "s.zarr", load(kl), dtype="float32", threads=2)
    store = open_store(tmp_path / "s.zarr")
    assert store.space.posterior == "mean"
    assert store.space.latent_shape == (4, 8, 8)
    assert store.provenance["encoder"]["scaling_factor"] == 0.18215
    model = diffusers.AutoencoderKL.from_pretrained(kl, use_safetensors=True).eval()
    for row in (0, 15, 16, 19):
        with Image.open(folder / f"{row:02d}.png") as image:
            x = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32) / 255
        x = torch.from_numpy((x - 0.5) / 0.5).permute(2, 0, 1)[None]
        with torch.inference_mode():
            expected = model.encode(x).latent_dist.mean.flatten().numpy()
        # A batch of 16 and one of 1 sum their convolutions in other orders: float32, some dozen layers.
        np.testing.assert_allclose(store.reader.gather([row])[0], expected, rtol=1e-4, atol=1e-5)
        assert np.abs(store.reader.gather([row])[0] * 0.18215 - expected).max() > 1e-2


def test_a_pipeline_folder_holds_its_vae(kl, tmp_path):
    shutil.copytree(kl, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    encoder = load(tmp_path / "pipeline")
    assert encoder.space == load(kl).space
    assert encoder.facts["name"] == str(tmp_path / "pipeline")


def test_a_store_finds_its_encoder_again(kl, tmp_path):
    encoder = load(kl, posterior="sample", seed=3)
    again = load_for(encoder.space, encoder.facts, device="cpu")
    assert again.space == encoder.space
    moved = tmp_path / "vae"
    build("AutoencoderKL", seed=1).save_pretrained(moved, safe_serialization=True)
    with pytest.raises(EncoderError, match="have changed") as caught:
        load_for(encoder.space, encoder.facts | {"name": str(moved)}, device="cpu")
    assert encoder.space.id in str(caught.value)


def test_samples_are_seeded_by_picture(kl):
    x, rows = pictures(6), np.array([0, 1, 2, 3, 77, 10**12])
    sample, mean = load(kl, posterior="sample", seed=5), load(kl).encode(x, rows)
    a = sample.encode(x, rows)
    order = np.random.default_rng(0).permutation(6)
    # The same pictures, in another order, other company, other rows: equal but for the last bits of the mean.
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(sample.encode(x[order], rows), a[order], **close)
    np.testing.assert_allclose(sample.encode(x[4:5], rows[:1]), a[4:5], **close)
    np.testing.assert_array_equal(sample.encode(x, rows), a)
    np.testing.assert_allclose(load(kl, posterior="sample", seed=5).encode(x, rows), a, **close)
    # Another picture, or another seed, is another draw. Were noise seeded by place, every query of a search
    # would carry the noise of the row in its place, and find it.
    other = sample.encode(pictures(12)[6:], rows) - load(kl).encode(pictures(12)[6:], rows)
    for draws in (a[1:] - mean[1:], other, load(kl, posterior="sample", seed=6).encode(x, rows) - mean):
        here = (a - mean)[: len(draws)]
        correlation = [np.corrcoef(p, q)[0, 1] for p, q in zip(here, draws, strict=True)]
        assert np.abs(correlation).max() < 5 / np.sqrt(here.shape[1])  # independent: within 5 standard errors
    ids = [
        load(kl, **o).space.id
        for o in ({}, {"seed": 9}, {"posterior": "sample"}, {"posterior": "sample", "seed": 9})
    ]
    assert ids[0] == ids[1]  # the mean needs no seed
    assert len(set(ids)) == 3


def test_samples_have_the_posteriors_spread(kl):
    import torch

    sample, mean = load(kl, posterior="sample", seed=5), load(kl)
    x, rows = pictures(16), np.arange(16)
    with torch.inference_mode():
        unit = torch.from_numpy(x).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
        std = mean.model.encode(unit).latent_dist.std.flatten(1).numpy()
    z = (sample.encode(x, rows) - mean.encode(x, rows)) / std
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / z.size)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("encoder.conv_in.weight", True),
        ("encoder.conv_norm_out.bias", True),
        ("quant_conv.weight", True),
        ("decoder.conv_in.weight", False),
        ("post_quant_conv.bias", False),
    ],
)
def test_the_space_follows_the_encoders_weights(kl, tmp_path, key, changes):
    import torch

    model = build("AutoencoderKL")
    with torch.no_grad():
        model.state_dict()[key].flatten()[0] += 1e-3
    model.save_pretrained(tmp_path / "vae", safe_serialization=True)
    assert (load(tmp_path / "vae").space.id != load(kl).space.id) is changes


@pytest.mark.parametrize(
    ("options", "changes"),
    [({"scaling_factor": 0.5}, False), ({"shift_factor": 0.1}, False), ({"act_fn": "relu"}, True)],
)
def test_the_space_follows_the_encoders_configuration(kl, tmp_path, options, changes):
    build("AutoencoderKL", **options).save_pretrained(tmp_path / "vae", safe_serialization=True)
    assert (load(tmp_path / "vae").space.id != load(kl).space.id) is changes


def written_anew(folder, to, changed):
    """Copy a model folder, its config.json changed by a function."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(changed(config)))
    return to


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_default_that_is_stated_or_left_out_is_the_same_space(kind, tmp_path):
    """Which settings a config.json spells out depends on the diffusers that wrote it."""
    import diffusers

    defaults = inspect.signature(getattr(diffusers, kind).__init__).parameters

    def terse(config):
        stated = {k: v for k, v in config.items() if k not in defaults or v != listed(defaults[k].default)}
        assert len(stated) < len(config) - 3
        return stated

    def listed(value):
        return list(value) if isinstance(value, tuple) else value

    whole = save(tmp_path / "whole", kind)
    short = written_anew(whole, tmp_path / "short", terse)
    assert load(short).space == load(whole).space


@pytest.mark.parametrize(("value", "same"), [([8, 8], True), ([8, 16], False)])
def test_a_setting_that_a_newer_diffusers_adds(kl, monkeypatch, value, same):
    """At its default it says nothing: stores must not be left behind by an update."""
    import diffusers

    model = diffusers.AutoencoderKL.from_pretrained(kl, use_safetensors=True)
    before = hash_model(model)
    known = inspect.signature(diffusers.AutoencoderKL.__init__)
    window = inspect.Parameter("window", inspect.Parameter.KEYWORD_ONLY, default=(8, 8))
    newer = known.replace(parameters=[*known.parameters.values(), window])
    monkeypatch.setattr(diffusers.AutoencoderKL.__init__, "__signature__", newer, raising=False)
    model.register_to_config(window=value, _diffusers_version="9.9", _name_or_path="elsewhere")
    assert (hash_model(model) == before) is same


KL_UP = {"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D") * 2, "use_post_quant_conv": False}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AutoencoderKL", KL_UP),
        ("AutoencoderKL", {"force_upcast": False, "sample_size": 512, "latents_mean": [0.5] * 4}),
        ("AutoencoderTiny", {"decoder_block_out_channels": (16,) * 4, "num_decoder_blocks": (2,) * 4}),
        ("AutoencoderTiny", {"latent_magnitude": 5, "latent_shift": 0.1, "upsample_fn": "bilinear"}),
        ("VQModel", {"num_vq_embeddings": 32, "lookup_from_codebook": True}),
        ("AsymmetricAutoencoderKL", {"up_block_out_channels": (64,) * 4, "layers_per_up_block": 2}),
        ("AutoencoderDC", {"upsample_block_type": "interpolate", "decoder_layers_per_block": (2, 1, 1)}),
        ("ConsistencyDecoderVAE", {"decoder_norm_eps": 1e-3}),
    ],
)
def test_what_only_decoding_reads_is_no_part_of_the_space(kind, options, tmp_path):
    model, other = build(kind), build(kind, seed=1, **options)
    half = {k: v for k, v in model.state_dict().items() if k.split(".")[0] in ("encoder", "quant_conv")}
    assert not other.load_state_dict(half, strict=False).unexpected_keys
    for name, each in (("one", model), ("other", other)):
        each.save_pretrained(tmp_path / name, safe_serialization=True)
    one, two = load(tmp_path / "one"), load(tmp_path / "other")
    assert two.space == one.space
    x = pictures(2)
    np.testing.assert_array_equal(two.encode(x, np.arange(2)), one.encode(x, np.arange(2)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AutoencoderKL", {"norm_num_groups": 2}),
        ("AutoencoderTiny", {"act_fn": "silu"}),
        ("VQModel", {"act_fn": "relu"}),
        ("AutoencoderDC", {"encoder_out_shortcut": False}),
        ("ConsistencyDecoderVAE", {"encoder_act_fn": "relu"}),
    ],
)
def test_a_setting_that_no_tensor_shows_is_part_of_the_space(kind, options, tmp_path):
    model, other = build(kind), build(kind, **options)
    other.load_state_dict(model.state_dict())  # the same tensors, to the last
    for name, each in (("one", model), ("other", other)):
        each.save_pretrained(tmp_path / name, safe_serialization=True)
    one, two = load(tmp_path / "one"), load(tmp_path / "other")
    assert two.space.id != one.space.id
    x = pictures(1)
    assert np.abs(two.encode(x, np.arange(1)) - one.encode(x, np.arange(1))).max() > 1e-3


def test_the_image_size_gives_another_space(kl):
    assert load(kl).space.id != load(kl, image_size=128).space.id
    assert load(kl, image_size=128).space.dim == 4 * 256


# --- refused -----------------------------------------------------------------------------------------


def refused(name, match):
    with pytest.raises(EncoderError, match=match) as caught:
        load(name)
    text = str(caught.value)
    assert "\n" not in text  # one paragraph
    assert 40 < len(text) < 900
    return text


def test_unknown_names(tmp_path):
    assert "tiny, patch" in refused("patsch", "There is no encoder")
    refused(tmp_path / "none", "There is no encoder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither config.json")
    (tmp_path / "file.safetensors").write_bytes(b"x")
    refused(tmp_path / "file.safetensors", "neither config.json")


@pytest.mark.parametrize(
    "config", ['{"_class_name": "UNet2DConditionModel"}', "{}", "[]", '"AutoencoderKL"', "{"]
)
def test_other_models_are_refused(tmp_path, config):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(config)
    refused(tmp_path / "m", "config.json|autoencoder")


def test_a_pickled_checkpoint_is_refused(kl, tmp_path):
    build("AutoencoderKL").save_pretrained(tmp_path / "vae", safe_serialization=False)
    assert [p.suffix for p in (tmp_path / "vae").iterdir() if p.name != "config.json"] == [".bin"]
    refused(tmp_path / "vae", "cannot be loaded")


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_a_damaged_checkpoint_is_refused(kl, tmp_path, size):
    shutil.copytree(kl, tmp_path / "vae")
    os.truncate(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", size)
    refused(tmp_path / "vae", "cannot be loaded")


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_a_checkpoint_that_does_not_fit_is_refused(kl, tmp_path, change):
    """A weight that is not there must not be filled with random numbers."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(kl, tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    if change == "missing":
        del weights["encoder.conv_in.weight"]
    else:
        weights["encoder.conv_in.weight"] = np.zeros((4, 3, 3, 3), np.float32)
    save_file(weights, path, metadata={"format": "pt"})
    refused(tmp_path / "vae", "cannot be loaded|lacks")


def test_checkpoints_of_older_diffusers_load(kl, tmp_path):
    """Attention weights had other names; they are the same encoder."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(kl, tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in load_file(path).items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        weights[key] = value
    assert "encoder.mid_block.attentions.0.query.weight" in weights
    save_file(weights, path, metadata={"format": "pt"})
    assert load(tmp_path / "vae").space.id == load(kl).space.id


def test_a_hub_name_offline_is_one_paragraph():
    text = refused("nobody-has/this-model", "could not be had from the hub")
    assert "name the folder" in text


def test_an_unreachable_hub_is_told_at_once_and_quietly():
    """Not after minutes of retries, each told in two lines of the hub's client."""
    code = (
        "from latentstore.encoders import load_encoder\n"
        "from latentstore.errors import EncoderError\n"
        "try: load_encoder('nobody-has/this-model', device='cpu')\n"
        "except EncoderError as exc: print(exc.exit_code, exc)\n"
    )
    # A port of this machine where nothing listens.
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=env
    )
    assert "could not be had from the hub" in run.stdout
    assert run.stdout.startswith("1 "), "the name may be right: no fault of the request"
    assert (len(run.stdout.splitlines()), run.stderr) == (1, "")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:99", "meta0"])
def test_other_devices(tiny, device):
    import torch

    if device == "cuda:99" and torch.cuda.is_available():
        pytest.skip("there may be a hundred of them")
    with pytest.raises(UsageError, match="--device"):
        load(tiny, device=device)
