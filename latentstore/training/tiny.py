"""Train the built-in ``tiny`` encoder: an ``AutoencoderTiny`` with latents of 4 x 32 x 32, from scratch.

    OMP_NUM_THREADS=1 python -m latentstore.training.tiny PHOTOS [PHOTOS …] [--out FOLDER] [--work FOLDER]

``--network deep`` trains another one (16 x 16 x 16) for the miniature world's second diffusion model.

``PHOTOS`` are folders or tar files of photographs. One in ten, by hash of the file name, is held out for
the figures in the card. ``--work`` keeps a checkpoint and a log: the same command goes on where it stopped.
Writes the model in the form of diffusers, ``card.json`` with its figures and the card ``README.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F  # noqa: N812

from latentstore.errors import LatentStoreError, UsageError
from latentstore.training.fit_patch import SIZE, held_out, read_photos
from latentstore.training.loop import Run, Schedule, train_and_log
from latentstore.training.tiny_card import write_card

Photos = npt.NDArray[np.uint8]
TINY = Path(__file__).parent.parent / "data" / "tiny"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe(Schedule):
    """What the weights depend on, beside the photos.

    Attributes
    ----------
    steps, rate, warm_up, fall, clip, average, seed
        See :class:`Schedule`.
    batch, crop : int
        ``batch`` crops of ``crop`` x ``crop`` pixels a step.
    noise : float
        Standard deviation of the noise that is added to latents in training, where their mean square is held
        near 1: no detail of a picture hangs on less, so half precision or another small change costs none.
    gauge : float
        Weight of what draws the latents' mean to 0 and their mean square to 1. A decoder can undo any scale,
        so this costs next to nothing.
    """

    steps: int = 14_000
    clip: float = 0.1
    batch: int = 8
    crop: int = 64
    noise: float = 0.03
    gauge: float = 1e-2


@dataclass(frozen=True)
class Network:
    """An autoencoder that can be trained here.

    Attributes
    ----------
    recipe : Recipe
        What it is trained by unless told otherwise.
    channels : int
        Of the latents.
    widths : (int, int)
        Channels of the encoder's and the decoder's layers.
    encoder_blocks, decoder_blocks : tuple of int
        Residual blocks a resolution, from full resolution to latents and back; none where there are most
        pixels (the first two, the last two).
    """

    recipe: Recipe = field(default_factory=Recipe)
    channels: int = 4
    widths: tuple[int, int] = (48, 64)
    encoder_blocks: tuple[int, ...] = (0, 0, 1, 4)
    decoder_blocks: tuple[int, ...] = (6, 2, 0, 0)


NETWORKS = {
    "tiny": Network(),
    # As many numbers, arranged otherwise: the autoencoder of the miniature world's model B.
    "deep": Network(
        recipe=Recipe(steps=7_000, batch=4, crop=96, seed=1),
        channels=16,
        encoder_blocks=(0, 0, 1, 1, 4),
        decoder_blocks=(5, 2, 1, 0, 0),
    ),
}


def build(seed: int = 0, network: Network | None = None) -> AutoencoderTiny:
    """Return the untrained network, :data:`NETWORKS`' ``tiny`` unless another is given.

    ``AutoencoderTiny`` begins and ends with convolutions at full resolution. They are set to rearrange and
    not trained: the encoder's first gathers each pixel and its right, lower and diagonal neighbours into
    4 x 3 channels, its second takes every other row and column of that, so that the third sees 6 x 6
    pixels; the decoder's last but one passes its channels through. :func:`encode` and :func:`decode` leave
    them out, at the same result: training costs less than half.
    """
    network = network or NETWORKS["tiny"]
    encoder_width, decoder_width = network.widths
    torch.manual_seed(seed)
    model = AutoencoderTiny(
        encoder_block_out_channels=(encoder_width,) * len(network.encoder_blocks),
        decoder_block_out_channels=(decoder_width,) * len(network.decoder_blocks),
        num_encoder_blocks=network.encoder_blocks,
        num_decoder_blocks=network.decoder_blocks,
        latent_channels=network.channels,
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


class Trainer(Run):
    """A training run.

    Attributes
    ----------
    model : AutoencoderTiny
        With the weights of this step.
    """

    recipe: Recipe

    def __init__(self, recipe: Recipe, photos: Photos, network: Network | None = None) -> None:
        self.photos, self.network = photos, network
        self.model = build(recipe.seed, network)
        learned = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        super().__init__(recipe, learned, hashlib.sha256(photos[:, ::16, ::16].tobytes()).hexdigest())

    def loss(self) -> tuple[torch.Tensor, float]:
        """Return the loss, and the mean squared error of pixels in [-1, 1]."""
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
        return error + recipe.gauge * gauge, float(error.detach())

    def said_of(self, errors: Sequence[float]) -> dict[str, float]:
        """Return the peak signal-to-noise ratio of the crops."""
        return {"psnr_of_crops_db": round(10 * float(np.log10(4 / np.mean(errors))), 2)}

    def averaged(self) -> AutoencoderTiny:
        """Return the network with the running mean of the weights, in half precision."""
        model = build(self.recipe.seed, self.network)
        model.load_state_dict(self.mean, strict=False)
        return model.half().eval().requires_grad_(False)


def main() -> int:
    """Train, write, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", nargs="+", type=Path, help="folders or tar files of photographs")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="tiny")
    parser.add_argument("--out", type=Path, help="the package's own folder of `tiny`, unless told otherwise")
    parser.add_argument("--work", type=Path, default=Path("tiny-training"), help="for checkpoint and log")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    if args.out is None and args.network != "tiny":
        parser.error(f"--network {args.network} wants a folder: --out FOLDER")
    recipe = NETWORKS[args.network].recipe
    if args.steps is not None:
        recipe = replace(recipe, steps=args.steps)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(args.photos, args.out or TINY, args.work, recipe, args.network)
    except (LatentStoreError, OSError) as exc:
        _log.error("%s", exc)
        return getattr(exc, "exit_code", 1)
    return 0


