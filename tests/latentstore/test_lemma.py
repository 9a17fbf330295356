"""Lemma 1: an identity in one step, whatever the network says; and a gap that is known where it is known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import vae_worlds
from store_worlds import SIZE

from latentstore import lemma, lemma_models
from latentstore.encoders import PatchEncoder, load_encoder
from latentstore.errors import UsageError
from latentstore.vae_likeness import likeness

EPS = float(np.finfo(np.float64).eps)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are faster on one thread, the more so beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures():
    return vae_worlds.pictures(4)


@pytest.fixture(scope="module")
def unet():
    return lemma_models.small_unet()


def normal(seed, shape=(4, 4, 8, 8)):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("level", [0.02, 0.5, 0.9])
def test_one_step_is_an_identity_for_any_network(unet, kind, level):
    diffuser = replace(unet, schedule=unet.schedule | {"prediction_type": kind})
    found = lemma.one_step(diffuser, normal(0), normal(1), lemma.start(diffuser, level))
    # A handful of roundings of z_t and of ε_θ, each at most half an eps of them.
    assert max(found.identity, found.ddim, found.ddpm) <= 4 * found.rounding
    assert found.factor == pytest.approx(np.sqrt(1 / found.alpha_bar - 1), rel=1e-12)
    assert found.moved > 0.01
    assert found.misread > 0.05  # the opposite: the same network, read as another kind


def test_the_identity_fails_when_the_estimate_is_clipped_and_not_where_it_need_not_be(unet):
    far, t = normal(0), lemma.start(unet, 0.5)
    assert lemma.one_step(unet, far, normal(1), t).clipped > 0.1
    near = lemma_models.ideal_gaussian()  # ẑ₀ = √ᾱ z_t stays within ±1 when the latents do
    assert lemma.one_step(near, 0.1 * far, 0.1 * normal(1), t).clipped < 1e-14


def test_noise_and_estimate_are_those_of_diffusers(unet):
    t = 499
    z_t = lemma.add_noise(unet, normal(0), normal(1), t)
    alpha_bar = float(unet.scheduler().alphas_cumprod[t])
    by_hand = np.sqrt(alpha_bar) * normal(0) + np.sqrt(1 - alpha_bar) * normal(1)
    assert torch.allclose(z_t, by_hand, rtol=0, atol=16 * EPS)
    seen = unet.denoise(z_t, t)
    estimate = (z_t - np.sqrt(1 - alpha_bar) * seen) / np.sqrt(alpha_bar)
    assert torch.allclose(lemma.estimate(unet, z_t, t), estimate, rtol=0, atol=64 * EPS)


def test_one_sampling_step_is_the_lemma_and_several_are_not(unet):
    z0, t = normal(0), lemma.start(unet, 0.5)
    z_t = lemma.add_noise(unet, z0, normal(1), t)
    one = lemma.estimate(unet, z_t, t)
    assert torch.equal(lemma.sample(unet, z_t, 0.5, 2), one)
    assert lemma.distance(lemma.sample(unet, z_t, 0.5, 10), one, one - z0) > 0.01


@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_with_the_exact_denoiser_the_gap_is_the_known_one(strength):
    """N(0, I) stays N(0, I) at every t, so the flow leaves z_t where it is; the estimate is √ᾱ z_t."""
    exact = lemma_models.ideal_gaussian()
    z0, t = normal(0), lemma.start(exact, strength)
    z_t = lemma.add_noise(exact, z0, normal(1), t)
    root = float(exact.scheduler().alphas_cumprod[t]) ** 0.5
    one = lemma.estimate(exact, z_t, t)
    assert torch.allclose(one, root * z_t, rtol=0, atol=16 * EPS / root)
    off = [lemma.distance(lemma.sample(exact, z_t, strength, n), z_t, z_t) for n in (10, 20, 50, 100, 500)]
    # Euler's error falls with the number of steps, and is below 3 % at 500.
    assert off == sorted(off, reverse=True)
    assert off[-1] < 0.03
    # And ε_θ misses ε by √ᾱ on average: 1,024 numbers, so to 3 standard errors of 2 %.
    error = lemma.one_step(exact, z0, normal(1), t).noise_error
    assert error == pytest.approx(root, rel=0.07)


def test_models_are_seeded_and_leave_the_generator_alone(unet, pictures):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    again, other = lemma_models.small_unet(), lemma_models.small_unet(1)
    z = normal(0)
    assert torch.equal(unet.denoise(z, 10), again.denoise(z, 10))
    assert not torch.allclose(unet.denoise(z, 10), other.denoise(z, 10))
    lemma_models.small_vae(pictures)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_patch_code_gives_pictures_back_but_for_8_bits_and_an_untrained_one_does_not(pictures):
    patch, untrained = lemma.PatchCode(pictures), lemma_models.small_vae(pictures)
    off = {}
    for code in (patch, untrained):
        z = code.encode(pictures)
        assert float(z.std()) == pytest.approx(1, abs=1e-3)
        off[code.name] = lemma.distance(code.encode(code.decode(z)), z, z - z.mean(dim=0))
    # The code is linear and its decoder the least-squares one, so only rounding and cutting are left: at most
    # half a grey level a pixel, and what smooth pictures overshoot.
    assert off["patch code"] < 0.05
    assert off["small AutoencoderKL, untrained"] > 0.5
    # As the store's encoder writes them, but for shift and scale.
    raw = PatchEncoder(SIZE).encode(pictures, np.full(4, -1)).reshape(4, 4, 8, 8)
    assert np.allclose(
        patch.encode(pictures), (raw - raw.mean(dtype=float)) / raw.std(dtype=float), atol=1e-5
    )


def test_8_bits():
    unit = np.array([-2.0, -1.0, 0.0, 1.0, 1.5])
    assert lemma.to_8_bits(unit).tolist() == [0, 0, 128, 255, 255]
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(lemma.to_8_bits(every / 127.5 - 1), every)


# --- a pipeline's folder -----------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path):
    """A folder as diffusers saves it: small models, SD2's way to predict v."""
    import diffusers

    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "pipe" / "unet")
    diffusers.DDIMScheduler(
        beta_start=0.001, beta_schedule="scaled_linear", prediction_type="v_prediction"
    ).save_pretrained(tmp_path / "pipe" / "scheduler")
    vae_worlds.save(tmp_path / "pipe" / "vae", "AutoencoderKL", scaling_factor=0.5)
    return tmp_path / "pipe"


