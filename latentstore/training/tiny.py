"""Train the built-in ``tiny`` encoder: an ``AutoencoderTiny`` with latents of 4 x 32 x 32, from scratch.

    OMP_NUM_THREADS=1 python -m latentstore.training.tiny PHOTOS [PHOTOS …] [--out FOLDER] [--work FOLDER]

``PHOTOS`` are folders or tar files of photographs. One in ten, by hash of the file name, is held out for
the figures in the card. ``--work`` keeps a checkpoint and a log: the same command goes on where it stopped.
Writes the model in the form of diffusers, ``card.json`` with its figures and the card ``README.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F  # noqa: N812

from latentstore.errors import LatentStoreError, UsageError
from latentstore.training.fit_patch import SIZE, held_out, read_photos
from latentstore.training.tiny_card import write_card

Photos = npt.NDArray[np.uint8]
CHECKPOINT_EVERY = 500
"""Steps between checkpoints, and between lines of the log."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What the weights depend on, beside the photos.

    Attributes
    ----------
    steps, batch, crop : int
        Of training: ``batch`` crops of ``crop`` x ``crop`` pixels a step.
    rate : float
        Learning rate, reached in ``warm_up`` steps; flat, then a half cosine down to 0 over the last ``fall``
        of the steps. So ``steps`` may be changed on the way, until the fall begins.
    noise : float
        Standard deviation of the noise that is added to latents in training, where their mean square is held
        near 1: no detail of a picture hangs on less, so half precision or another small change costs none.
    gauge : float
        Weight of what draws the latents' mean to 0 and their mean square to 1. A decoder can undo any scale,
        so this costs next to nothing.
    clip : float
        Largest norm of a gradient.
    average : float
        Decay of the running mean of the weights, which is what is kept.
    seed : int
    """

    steps: int = 14_000
    batch: int = 8
    crop: int = 64
    rate: float = 1e-3
    warm_up: int = 500
    fall: float = 0.5
    noise: float = 0.03
    gauge: float = 1e-2
    clip: float = 0.1
    average: float = 0.999
    seed: int = 0

    @property
    def falls_at(self) -> int:
        """The step at which the learning rate begins to fall."""
        return round(self.steps * (1 - self.fall))

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        left = min(1.0, (self.steps - step) / (self.steps - self.falls_at))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * float(1 - np.cos(np.pi * left)) / 2


def build(seed: int = 0) -> AutoencoderTiny:
    """Return the untrained network.

    ``AutoencoderTiny`` begins and ends with convolutions at full resolution. They are set to rearrange and
    not trained: the encoder's first gathers each pixel and its right, lower and diagonal neighbours into
    4 x 3 channels, its second takes every other row and column of that, so that the third sees 6 x 6
    pixels; the decoder's last but one passes its channels through. :func:`encode` and :func:`decode` leave
    them out, at the same result: training costs less than half.
    """
    torch.manual_seed(seed)
    model = AutoencoderTiny(
        encoder_block_out_channels=(48,) * 4,
        decoder_block_out_channels=(64,) * 4,
        num_encoder_blocks=(0, 0, 1, 4),
        num_decoder_blocks=(6, 2, 0, 0),
    )
    gather, halve, first = model.encoder.layers[:3]
    through = model.decoder.layers[-2]
    with torch.no_grad():
        for fixed in (gather.weight, gather.bias, halve.weight, through.weight):
            fixed.zero_().requires_grad_(False)
        for k in range(12):  # the order of pixel_unshuffle: colour, row, column
            gather.weight[k, k // 4, 1 + k // 2 % 2, 1 + k % 2] = 1
            halve.weight[k, k, 1, 1] = 1
        first.weight[:, 12:] = 0
        first.weight[:, :12] *= (first.in_channels / 12) ** 0.5  # twelve give the variance that all would
        each = torch.arange(through.in_channels)
        through.weight[each, each, 1, 1] = 1
    return model.to(memory_format=torch.channels_last)


def encode(model: AutoencoderTiny, x: torch.Tensor) -> torch.Tensor:
    """Return ``model.encoder(x)`` for pictures (b, 3, h, w) in [-1, 1], without the layers that rearrange."""
    cells = F.pixel_unshuffle((x + 1) / 2, 2).contiguous(memory_format=torch.channels_last)
    first = model.encoder.layers[2]
    features: torch.Tensor = F.conv2d(cells, first.weight[:, :12], stride=2, padding=1)
    return model.encoder.layers[3:](features)


def decode(model: AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """Return ``model.decoder(latents)`` in [-1, 1]: its last convolution moved in front of the enlargement.

    A 3 x 3 convolution on pixels that were each repeated 2 x 2 is another one on the pixels themselves, with
    four times as many outputs: an even row's taps fall on (above, itself, itself), an odd row's on (itself,
    itself, below), and columns alike.
    """
    features = model.decoder.layers[:-3](torch.tanh(latents / 3) * 3)
    last = model.decoder.layers[-1]
    # (even or odd, above/itself/below, tap)
    falls = last.weight.new_tensor([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]])
    taps = torch.einsum("pay,qbx,ocyx->opqcab", falls, falls, last.weight)
    cells = F.conv2d(features, taps.flatten(0, 2), last.bias.repeat_interleave(4), padding=1)
    return F.pixel_shuffle(cells, 2) * 2 - 1


def crops(photos: Photos, recipe: Recipe, step: int) -> torch.Tensor:
    """Cut the crops of a step, which depend on (seed, step) alone: (batch, 3, crop, crop) in [-1, 1]."""
    rng = np.random.default_rng([recipe.seed, step])
    side = recipe.crop
    which = rng.integers(len(photos), size=recipe.batch)
    corners = rng.integers(SIZE - side + 1, size=(recipe.batch, 2))
    ways = rng.choice([1, -1], recipe.batch)  # as it is, or mirrored
    cut = [
        photos[i, y : y + side, x : x + side][:, ::way]
        for i, (y, x), way in zip(which, corners, ways, strict=True)
    ]
    return as_input(np.stack(cut))


def as_input(pixels: Photos) -> torch.Tensor:
    """Return (b, h, w, 3) pixels as (b, 3, h, w) in [-1, 1], channels last in memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class Trainer:
    """The state of a training run, all of it: what a checkpoint holds.

    Attributes
    ----------
    model : AutoencoderTiny
        With the weights of this step.
    step : int
        Steps that are done.
    """

    def __init__(self, recipe: Recipe, photos: Photos) -> None:
        self.recipe = recipe
        self.photos = photos
        self.step = 0
        self.model = build(recipe.seed)
        self._learned = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        self._mean = {k: p.detach().clone() for k, p in self._learned.items()}
        self._optimiser = torch.optim.AdamW(
            self._learned.values(), lr=recipe.rate, betas=(0.9, 0.99), fused=True
        )

    def advance(self) -> float:
        """Take one step, and return its mean squared error (of pixels in [-1, 1])."""
        recipe = self.recipe
        x = crops(self.photos, recipe, self.step)
        draws = torch.Generator().manual_seed((recipe.seed << 32) + self.step)
        # bfloat16: on processors with AMX, products take a quarter of the time. Weights stay in float32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = encode(self.model, x)
            noise = torch.randn(latents.shape, generator=draws) * recipe.noise
            back = decode(self.model, latents + noise)
        error = F.mse_loss(back.float(), x)
        latents = latents.float()
        gauge = latents.mean((0, 2, 3)).square().mean() + (latents.square().mean() - 1).square()
        (error + recipe.gauge * gauge).backward()
        torch.nn.utils.clip_grad_norm_(self._learned.values(), recipe.clip)
        self._optimiser.param_groups[0]["lr"] = recipe.rate_at(self.step)
        self._optimiser.step()
        self._optimiser.zero_grad()
        share = 1 - min(recipe.average, (1 + self.step) / (10 + self.step))
        now = [p.detach() for p in self._learned.values()]
        torch._foreach_lerp_(list(self._mean.values()), now, share)
        self.step += 1
        return float(error.detach())

    def averaged(self) -> AutoencoderTiny:
        """Return the network with the running mean of the weights, in half precision."""
        model = build(self.recipe.seed)
        model.load_state_dict(self._mean, strict=False)
        return model.half().eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "recipe": asdict(self.recipe),
            "photos": self._fingerprint(),
            "step": self.step,
            "model": self.model.state_dict(),
            "mean": self._mean,
            "optimiser": self._optimiser.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        UsageError
            It is of another recipe or of other photos, or was past the step at which a new number of steps
            lets the learning rate fall.
        """
        state = torch.load(path, weights_only=True)
        mine, then = asdict(self.recipe), dict(state["recipe"])
        late = state["step"] > min(self.recipe.falls_at, Recipe(**then).falls_at)
        if mine["steps"] != then["steps"] and not late:
            then["steps"] = mine["steps"]
        if (mine, self._fingerprint()) != (then, state["photos"]):
            raise UsageError(
                f"{path} is a checkpoint of another run, at step {state['step']}: recipe {then} with photos "
                f"{state['photos'][:8]}, here {mine} with {self._fingerprint()[:8]}. Name another --work, or "
                "delete it."
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self._mean = state["mean"]
        self._optimiser.load_state_dict(state["optimiser"])

    def _fingerprint(self) -> str:
        return hashlib.sha256(self.photos[:, ::16, ::16].tobytes()).hexdigest()


def train(trainer: Trainer, work: Path) -> Iterator[dict[str, Any]]:
    """Take the steps that the checkpoint in ``work`` has not, and yield a line of the log now and then."""
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    errors: list[float] = []
    began = time.process_time()
    while trainer.step < trainer.recipe.steps:
        errors.append(trainer.advance())
        if trainer.step % CHECKPOINT_EVERY and trainer.step < trainer.recipe.steps:
            continue
        trainer.save(checkpoint)
        spent = time.process_time() - began
        yield {
            "step": trainer.step,
            "psnr_of_crops_db": round(10 * float(np.log10(4 / np.mean(errors))), 2),
            "rate": round(trainer.recipe.rate_at(trainer.step), 6),
            "cpu_seconds": round(spent, 1),
        }
        errors, began = [], time.process_time()


def main() -> int:
    """Train, write, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", nargs="+", type=Path, help="folders or tar files of photographs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "data" / "tiny")
    parser.add_argument("--work", type=Path, default=Path("tiny-training"), help="for checkpoint and log")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(args.photos, args.out, args.work, Recipe(steps=args.steps))
    except (LatentStoreError, OSError) as exc:
        _log.error("%s", exc)
        return getattr(exc, "exit_code", 1)
    return 0


