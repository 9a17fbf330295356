"""The script of the miniature world's diffusion models: captions, training, the pipeline that it writes."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from latentstore.errors import UsageError
from latentstore.training import diffusion, diffusion_card
from latentstore.training.captions import END, TOKENS, as_words, merges, read_words, tokenizer
from latentstore.training.diffusion import DESIGNS, Design, Recipe, Shown, Trainer, schedule
from latentstore.training.diffusion_card import MARGIN, TILE, Unseen, held_out_errors, one_of_each
from latentstore.training.fit_patch import held_out
from latentstore.training.loop import train
from latentstore.training.tiny import TINY

SHORT = Recipe(steps=4, batch=4, warm_up=2)
SMALL = Design(
    template="a {}",
    unet={
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
    },
    text={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    noise=DESIGNS["a"].noise,
    recipe=SHORT,
)
WORDS = ("red bell pepper", "t shirt", "pepper mill")


@pytest.fixture
def shown() -> Shown:
    rng = np.random.default_rng(0)
    latents = torch.from_numpy(rng.standard_normal((6, 2, 4, 8, 8), np.float32)).half()
    tokens = tokenizer(WORDS)([*WORDS, *WORDS, ""], padding="max_length", max_length=TOKENS)
    every = torch.tensor(tokens.input_ids)
    return Shown(latents, every[:-1], every[-1])


def trainer(shown: Shown, **changes: float) -> Trainer:
    return Trainer(SMALL, replace(SHORT, **changes), shown, words=600)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve small pictures of three classes, some of them held out, with their table."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"{k:05}.jpg" for k in range(60)]
    chosen = [n for n in names if held_out(n)][:3] + [n for n in names if not held_out(n)][:9]
    for name in chosen:
        Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(folder / name)
    with (folder / "SOURCES.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "class"])
        rows.writerows([name, WORDS[k % 3].replace(" ", "_")] for k, name in enumerate(chosen))
    return folder


# --- captions ---------------------------------------------------------------------------------------


def test_the_last_part_of_a_class_becomes_words():
    assert as_words("Vegetables/Pepper/Red-Bell-Pepper") == "red bell pepper"
    assert as_words("sea_horse") == "sea horse"


def test_words_are_read_from_folders_and_from_tars_alike(photos, tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(photos, arcname="deep/inside")
    words = read_words([photos])
    assert set(words.values()) == set(WORDS)
    assert read_words([path]) == words


def test_a_table_that_is_missing_or_lacks_a_column_is_named(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"No SOURCES\.csv lies in .*empty"):
        read_words([tmp_path / "empty"])
    (photos / "SOURCES.csv").write_text("file,kind\n", encoding="utf-8")
    with pytest.raises(UsageError, match="`class`"):
        read_words([photos])


def test_each_word_of_the_captions_is_one_token_and_no_other_is():
    tokens = tokenizer(WORDS)
    known = {w for words in WORDS for w in words.split()}
    for word in known:
        assert tokens.tokenize(word) == [word + END]
    assert len(tokens.tokenize("pepperoni")) > 1
    first, second, blank = tokens(["Pepper mill", "pepper  MILL", ""]).input_ids
    assert first == second
    assert blank == [0, 1]
    assert sorted(tokens.get_vocab().values()) == list(range(len(tokens)))


def test_tokens_survive_saving_and_do_not_depend_on_the_captions_order(tmp_path):
    from transformers import CLIPTokenizer

    tokens = tokenizer(WORDS)
    tokens.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokens.get_vocab() == tokenizer(WORDS[::-1]).get_vocab()
    assert again("a red mill").input_ids == tokens("a red mill").input_ids


def test_merges_are_the_commonest_pairs_and_of_equals_the_first():
    assert merges(["ab", "ab", "cb"]) == [("a", "b" + END), ("c", "b" + END)]
    assert merges(["aab", "aac"])[0] == ("a", "a")
    code = (
        "from latentstore.training.captions import merges; print(merges({'pepper', 'pear', 'apple', 'plum'}))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            cwd=Path(diffusion.__file__).parents[2],
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


# --- training ---------------------------------------------------------------------------------------


def test_the_error_is_that_of_v(shown):
    run = trainer(shown)
    z, noise = (
        shown.latents[:3, 0].float(),
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    times = torch.tensor([1, 500, 998])
    root = schedule(SMALL).alphas_cumprod[times].sqrt()[:, None, None, None]
    right = root * noise - (1 - root**2).sqrt() * z

    def oracle(noisy, t, words):
        # From z_t and v follow z and ε: that is what makes v a prediction of both.
        torch.testing.assert_close(root * noisy - (1 - root**2).sqrt() * right, z, rtol=0, atol=1e-5)
        return SimpleNamespace(sample=right)

    run.unet = oracle
    # √ᾱ and √(1−ᾱ) are rounded, and their products: v is near 1, its error some eps squared.
    assert (run.error(z, shown.tokens[:3], times, noise) < (8 * torch.finfo(torch.float32).eps) ** 2).all()
    run.unet = lambda noisy, t, words: SimpleNamespace(sample=noise)
    assert (run.error(z, shown.tokens[:3], times, noise) > 1e-4).all()


def test_a_stopped_run_goes_on_to_the_same_bits(shown, tmp_path):
    whole = trainer(shown)
    errors = [whole.advance() for _ in range(SHORT.steps)]
    first = trainer(shown)
    assert [first.advance(), first.advance()] == errors[:2]
    first.save(tmp_path / "checkpoint.pt")
    resumed = trainer(shown)
    assert [line["step"] for line in train(resumed, tmp_path)] == [SHORT.steps]
    for name, value in whole.mean.items():
        assert torch.equal(value, resumed.mean[name]), name
    assert trainer(shown, seed=1).advance() != errors[0]


def test_a_checkpoint_of_other_captions_is_refused(shown, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer(shown).save(path)
    other = replace(shown, tokens=shown.tokens.flip(0))
    with pytest.raises(UsageError, match="of another run"):
        trainer(other).load(path)


def test_captions_matter_unless_all_are_left_out(shown):
    other = replace(shown, tokens=shown.tokens[[1, 2, 0, 1, 2, 0]])
    assert trainer(shown, unguided=0.0).advance() != trainer(other, unguided=0.0).advance()
    assert trainer(shown, unguided=1.0).advance() == trainer(other, unguided=1.0).advance()


def test_a_model_that_learned_its_captions_errs_less_under_its_own():
    """A world in which the caption decides the picture: the text lowers the error, a wrong one raises it."""
    worlds = torch.stack([torch.full((4, 8, 8), 2.0), torch.full((4, 8, 8), -2.0)])
    latents = worlds.repeat(3, 1, 1, 1)[:, None].expand(-1, 2, -1, -1, -1).half().contiguous()
    words = ["pear", "plum"] * 3
    every = torch.tensor(tokenizer(words)([*words, ""], padding="max_length", max_length=TOKENS).input_ids)
    run = trainer(Shown(latents, every[:-1], every[-1]), steps=150, rate=5e-3, batch=8, average=0.9)
    for _ in range(150):
        run.advance()
    unseen = Unseen([], np.empty(0), words, run.shown)
    errors = {kind: e.mean() for kind, e in held_out_errors(run, unseen).items()}
    assert errors["own"] < errors["none"] < errors["other"]


def test_one_of_each_word_is_shown():
    assert one_of_each(["a", "a", "b", "c", "c", "d"], 2) == [0, 5]
    assert one_of_each(["a", "a"], 6) == [0]


# --- the whole script -------------------------------------------------------------------------------


def test_the_script_writes_a_pipeline_that_translates_and_its_card(photos, tmp_path, monkeypatch):
    from latentstore.translate import Translator

    monkeypatch.setattr(diffusion_card, "DRAWN", 2)
    monkeypatch.setattr(diffusion_card, "ROWS", 1)
    out = tmp_path / "model"
    diffusion.run([photos], TINY, out, tmp_path / "work", SMALL, "small")
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    assert (card["photos_fitted"], card["photos_held_out"]) == (9, 3)
    assert card["classes"] == sorted(set(card["classes"])) <= sorted(WORDS)
    assert card["passes"] == round(SHORT.steps * SHORT.batch / 9)
    assert f"± {card['gap_error']}" in (out / "README.md").read_text(encoding="utf-8")
    for sheet in ("samples.jpg", "translations.jpg"):
        assert Image.open(io.BytesIO((out / sheet).read_bytes())).height == TILE + MARGIN
    translator = Translator(str(out), device="cpu")
    picture = np.asarray(Image.open(sorted(photos.glob("*.jpg"))[0]).resize((256, 256)))[None]
    made = {
        s: translator.translate(picture, ["a t shirt"], strength=s, steps=5, guidance=2.0, seeds=[0])
        for s in (0.2, 1.0)
    }
    moved = {s: np.abs(m.astype(float) - picture).mean() for s, m in made.items()}
    assert 0 < moved[0.2] < moved[1.0]
    # Once more: nothing is trained again, and the files are the same.
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    diffusion.run([photos], TINY, out, tmp_path / "work", SMALL, "small")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_what_cannot_be_trained_is_said(photos, tmp_path):
    with pytest.raises(UsageError, match="at least 1"):
        diffusion.run([photos], TINY, tmp_path, tmp_path, replace(SMALL, recipe=replace(SHORT, steps=0)), "x")
    with pytest.raises(UsageError, match="No autoencoder lies in"):
        diffusion.run([photos], tmp_path / "none", tmp_path, tmp_path, SMALL, "x")
    table = photos / "SOURCES.csv"
    table.write_text("\n".join(table.read_text(encoding="utf-8").splitlines()[:-1]), encoding="utf-8")
    with pytest.raises(UsageError, match="1 of 12 photos have no class"):
        diffusion.run([photos], TINY, tmp_path / "model", tmp_path / "work", SMALL, "x")
