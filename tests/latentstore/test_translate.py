"""Translation: what diffusers makes, decided by picture, prompt and seed alone; and what is refused."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from pipeline_worlds import SIZE, save_pipeline
from safetensors.torch import load_file, save_file
from store_worlds import picture

from latentstore.errors import EncoderError, EncoderUnreachableError, MissingExtraError, UsageError
from latentstore.translate import Translator, name_of, real_steps

PROMPTS = ["a cat", "dog", "the sea", "house"]
SEEDS = [11, 22, 33, 44]
HOW = {"strength": 0.5, "steps": 4}
# Ancestral steps draw noise of their own at each step; 5 levels make latents of 16 channels at 1/16.
KINDS = {"plain": {}, "ancestral": {"scheduler": "EulerAncestralDiscreteScheduler"}, "deep": {"levels": 5}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: save_pipeline(root / name, 1, **options) for name, options in KINDS.items()}


@pytest.fixture(scope="module")
def models(folders):
    return {name: Translator(str(folder), device="cpu") for name, folder in folders.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """A pipeline's folder that may be changed."""
    return shutil.copytree(folders["plain"], tmp_path / "copy")


@pytest.fixture(scope="module")
def pictures():
    return np.stack([np.asarray(picture(i, SIZE, SIZE)) for i in range(4)])


def of(pipe, part):
    return pipe._pipe.components[part]


# --- what a translation is ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_decided_by_its_picture_prompt_and_seed(models, pictures, kind):
    model = models[kind]
    made = model.translate(pictures, PROMPTS, seeds=SEEDS, **HOW)
    assert made.shape == pictures.shape
    assert made.dtype == np.uint8
    # In another place and other company, and whatever torch's own generator stands at: the same bits.
    torch.manual_seed(5)
    order = [3, 0, 0, 2]
    again = model.translate(
        pictures[order], [PROMPTS[i] for i in order], seeds=[SEEDS[i] for i in order], **HOW
    )
    np.testing.assert_array_equal(again, made[order])
    # And each of the three, and the strength, does decide.
    for changed in (
        model.translate(pictures[::-1].copy(), PROMPTS, seeds=SEEDS, **HOW),
        model.translate(pictures, PROMPTS[::-1], seeds=SEEDS, **HOW),
        model.translate(pictures, PROMPTS, seeds=SEEDS[::-1], **HOW),
        model.translate(pictures, PROMPTS, seeds=SEEDS, strength=0.75, steps=4),
    ):
        assert (changed != made).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_diffusers_makes(folders, models, pictures, kind):
    """One call of the pipeline a picture, as its documentation shows; only the rounding to bytes is ours."""
    from diffusers import AutoPipelineForImage2Image
    from PIL import Image

    pipe = AutoPipelineForImage2Image.from_pretrained(folders[kind], use_safetensors=True)
    made = models[kind].translate(pictures[:2], PROMPTS[:2], seeds=SEEDS[:2], guidance=3.0, **HOW)
    for i in range(2):
        asked = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3.0}
        generator = torch.Generator().manual_seed(SEEDS[i])
        own = pipe(PROMPTS[i], Image.fromarray(pictures[i]), generator=generator, **asked).images[0]
        # In a batch of another size float32 may round otherwise: by one of 255 levels where that is a tie.
        assert np.abs(np.asarray(own, int) - made[i]).max() <= 1


def test_the_global_generator_is_left_alone(models, pictures):
    before = torch.get_rng_state()
    models["ancestral"].translate(pictures[:1], ["cat"], seeds=[1], **HOW)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_that_no_seed_decides_is_refused(folders, pictures):
    model = Translator(str(folders["plain"]), device="cpu")
    scheduler = of(model, "scheduler")
    step = scheduler.step

    def noisy(output, *rest, **options):
        return step(output + torch.randn_like(output), *rest, **options)

    scheduler.step = noisy
    before = torch.get_rng_state()
    with pytest.raises(EncoderError, match=r"global generator .*DDIMScheduler"):
        model.translate(pictures, PROMPTS, seeds=SEEDS, **HOW)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("guidance", "rows"), [(7.5, 8), (1.0, 4), (0.0, 4)])
def test_guidance_of_one_or_less_halves_the_work(models, pictures, guidance, rows):
    seen = []
    unet = of(models["plain"], "unet")
    hook = unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        models["plain"].translate(pictures, PROMPTS, strength=0.7, steps=5, guidance=guidance, seeds=SEEDS)
    finally:
        hook.remove()
    assert seen == [rows] * real_steps(0.7, 5)


@pytest.mark.parametrize(
    ("strength", "steps", "real"), [(1.0, 20, 20), (0.9, 20, 18), (0.5, 3, 1), (0.35, 20, 7)]
)
def test_a_strength_runs_a_part_of_the_steps(strength, steps, real):
    assert real_steps(strength, steps) == real


@pytest.mark.parametrize(
    ("strength", "steps", "said"),
    [
        (0.04, 20, r"0\.8 steps.*--steps 25"),
        (0.0, 20, "above 0"),
        (1.1, 20, "at most 1"),
        (float("nan"), 20, "nan"),
    ],
)
def test_strengths_that_change_nothing_are_refused(models, pictures, strength, steps, said):
    with pytest.raises(UsageError, match=said):
        models["plain"].translate(pictures, PROMPTS, strength=strength, steps=steps, seeds=SEEDS)


