"""Train one of the miniature world's two text-guided latent diffusion models, from scratch.

    OMP_NUM_THREADS=1 python -m latentstore.training.diffusion a PHOTOS [PHOTOS …] [--out FOLDER]

``PHOTOS`` are folders or tar files of photographs with a table ``SOURCES.csv`` (columns ``file``, ``class``),
of whose class words captions are made. One photo in ten, by hash of its file name, is held out: the same that
the autoencoders never saw. ``b`` needs its autoencoder first (``latentstore.training.tiny --network deep``).
Writes a ``StableDiffusionPipeline`` of diffusers in float16, and its card. ``--work`` keeps a checkpoint and
a log: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F  # noqa: N812

from latentstore.errors import LatentStoreError, UsageError
from latentstore.training.captions import TOKENS, read_licences, read_words, tokenizer
from latentstore.training.diffusion_card import Unseen, write_card
from latentstore.training.loop import Run, Schedule, train_and_log
from latentstore.training.tiny import TINY, Photos, as_input, split

WORLD = Path(__file__).parent.parent / "data" / "world"
_ENCODED = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe(Schedule):
    """What the weights depend on, beside photos, captions and autoencoder.

    Attributes
    ----------
    steps, rate, warm_up, fall, clip, average, seed
        See :class:`Schedule`.
    batch : int
        Photos a step, each as it is or mirrored.
    unguided : float
        Share of photos that are shown without their caption, so that a model can be guided away from none.
    """

    steps: int = 1_500
    warm_up: int = 200
    batch: int = 16
    unguided: float = 0.15


@dataclass(frozen=True)
class Design:
    """A model that can be trained here.

    Attributes
    ----------
    template : str
        Of captions; ``{}`` stands for the class words.
    unet, text, noise : mapping
        Arguments of ``UNet2DConditionModel``, ``CLIPTextConfig`` and diffusers' schedulers, where they are
        not common to both models.
    recipe : Recipe
    looks : str
        What the pictures of the weights in the package look like, for their card.
    """

    template: str
    unet: Mapping[str, Any]
    text: Mapping[str, Any]
    noise: Mapping[str, Any]
    recipe: Recipe = field(default_factory=Recipe)
    looks: str = ""


DESIGNS = {
    # On tiny's latents, 4 x 32 x 32, with Stable Diffusion's noise schedule.
    "a": Design(
        template="a photo of a {}",
        unet={
            "block_out_channels": (48, 72, 96),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 12,
        },
        text={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        noise={"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        looks="From noise it draws textures in a class's colours (limes are yellow, courgettes green); of "
        "shapes only those of clothes can be guessed. At strength 0.1 and 0.3 a photo stands, redrawn; at "
        "0.5 it dissolves; at 0.9 its layout and light are left, and of the prompt some colours.",
    ),
    # On another autoencoder's, 16 x 16 x 16, with another schedule, captions, widths and seed.
    "b": Design(
        template="{}, seen in a picture",
        unet={
            "block_out_channels": (72, 104),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 8,
        },
        text={"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
        noise={"beta_schedule": "squaredcos_cap_v2"},
        recipe=Recipe(steps=2_000, seed=1),
        looks="All it makes is blurred, by its autoencoder already. From noise it draws textures that show "
        "of the prompt hardly more than colours. It keeps a photo longer than a does: at strength 0.7 most "
        "can still be made out, at 0.9 their layout.",
    ),
}


def schedule(design: Design) -> DDIMScheduler:
    """Return the noise schedule, which is also what the model samples with."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **design.noise,
    )