def test_a_pipeline_is_read_with_its_schedule_its_kind_and_its_scale(pipeline, pictures):
    diffuser, code = lemma_models.load_pipeline(pipeline)
    assert diffuser.schedule["prediction_type"] == "v_prediction"
    assert diffuser.schedule["beta_start"] == 0.001
    z0 = code.encode(pictures)
    raw = vae_worlds.reload(pipeline / "vae", "AutoencoderKL").encode(vae_worlds.unit(pictures)).latent_dist
    assert torch.allclose(z0, 0.5 * raw.mode().double(), atol=1e-6)
    found = lemma.one_step(diffuser, z0, normal(1, z0.shape), 499)
    assert max(found.identity, found.ddim, found.ddpm) <= 4 * found.rounding


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_pipeline_that_cannot_be_used_is_refused(pipeline, tmp_path):
    with pytest.raises(UsageError, match="There is no pipeline folder"):
        lemma_models.load_pipeline(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"scheduler_config\.json cannot be read"):
        lemma_models.load_pipeline(tmp_path)
    scheduler, unet = pipeline / "scheduler" / "scheduler_config.json", pipeline / "unet" / "config.json"
    whole = scheduler.read_text(), unet.read_text()
    scheduler.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    with pytest.raises(UsageError, match=r"FlowMatchEulerDiscreteScheduler .* has no betas"):
        lemma_models.load_pipeline(pipeline)
    scheduler.write_text("{")
    with pytest.raises(UsageError, match="is not valid JSON"):
        lemma_models.load_pipeline(pipeline)
    scheduler.write_text(whole[0])
    edit(unet, addition_embed_type="text_time")
    with pytest.raises(UsageError, match="needs more than a text condition"):
        lemma_models.load_pipeline(pipeline)
    edit(unet, _class_name="SD3Transformer2DModel")
    with pytest.raises(UsageError, match="holds a SD3Transformer2DModel"):
        lemma_models.load_pipeline(pipeline)
    unet.write_text(whole[1])
    vae_worlds.save(pipeline / "vae", "AutoencoderKL", latent_channels=8)
    with pytest.raises(UsageError, match="reads 4 channels, its autoencoder writes 8"):
        lemma_models.load_pipeline(pipeline)
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"The UNet2DConditionModel in .* cannot be loaded"):
        lemma_models.load_pipeline(pipeline)
    weights.unlink()
    with pytest.raises(UsageError, match=r"cannot be loaded: .*safetensors"):
        lemma_models.load_pipeline(pipeline)


# --- Table 4 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vaes")
    for seed in (0, 1):
        vae_worlds.save(folder / str(seed), "AutoencoderKL", seed=seed)
    vae_worlds.save(folder / "wide", "AutoencoderKL", latent_channels=8)
    return {name: vae_worlds.load(folder / name) for name in ("0", "1", "wide")}


def test_an_autoencoder_is_like_itself_and_not_like_another_seed(vaes, pictures):
    same = likeness(vaes["0"], vaes["0"], pictures)
    assert same.conv == pytest.approx(1, abs=1e-12)
    assert same.embed == pytest.approx(1, abs=1e-12)
    found = likeness(vaes["0"], vaes["1"], pictures)
    assert found.conv is not None
    # 8 x 8 x 3 x 3 independent weights: a cosine of deviation 1/24.
    assert abs(found.conv) < 4 / 24
    assert abs(found.embed) < 0.9
    assert found.n == len(pictures)


def test_values_are_those_of_the_definition(vaes, pictures):
    found = likeness(vaes["0"], vaes["1"], pictures)
    models = [vae_worlds.build("AutoencoderKL", seed) for seed in (0, 1)]
    weights = [m.encoder.conv_out.weight.detach().flatten() for m in models]
    with torch.inference_mode():
        codes = [m.encode(vae_worlds.unit(pictures)).latent_dist.mode().flatten(1) for m in models]
    cosine = torch.nn.functional.cosine_similarity
    assert found.conv == pytest.approx(float(cosine(*weights, dim=0)), abs=1e-6)
    assert found.embed == pytest.approx(float(cosine(*codes, dim=1).mean()), abs=1e-5)
    rolled = codes[0].reshape(4, 4, 8, 8).roll(1, 1).flatten(1)
    assert found.embed_turned == pytest.approx(float(cosine(codes[0], rolled, dim=1).mean()), abs=1e-5)


def test_what_has_no_cosine_is_left_out(vaes, pictures):
    found = likeness(vaes["0"], vaes["wide"], pictures)
    assert (found.conv, found.embed, found.embed_unrelated) == (None, None, None)
    patch = likeness(load_encoder("patch", image_size=SIZE), vaes["0"], pictures)
    assert patch.conv is patch.conv_turned is None
    assert patch.embed is not None
    with pytest.raises(UsageError, match="at least 2 pictures, and 1"):
        likeness(vaes["0"], vaes["1"], pictures[:1])
