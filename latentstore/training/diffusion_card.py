"""Measure a trained diffusion model on photos that it never saw, draw with it, and write its card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from latentstore.translate import Translator

if TYPE_CHECKING:
    from latentstore.training.diffusion import Shown, Trainer
    from latentstore.training.tiny import Photos

STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
STEPS, GUIDANCE = 20, 3.0
TILE, MARGIN = 128, 20
TIMES = (100, 300, 500, 700, 900)
"""At which the error is measured, of 1,000."""
ROWS = 6
DRAWN = 12
_AT_ONCE = 32

CARD = """\
# {name}: a small text-guided latent diffusion model

One of the two models of the miniature world in which every step of the paper happens offline. Trained from
scratch by `latentstore/training/diffusion.py`: no pretrained network had a part in it. The folder is a
`StableDiffusionPipeline` of diffusers; `AutoPipelineForImage2Image` loads it.

| | |
|---|---|
| autoencoder | {autoencoder}: latents of {latents} |
| its PSNR on held-out photos | {autoencoder_psnr_held_out_db} dB |
| U-Net, text encoder | {unet:,} and {text:,} parameters, in float16 |
| noise schedule, prediction | {schedule}, v |
| weights, tokenizer, configurations | {bytes:,} bytes |
| error of v on {photos_held_out} held-out photos: their own caption | {own} |
| … no caption | {none} |
| … the caption of another class | {other} |
| own caption against another's, by photo | {gap} ± {gap_error} (standard error) |

The error is the mean squared one of v = √ᾱ ε − √(1−ᾱ) z, at {times} of 1,000 steps of noise and
with latents in units of their standard deviation. A text that means nothing would leave the three alike.

- **For**: translations from a text prompt by a network, made offline: demonstrations, tests, and the world's
  experiment (`benchmarks/world.py`).
- **Not for**: pictures to look at, or conclusions about large models. It learned {steps} steps of {batch}
  photos ({passes} passes over {photos_fitted} photographs of clothes, groceries and objects).
  `samples.jpg` shows what it draws from noise, `translations.jpg` what it makes of photos that it never
  saw: judge by these.
- **What they look like**: {looks}
- **Prompts**: `{template}`, with one of {classes} classes' words (`card.json` lists them). Other words fall
  apart into letters that mean nothing to it.
- **Commands**: `{autoencoder_command}` for its autoencoder; `{command}` ({steps} steps, seed {seed})
- **Data**: {photos:,} photographs from GitHub mirrors of clothing-dataset-small (CC0-1.0),
  GroceryStoreDataset (MIT) and Caltech-101 (CC-BY-4.0, CaltechDATA D1.20086), with their class words as
  captions. One photo in ten, by hash of its file name, was held out.

Caltech-101 (Li, Andreeto, Ranzato and Perona, CaltechDATA, https://doi.org/10.22002/D1.20086) is used under
the Creative Commons Attribution 4.0 licence, https://creativecommons.org/licenses/by/4.0/. Its photos were
resized to 256 x 256 pixels. Reduced further, these photos stand in the first column of `translations.jpg`:
{shown}.

![What it draws from noise under twelve prompts](samples.jpg)

![What it makes of photos under prompts, at five strengths](translations.jpg)
"""


@dataclass(frozen=True)
class Unseen:
    """Held-out photos.

    Attributes
    ----------
    names : n strings
        File names.
    photos : (n, 256, 256, 3) uint8 array
    words : n strings
        Class words.
    shown : Shown
        Their latents and captions.
    sources : mapping of file name to str
        Where a photo is from, and under which licence.
    """

    names: Sequence[str]
    photos: Photos
    words: Sequence[str]
    shown: Shown
    sources: Mapping[str, str] = field(default_factory=dict)


def write_card(
    out: Path, trainer: Trainer, unseen: Unseen, words: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Write ``card.json``, ``README.md``, ``samples.jpg`` and ``translations.jpg`` beside the pipeline.

    Parameters
    ----------
    out : Path
        A pipeline as :mod:`latentstore.training.diffusion` writes it.
    trainer : Trainer
        At its end.
    unseen : Unseen
    words : sequence of str
        Class words of the training's photos.
    facts : mapping
        For the card: ``name``, ``command`` and what was trained.
    """
    design, recipe = trainer.design, trainer.recipe
    classes = sorted(set(words))
    errors = held_out_errors(trainer, unseen)
    gap = errors["other"] - errors["own"]
    card: dict[str, Any] = {
        **facts,
        "latents": " x ".join(map(str, trainer.shown.latents.shape[2:])),
        "unet": sum(p.numel() for p in trainer.unet.parameters()),
        "text": sum(p.numel() for p in trainer.text.parameters()),
        "schedule": design.noise["beta_schedule"],
        "photos_fitted": len(words),
        "photos_held_out": len(unseen.names),
        **{kind: round(float(e.mean()), 4) for kind, e in errors.items()},
        "gap": round(float(gap.mean()), 4),
        "gap_error": round(float(gap.std(ddof=1) / np.sqrt(len(gap))), 4),
        "times": ", ".join(map(str, TIMES)),
        "passes": round(recipe.steps * recipe.batch / len(words)),
        "template": design.template,
        "looks": design.looks or "nobody has described them: see below.",
        "classes": classes,
        "sampling": {"steps": STEPS, "guidance": GUIDANCE},
    }
    drawn = [classes[i] for i in np.linspace(0, len(classes) - 1, DRAWN).round().astype(int)]
    draw(out, [design.template.format(w) for w in drawn], drawn).save(out / "samples.jpg", quality=85)
    chosen = one_of_each(unseen.words, ROWS)
    sheet = translations(Translator(str(out), device="cpu"), design.template, unseen, chosen, classes)
    sheet.save(out / "translations.jpg", quality=85)
    card["pictured"] = [unseen.sources.get(unseen.names[i], unseen.names[i]) for i in chosen]
    card["weights_sha256"] = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.safetensors"))
    }
    card["bytes"] = sum(
        path.stat().st_size for path in out.rglob("*") if path.is_file() and path.parent != out
    )
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(readme(card), encoding="utf-8")