@dataclass(frozen=True)
class Shown:
    """What a model learns from.

    Attributes
    ----------
    latents : (n, 2, c, h, w) float16 tensor
        Of each photo as it is and mirrored, times the autoencoder's ``scaling_factor``.
    tokens : (n, TOKENS) int64 tensor
        Captions.
    blank : (TOKENS,) int64 tensor
        No caption.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    blank: torch.Tensor

    def fingerprint(self) -> str:
        """Return the SHA-256 of latents and captions."""
        digest = hashlib.sha256(self.latents.numpy().tobytes())
        digest.update(self.tokens.numpy().tobytes())
        return digest.hexdigest()


def prepare(model: AutoencoderTiny, photos: Photos, captions: Sequence[str], tokens: Any) -> Shown:
    """Encode (n, 256, 256, 3) photos both ways round, and their captions.

    Parameters
    ----------
    model : AutoencoderTiny
    photos : (n, 256, 256, 3) uint8 array
    captions : n strings
    tokens : CLIPTokenizer
    """
    scaling = model.config["scaling_factor"]
    parts = []
    with torch.inference_mode():
        for first in range(0, len(photos), _ENCODED):
            batch = photos[first : first + _ENCODED]
            both = np.stack([batch, batch[:, :, ::-1]], axis=1).reshape(-1, *photos.shape[1:])
            z = model.encode(as_input(both)).latents * scaling
            parts.append(z.reshape(-1, 2, *z.shape[1:]).half())
    ids = tokens([*captions, ""], padding="max_length", truncation=True, max_length=TOKENS).input_ids
    every = torch.tensor(ids)
    return Shown(torch.cat(parts), every[:-1], every[-1])


class Trainer(Run):
    """A training run of U-Net and text encoder together.

    Attributes
    ----------
    unet : UNet2DConditionModel
    text : CLIPTextModel
    """

    recipe: Recipe

    def __init__(self, design: Design, recipe: Recipe, shown: Shown, words: int) -> None:
        self.design, self.shown = design, shown
        self.unet, self.text = build(design, recipe.seed, shown.latents.shape[2:], words)
        self.unet.set_attn_processor(AttnProcessor())  # in bfloat16 on a CPU the fused one is far slower
        self.unet.to(memory_format=torch.channels_last)
        self._alpha_bar = schedule(design).alphas_cumprod
        learned = {f"unet.{k}": p for k, p in self.unet.named_parameters()}
        learned |= {f"text.{k}": p for k, p in self.text.named_parameters()}
        super().__init__(recipe, learned, shown.fingerprint())

    def loss(self) -> tuple[torch.Tensor, float]:
        """Return the mean squared error of v = √ᾱ ε − √(1−ᾱ) z (Salimans and Ho, 2022, appendix D)."""
        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, self.step])
        which = torch.from_numpy(rng.integers(len(self.shown.latents), size=recipe.batch))
        ways = torch.from_numpy(rng.integers(2, size=recipe.batch))
        tokens = self.shown.tokens[which].clone()
        tokens[torch.from_numpy(rng.random(recipe.batch) < recipe.unguided)] = self.shown.blank
        # Times of one batch are spread evenly over the schedule: less noise in the loss.
        times = torch.from_numpy((rng.random() + np.arange(recipe.batch)) / recipe.batch % 1 * 1000).long()
        noise = torch.from_numpy(
            rng.standard_normal((recipe.batch, *self.shown.latents.shape[2:]), np.float32)
        )
        error = self.error(self.shown.latents[which, ways].float(), tokens, times, noise).mean()
        return error, float(error.detach())

    def error(
        self, z: torch.Tensor, tokens: torch.Tensor, times: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean squared error of each picture's v, (b,) float32.

        Parameters
        ----------
        z, noise : (b, c, h, w) float32 tensors
        tokens : (b, TOKENS) int64 tensor
        times : (b,) int64 tensor
        """
        alpha_bar = self._alpha_bar[times][:, None, None, None]
        noisy = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
        wanted = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z
        with torch.autocast("cpu", dtype=torch.bfloat16):
            words = self.text(tokens).last_hidden_state
            v = self.unet(noisy.contiguous(memory_format=torch.channels_last), times, words).sample
        return F.mse_loss(v.float(), wanted, reduction="none").mean((1, 2, 3))

    def said_of(self, errors: Sequence[float]) -> dict[str, float]:
        """Return the mean squared error of v, whose variance is about 1."""
        return {"error_of_v": round(float(np.mean(errors)), 4)}

    def averaged(self) -> tuple[UNet2DConditionModel, Any]:
        """Return U-Net and text encoder with the running means of their weights, in half precision."""
        unet, text = build(self.design, self.recipe.seed, self.shown.latents.shape[2:], self.words)
        for model, name in ((unet, "unet."), (text, "text.")):
            state = {k.removeprefix(name): v for k, v in self.mean.items() if k.startswith(name)}
            model.load_state_dict(state, strict=False)
            model.half().eval().requires_grad_(False)
        return unet, text

    def use_mean(self) -> None:
        """Put the running mean in the place of the weights: for measuring, at the end of a run."""
        with torch.no_grad():
            for name, p in self._learned.items():
                p.copy_(self.mean[name])

    @property
    def words(self) -> int:
        """Tokens that the text encoder knows."""
        return int(self.text.config.vocab_size)