def run(sources: list[Path], out: Path, work: Path, recipe: Recipe) -> None:
    """Train on nine tenths of the photos, and write the model with what it does on the last tenth.

    Raises
    ------
    UsageError
        No step, a wrong path, too few photos, or a checkpoint of another run in ``work``.
    ImageError
        One of the photos is damaged.
    """
    if recipe.steps < 1:
        raise UsageError(f"--steps is {recipe.steps}; training takes at least 1.")
    for source in sources:
        if not source.exists():
            raise UsageError(f"There is no {source}: name a folder or a tar file with photographs.")
    learned: list[Photos] = []
    kept: list[Photos] = []
    for name, photo in read_photos(sources):
        (kept if held_out(name) else learned).append(photo)
    if not learned or not kept:
        raise UsageError(
            f"{len(learned)} photos to learn from and {len(kept)} held out in "
            f"{', '.join(map(str, sources))}: each must be at least 1. Name a folder or a tar file with some "
            "hundreds of photographs."
        )
    photos, unseen = np.stack(learned), np.stack(kept)
    trainer = Trainer(recipe, photos)
    work.mkdir(parents=True, exist_ok=True)
    with (work / "log.jsonl").open("a", encoding="utf-8") as log:
        for line in train(trainer, work):
            log.write(json.dumps(line) + "\n")
            log.flush()
            _log.info("%s", json.dumps(line))
    trainer.averaged().save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors lets nobody else read what it writes
    write_card(out, asdict(recipe), photos, unseen)
    _log.info("%s", (out / "card.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