def split(sources: Sequence[Path]) -> tuple[list[str], Photos, list[str], Photos]:
    """Read photos and hold one in ten out: names and (n, 256, 256, 3) pixels to learn from, then the others.

    Raises
    ------
    UsageError
        A wrong path, or too few photos.
    ImageError
        One of the photos is damaged.
    """
    for source in sources:
        if not source.exists():
            raise UsageError(f"There is no {source}: name a folder or a tar file with photographs.")
    learned: list[tuple[str, Photos]] = []
    kept: list[tuple[str, Photos]] = []
    for name, photo in read_photos(list(sources)):
        (kept if held_out(name) else learned).append((name, photo))
    if not learned or not kept:
        raise UsageError(
            f"{len(learned)} photos to learn from and {len(kept)} held out in "
            f"{', '.join(map(str, sources))}: each must be at least 1. Name a folder or a tar file with some "
            "hundreds of photographs."
        )
    every = [name for name, _ in (*learned, *kept)]
    if len(set(every)) < len(every):
        twice = next(name for name in every if every.count(name) > 1)
        raise UsageError(f"Two photos are called {twice}, and a name stands for one photo. Rename one.")
    (names, photos), (others, unseen) = (zip(*part, strict=True) for part in (learned, kept))
    return list(names), np.stack(photos), list(others), np.stack(unseen)


def run(sources: list[Path], out: Path, work: Path, recipe: Recipe, network: str = "tiny") -> None:
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
    _, photos, _, unseen = split(sources)
    trainer = Trainer(recipe, photos, NETWORKS[network])
    train_and_log(trainer, work)
    trainer.averaged().save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors lets nobody else read what it writes
    write_card(out, asdict(recipe), photos, unseen, network)
    _log.info("%s", (out / "card.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