def build(design: Design, seed: int, latents: Sequence[int], words: int) -> tuple[UNet2DConditionModel, Any]:
    """Return the untrained U-Net and text encoder.

    Parameters
    ----------
    design : Design
    seed : int
    latents : (channels, height, width)
    words : int
        Tokens of the vocabulary, of which 0 begins and 1 ends a caption.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    channels, height, _ = latents
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=design.text["hidden_size"],
        **design.unet,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            **design.text,
        )
    )
    return unet, text


def main() -> int:
    """Train, write, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=sorted(DESIGNS))
    parser.add_argument("photos", nargs="+", type=Path, help="folders or tar files with SOURCES.csv")
    parser.add_argument("--autoencoder", type=Path, help="for b; a has the package's tiny")
    parser.add_argument("--out", type=Path, help="the package's own folder unless told otherwise")
    parser.add_argument("--work", type=Path, help="for checkpoint and log")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if args.autoencoder is None and args.model != "a":
        parser.error("b has an autoencoder of its own: --autoencoder FOLDER")
    design = DESIGNS[args.model]
    if args.steps is not None:
        design = replace(design, recipe=replace(design.recipe, steps=args.steps), looks="")
    try:
        run(
            args.photos,
            args.autoencoder or TINY,
            args.out or WORLD / args.model,
            args.work or Path(f"{args.model}-training"),
            design,
            args.model,
        )
    except (LatentStoreError, OSError) as exc:
        _log.error("%s", exc)
        return getattr(exc, "exit_code", 1)
    return 0


def run(sources: list[Path], autoencoder: Path, out: Path, work: Path, design: Design, name: str) -> None:
    """Train on nine tenths of the photos, and write the pipeline with what it does on the last tenth.

    Raises
    ------
    UsageError
        No step, a wrong path, photos without captions, too few of them, or a checkpoint of another run.
    ImageError
        One of the photos is damaged.
    """
    recipe = design.recipe
    if recipe.steps < 1:
        raise UsageError(f"--steps is {recipe.steps}; training takes at least 1.")
    if not (autoencoder / "config.json").exists():
        raise UsageError(f"No autoencoder lies in {autoencoder}: name the folder that its training wrote.")
    names, photos, others, held = split(sources)
    words = read_words(sources)
    missing = [n for n in (*names, *others) if n not in words]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(names) + len(others)} photos have no class in SOURCES.csv, {missing[0]} "
            "for one: add them to it, or take them away."
        )
    learned, withheld = ([words[n] for n in part] for part in (names, others))
    captions = [design.template.format(w) for w in learned]
    tokens = tokenizer(captions)
    vae = AutoencoderTiny.from_pretrained(autoencoder, torch_dtype=torch.float32)
    vae.eval().requires_grad_(False)
    trainer = Trainer(design, recipe, prepare(vae, photos, captions, tokens), len(tokens))
    train_and_log(trainer, work)
    theirs = prepare(vae, held, [design.template.format(w) for w in withheld], tokens)
    unet, text = trainer.averaged()
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text,
        tokenizer=tokens,
        unet=unet,
        scheduler=schedule(design),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    _tidy(out)
    made = json.loads((autoencoder / "card.json").read_text(encoding="utf-8"))
    own = autoencoder == TINY
    steps = f" --steps {recipe.steps}" if recipe.steps != DESIGNS.get(name, design).recipe.steps else ""
    facts = {
        "name": name,
        "autoencoder": "`tiny`" if own else "another one",
        "autoencoder_psnr_held_out_db": made["psnr_held_out_db"],
        "autoencoder_command": made["command"],
        "autoencoder_recipe": made["recipe"],
        "recipe": asdict(recipe),
        "command": f"OMP_NUM_THREADS=1 python -m latentstore.training.diffusion {name} PHOTOS{steps}"
        + ("" if own else " --autoencoder FOLDER"),
    }
    write_card(out, trainer, Unseen(others, held, withheld, theirs, read_licences(sources)), learned, facts)
    _log.info("%s", (out / "README.md").read_text(encoding="utf-8"))


def _tidy(out: Path) -> None:
    """Take away what depends on where a pipeline was made: paths, and who may read its files."""
    for path in out.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors lets nobody else read what it writes


if __name__ == "__main__":
    sys.exit(main())