def test_the_steps_that_are_proposed_are_enough(models, pictures):
    assert real_steps(0.04, 25) == 1
    made = models["plain"].translate(pictures, PROMPTS, strength=0.04, steps=25, seeds=SEEDS)
    assert made.shape == pictures.shape


def test_sizes_are_multiples_of_the_factor(models, pictures):
    assert [(models[k].factor, models[k].size) for k in ("plain", "deep")] == [(8, SIZE), (16, SIZE)]
    odd = pictures[:, :56, :40]  # multiples of 8, not of 16
    assert models["plain"].translate(odd, PROMPTS, seeds=SEEDS, **HOW).shape == odd.shape
    with pytest.raises(UsageError, match=r"multiples of 16 .*\(56, 40, 3\)"):
        models["deep"].translate(odd, PROMPTS, seeds=SEEDS, **HOW)


def test_each_picture_needs_a_prompt_and_a_seed(models, pictures):
    with pytest.raises(UsageError, match="4 pictures came with 3 prompts and 4 seeds"):
        models["plain"].translate(pictures, PROMPTS[:3], seeds=SEEDS, **HOW)
    assert models["plain"].translate(pictures[:0], [], seeds=[], **HOW).shape == (0, SIZE, SIZE, 3)


def test_what_is_not_finite_is_refused(folders, pictures):
    model = Translator(str(folders["plain"]), device="cpu")
    with torch.no_grad():
        next(of(model, "unet").parameters()).fill_(torch.nan)
    with pytest.raises(EncoderError, match="not finite"):
        model.translate(pictures, PROMPTS, seeds=SEEDS, **HOW)


def test_a_prompt_that_is_cut_off_is_told(models, pictures):
    """Six tokens between the marks of beginning and end; what follows changes nothing."""
    model = models["plain"]
    assert model.reads_whole("cat dog tree house sea cat")
    assert not model.reads_whole("cat dog tree house sea cat dog")
    long = ["cat dog tree house sea cat dog", "cat dog tree house sea cat tree"]
    made = [model.translate(pictures[:1], [p], seeds=[1], **HOW) for p in long]
    np.testing.assert_array_equal(*made)


# --- which model it is -------------------------------------------------------------------------------


def test_the_digest_is_of_weights_and_settings(folders, models, copy, tmp_path):
    from diffusers import StableDiffusionPipeline

    digest = models["plain"].digest
    assert Translator(str(copy), name="another", device="cpu").digest == digest
    # Saved in half precision it is the same model to a GPU.
    half = StableDiffusionPipeline.from_pretrained(copy, use_safetensors=True)
    half.to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    assert Translator(str(tmp_path / "half"), device="cpu").digest == digest
    settings = copy / "scheduler" / "scheduler_config.json"
    stated = json.loads(settings.read_text())
    settings.write_text(json.dumps(stated | {"prediction_type": "v_prediction"}))
    others = [Translator(str(copy), device="cpu").digest]
    # A default that is left out means the same.
    assert stated.pop("beta_schedule") == "linear"
    settings.write_text(json.dumps(stated))
    assert Translator(str(copy), device="cpu").digest == digest
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).flatten()[0].add_(1)
    save_file(tensors, weights, metadata={"format": "pt"})
    others.append(Translator(str(copy), device="cpu").digest)
    assert len({digest, *others}) == 3


def test_names(folders, tmp_path):
    assert name_of("stabilityai/stable-diffusion-2") == "stable-diffusion-2"
    assert name_of(f"{folders['plain']}/") == "plain"
    assert name_of("OWNER/a model (v2)") == "a-model-v2"
    for name in ("", "..", ".hidden", "a/b", "a b"):
        with pytest.raises(UsageError, match="cannot be called"):
            Translator(str(folders["plain"]), name=name)


# --- what is no model --------------------------------------------------------------------------------


def test_a_missing_weight_is_not_made_up(copy):
    """transformers would draw it at random, and say so in a log alone."""
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    lost = next(k for k in tensors if "layer_norm1" in k)
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"text_encoder .* lacks 1 of its weights"):
        Translator(str(copy))


def test_pickles_are_not_read(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(EncoderError, match="cannot be loaded"):
        Translator(str(copy))


def test_damaged_weights(copy):
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EncoderError, match=r"StableDiffusionPipeline in .* cannot be loaded"):
        Translator(str(copy))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"_class_name": ["my_pipeline", "MyPipeline"]}, "own code is not run"),
        ({"_class_name": "StableCascadeDecoderPipeline"}, "cannot be loaded for image-to-image"),
        (["no", "object"], "names no pipeline class"),
        ("{", "not valid JSON"),
    ],
)
def test_a_folder_that_is_no_image_to_image_pipeline(copy, index, said):
    path = copy / "model_index.json"
    if isinstance(index, dict):
        index = json.loads(path.read_text()) | index
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(EncoderError, match=said):
        Translator(str(copy))


def test_wrong_places(tmp_path):
    with pytest.raises(EncoderError, match=r"no model nowhere.*OWNER/NAME"):
        Translator("nowhere")
    with pytest.raises(EncoderError, match=r"no model_index\.json"):
        Translator(str(tmp_path))
    with pytest.raises(EncoderUnreachableError, match="offline"):
        Translator("owner/name")


def test_without_transformers(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'latentstore\[translate\]'"):
        Translator(str(folders["plain"]))


def test_nothing_is_said_while_it_works(folders, pictures, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    Translator(str(folders["plain"]), device="cpu").translate(pictures, PROMPTS, seeds=SEEDS, **HOW)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