def readme(card: Mapping[str, Any]) -> str:
    """Return the card for people."""
    recipe = card["recipe"]
    told = {
        **card,
        "classes": len(card["classes"]),
        "photos": card["photos_fitted"] + card["photos_held_out"],
        "shown": "; ".join(card["pictured"]),
        **{name: recipe[name] for name in ("steps", "batch", "seed")},
    }
    return CARD.format(**told)


def held_out_errors(trainer: Trainer, unseen: Unseen) -> dict[str, np.ndarray]:
    """Return each held-out photo's error of v, (n,) float64, with its caption, none, and another class's.

    The same noise is used three times, so that only the text differs.
    """
    trainer.use_mean()
    shown = unseen.shown
    n = len(shown.latents)
    rng = np.random.default_rng(0)
    others = [int(rng.choice([j for j in range(n) if unseen.words[j] != unseen.words[i]])) for i in range(n)]
    captions = {
        "own": shown.tokens,
        "none": shown.blank.expand(n, -1),
        "other": shown.tokens[others],
    }
    totals = {kind: np.zeros(n) for kind in captions}
    with torch.inference_mode():
        for first in range(0, n, _AT_ONCE):
            part = slice(first, min(first + _AT_ONCE, n))
            z = shown.latents[part, 0].float()
            for t in TIMES:
                noise = torch.from_numpy(rng.standard_normal(z.shape, np.float32))
                times = torch.full((len(z),), t)
                for kind, tokens in captions.items():
                    totals[kind][part] += trainer.error(z, tokens[part], times, noise).double().numpy()
    return {kind: total / len(TIMES) for kind, total in totals.items()}


def draw(out: Path, prompts: Sequence[str], labels: Sequence[str]) -> Image.Image:
    """Return a sheet of pictures that the pipeline in ``out`` draws from noise."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(out, safety_checker=None).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    made = []
    for k, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(k)
        made.append(
            pipe(prompt, guidance_scale=GUIDANCE, num_inference_steps=30, generator=generator).images[0]
        )
    wide = max(2, len(made) // 2)
    starts = range(0, len(made), wide)
    return sheet([made[k : k + wide] for k in starts], [labels[k : k + wide] for k in starts])


def translations(
    translator: Translator, template: str, unseen: Unseen, chosen: Sequence[int], classes: Sequence[str]
) -> Image.Image:
    """Return a sheet: held-out photos, and their translations into another class at five strengths."""
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for i in chosen:
        word = str(rng.choice([c for c in classes if c != unseen.words[i]]))
        photo = unseen.photos[i]
        row = [Image.fromarray(photo)]
        for strength in STRENGTHS:
            made = translator.translate(
                photo[None],
                [template.format(word)],
                strength=strength,
                steps=STEPS,
                guidance=GUIDANCE,
                seeds=[i],
            )
            row.append(Image.fromarray(made[0]))
        rows.append(row)
        labels.append([f"{unseen.words[i]}, to:", *(f"{word}, {s:g}" for s in STRENGTHS)])
    return sheet(rows, labels)


def one_of_each(words: Sequence[str], count: int) -> list[int]:
    """Return up to ``count`` positions of different words, spread over all of them."""
    first: dict[str, int] = {}
    for i, word in enumerate(words):
        first.setdefault(word, i)
    places = list(first.values())
    spread = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    return [places[i] for i in spread]


def sheet(rows: Sequence[Sequence[Image.Image]], labels: Sequence[Sequence[str]]) -> Image.Image:
    """Return pictures in rows and columns, each with a line of text below."""
    wide, high = max(map(len, rows)) * TILE, len(rows) * (TILE + MARGIN)
    page = Image.new("RGB", (wide, high), "white")
    pen = ImageDraw.Draw(page)
    for y, (row, texts) in enumerate(zip(rows, labels, strict=True)):
        for x, (picture, text) in enumerate(zip(row, texts, strict=True)):
            corner = x * TILE, y * (TILE + MARGIN)
            page.paste(picture.resize((TILE, TILE), Image.Resampling.LANCZOS), corner)
            pen.text((corner[0] + 2, corner[1] + TILE + 3), text[:21], fill="black")
    return page
