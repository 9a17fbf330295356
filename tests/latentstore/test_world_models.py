"""The diffusion models that come with the package: small, of their scripts, different, led by their text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import latentstore
from latentstore import images, photos
from latentstore.training.diffusion import DESIGNS, build
from latentstore.training.tiny import TINY
from latentstore.training.tiny_card import WEIGHTS
from latentstore.translate import Translator

WORLD = Path(latentstore.__file__).parent / "data" / "world"
MODELS = ("a", "b")
CARDS = {name: json.loads((WORLD / name / "card.json").read_text(encoding="utf-8")) for name in MODELS}


@pytest.fixture(scope="module")
def translators() -> dict[str, Translator]:
    return {name: Translator(name, device="cpu") for name in MODELS}


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A photograph that no training saw, (1, 256, 256, 3)."""
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    return np.stack([images.resize(images.decode(p.read_bytes())[0], 256) for p in photos.bundled()[:1]])


def translated(translator: Translator, photo: np.ndarray, words: str, strength: float) -> np.ndarray:
    prompt = CARDS[translator.name]["template"].format(words)
    made = translator.translate(photo, [prompt], strength=strength, steps=5, guidance=3.0, seeds=[0])
    return made.astype(np.float64)


def test_a_name_stands_for_the_folder_in_the_package(translators):
    assert translators["b"].digest == Translator(str(WORLD / "b"), device="cpu").digest
    assert translators["b"].digest != translators["a"].digest
    assert {t.name for t in translators.values()} == set(MODELS)


def test_all_networks_together_are_small():
    files = [*TINY.glob("*.safetensors"), *WORLD.rglob("*.safetensors")]
    assert len(files) == 7
    assert sum(f.stat().st_size for f in files) <= 24e6
    assert max(f.stat().st_size for f in files) <= 12e6


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_card_and_of_the_network_that_the_script_builds(name, translators):
    card, folder = CARDS[name], WORLD / name
    held = {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*.safetensors")
    }
    assert held == card["weights_sha256"]
    latents = [int(side) for side in card["latents"].split(" x ")]
    pipe = translators[name]._pipe
    unet, text = build(DESIGNS[name], 0, latents, len(pipe.tokenizer))
    for fresh, stored in ((unet, pipe.unet), (text, pipe.text_encoder)):
        shapes = {key: p.shape for key, p in stored.named_parameters()}
        assert shapes == {key: p.shape for key, p in fresh.named_parameters()}
    assert card["unet"] == sum(p.numel() for p in unet.parameters())


def test_nothing_in_the_package_depends_on_where_it_was_made():
    for file in [*WORLD.rglob("*.json"), *WORLD.rglob("*.md"), *TINY.glob("*.json")]:
        text = file.read_text(encoding="utf-8")
        assert "_name_or_path" not in text, file
        assert "/home/" not in text, file
        assert str(Path.cwd()) not in text, file


def test_a_has_tiny_as_its_autoencoder_and_b_another_one():
    tiny = (TINY / WEIGHTS).read_bytes()
    assert (WORLD / "a" / "vae" / WEIGHTS).read_bytes() == tiny
    assert (WORLD / "b" / "vae" / WEIGHTS).read_bytes() != tiny
    assert CARDS["a"]["latents"] == "4 x 32 x 32"
    assert CARDS["b"]["latents"] == "16 x 16 x 16"


def test_their_cards_say_that_the_right_caption_helped_on_photos_never_seen():
    for card in CARDS.values():
        assert card["own"] < card["other"]
        assert card["gap"] > 3 * card["gap_error"]


def test_the_stronger_the_further_from_the_original(translators, photo):
    for translator in translators.values():
        near, far = (translated(translator, photo, "butterfly", s) for s in (0.2, 1.0))
        assert 0 < np.abs(near - photo).mean() < np.abs(far - photo).mean()


def test_the_prompt_and_the_model_decide_what_is_made(translators, photo):
    a, b = translators.values()
    one, other = (translated(a, photo, words, 0.8) for words in ("butterfly", "soccer ball"))
    assert np.abs(one - other).mean() > 1
    assert np.abs(one - translated(b, photo, "butterfly", 0.8)).mean() > 1
    np.testing.assert_array_equal(one, translated(a, photo, "butterfly", 0.8))
