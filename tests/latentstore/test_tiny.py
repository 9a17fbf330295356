"""The built-in learned encoder: what is stored is what the script makes, and it beats the linear code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

import latentstore
from latentstore import images, photos
from latentstore.encoders import PatchEncoder, load_encoder
from latentstore.errors import UsageError
from latentstore.training.loop import train
from latentstore.training.tiny import Recipe, Trainer, as_input, build, crops, decode, encode
from latentstore.training.tiny_card import WEIGHTS, psnr, through_patch, through_tiny

TINY = Path(latentstore.__file__).parent / "data" / "tiny"
CARD = json.loads((TINY / "card.json").read_text(encoding="utf-8"))
SHORT = Recipe(steps=4, batch=2, crop=32, warm_up=2)


@pytest.fixture(scope="module")
def model() -> AutoencoderTiny:
    loaded = AutoencoderTiny.from_pretrained(TINY, torch_dtype=torch.float32)
    return loaded.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unseen() -> np.ndarray:
    """Photographs that no training saw, (n, 256, 256, 3)."""
    return np.stack([images.resize(images.decode(p.read_bytes())[0], 256) for p in photos.bundled()])


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(6, 256, 256, 3), dtype=np.uint8)


# --- what is stored ---------------------------------------------------------------------------------


def test_loads_like_any_folder_and_gives_the_same_bits(unseen):
    encoder, again = (load_encoder(str(TINY), device="cpu") for _ in range(2))
    assert encoder.space.latent_shape == (4, 32, 32)
    assert encoder.space.posterior == "deterministic"
    once = encoder.encode(unseen[:2], np.arange(2))
    np.testing.assert_array_equal(once, again.encode(unseen[:2], np.arange(2)))
    assert np.abs(once[0] - once[1]).max() > 0.1


def test_is_small_and_what_its_card_describes():
    weights = (TINY / WEIGHTS).read_bytes()
    assert len(weights) == CARD["bytes"] < 8e6
    assert hashlib.sha256(weights).hexdigest() == CARD["weights_sha256"]
    assert f"{CARD['psnr_held_out_db']} dB" in (TINY / "README.md").read_text(encoding="utf-8")


def test_scaled_latents_of_unseen_photos_are_near_unit_variance(unseen):
    encoder = load_encoder(str(TINY), device="cpu")
    latents = encoder.encode(unseen, np.arange(len(unseen))) * encoder.facts["scaling_factor"]
    # A handful of photos: their contrast differs from the training's by some tens of per cent.
    assert 0.6 < latents.std() < 1.5
    assert np.abs(latents).max() * CARD["latents_std"] < 10


def test_beats_the_linear_code_on_photos_it_never_saw(model, unseen):
    linear = psnr(lambda x: through_patch(PatchEncoder(), x), unseen)
    assert psnr(lambda x: through_tiny(model, x), unseen) > linear + 1.5
    # The opposite: the same numbers with the channels in another order are another picture.
    model.decoder.register_forward_pre_hook(lambda _, inputs: inputs[0].flip(1))
    try:
        assert psnr(lambda x: through_tiny(model, x), unseen[:3]) < linear - 5
    finally:
        model.decoder._forward_pre_hooks.clear()


# --- the script -------------------------------------------------------------------------------------


def test_training_leaves_out_layers_that_only_rearrange(model, noise):
    x = as_input(noise[:1, :64, :96])
    with torch.inference_mode():
        latents, back = model.encoder(x), model.decoder(encode(model, x))
        # Sums of at most 9 x 64 products in another order, through some 30 layers.
        near = {"rtol": 0, "atol": 1e3 * torch.finfo(torch.float32).eps}
        torch.testing.assert_close(encode(model, x), latents, **near)
        torch.testing.assert_close(decode(model, latents), back, **near)


def test_it_would_show_if_one_of_them_did_more(noise):
    x = as_input(noise[:1, :64, :64])
    for layer in ("encoder.layers.0", "encoder.layers.1", "decoder.layers.15"):
        model = build()
        fixed = model.get_submodule(layer).weight
        assert not fixed.requires_grad
        assert torch.count_nonzero(fixed) in (12, 64)
        with torch.inference_mode():
            fixed[0].mul_(1.5)
            z = model.encoder(x)
            gap = max((encode(model, x) - z).abs().max(), (decode(model, z) - model.decoder(z)).abs().max())
        assert gap > 1e-4, layer


def test_stored_weights_are_of_the_network_that_the_script_builds(model):
    fresh = build()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in fresh.named_parameters()}
    for name, p in fresh.named_parameters():
        assert torch.equal(p, model.get_parameter(name)) is not p.requires_grad, name


def test_crops_are_cut_from_the_photos_anew_at_each_step():
    # Photos whose pixels say where they stand: row, column, photo.
    where = np.stack(np.meshgrid(*[np.arange(256)] * 2, range(9), indexing="ij"), axis=-1)
    photos = where.transpose(2, 0, 1, 3).astype(np.uint8)
    recipe = Recipe(batch=16, crop=48)
    first = crops(photos, recipe, 5)
    assert torch.equal(first, crops(photos, recipe, 5))
    for other in (crops(photos, recipe, 6), crops(photos, Recipe(batch=16, crop=48, seed=1), 5)):
        assert not torch.equal(first, other)
    rows, columns, photo = ((first + 1) * 127.5).round().int().unbind(1)
    assert (rows.diff(dim=1) == 1).all()
    assert (rows == rows[:, :, :1]).all()
    steps = columns.diff(dim=2)
    assert (columns == columns[:, :1]).all()
    assert (steps == steps[:, :1, :1]).all()
    assert steps.unique().tolist() == [-1, 1]  # some are mirrored, some are not
    assert (photo == photo[:, :1, :1]).all()
    assert len(photo.unique()) > 3


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(noise, tmp_path):
    whole = Trainer(SHORT, noise)
    errors = [whole.advance() for _ in range(SHORT.steps)]
    first = Trainer(SHORT, noise)
    assert [first.advance(), first.advance()] == errors[:2]
    first.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(SHORT, noise)
    assert [line["step"] for line in train(resumed, tmp_path)] == [SHORT.steps]
    theirs = resumed.averaged().state_dict()
    for name, value in whole.averaged().state_dict().items():
        assert torch.equal(value, theirs[name]), name
    other = Trainer(Recipe(**{**vars(SHORT), "seed": 1}), noise)
    assert other.advance() != errors[0]


def test_a_checkpoint_of_another_run_is_refused(noise, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer = Trainer(SHORT, noise)
    trainer.advance()
    trainer.save(path)
    longer = Recipe(**{**vars(SHORT), "steps": 8})
    Trainer(longer, noise).load(path)  # the rate has not begun to fall
    with pytest.raises(UsageError, match="of another run"):
        Trainer(SHORT, noise[::-1]).load(path)
    with pytest.raises(UsageError, match="of another run"):
        Trainer(Recipe(**{**vars(SHORT), "rate": 1.0}), noise).load(path)
    for _ in range(2):
        trainer.advance()
    trainer.save(path)
    with pytest.raises(UsageError, match="at step 3"):
        Trainer(longer, noise).load(path)


def test_the_rate_does_not_depend_on_the_end_until_it_falls():
    short, long = Recipe(steps=10_000), Recipe(steps=40_000)
    before = range(short.falls_at)
    assert [short.rate_at(s) for s in before] == [long.rate_at(s) for s in before]
    falling = [short.rate_at(s) for s in range(short.falls_at, short.steps)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 1e-3 * short.rate


def test_a_store_made_by_name_does_not_depend_on_where_the_package_lies() -> None:
    named, by_path = load_encoder("tiny"), load_encoder(str(TINY))
    assert named.facts["name"] == "tiny"
    assert named.space.id == by_path.space.id
