"""Measure the trained ``tiny`` encoder beside ``patch``, and write its model card."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderTiny

from latentstore.encoders import DiffusersEncoder, Encoder, PatchEncoder

Photos = npt.NDArray[np.uint8]
WEIGHTS = "diffusion_pytorch_model.safetensors"
PATCH = Path(__file__).parent.parent / "data" / "patch.safetensors"
_TIMED = 50

CARD = """\
# tiny

The built-in learned encoder: a diffusers `AutoencoderTiny`, 256 x 256 pixels to 4 x 32 x 32 latents, trained
from scratch (no pretrained network had a part in it) by `latentstore/training/tiny.py`.

| | tiny | patch |
|---|---|---|
| PSNR, {photos_held_out} held-out photos | {psnr_held_out_db} dB | {patch_psnr_held_out_db} dB |
| PSNR, a tenth of {photos_fitted} training photos | {psnr_fitted_db} dB | {patch_psnr_fitted_db} dB |
| encoding, one core of {processor} | {ms_an_image} ms an image | {patch_ms_an_image} ms |
| weights | {bytes:,} bytes (float16) | {patch_bytes:,} bytes |

PSNR is the mean over photos of 10 log10(255² / MSE), in RGB, of whole 256 x 256 pictures rounded to 8 bits.
`patch` is the best linear code of the same size. Latents have a mean of {latents_mean} and a standard
deviation of {latents_std}; `scaling_factor` in the configuration is {scaling_factor}.

- **For**: matching without a download, tests and demonstrations. A finer code is not a better one to search
  in: whether altered pictures are found more often than with `patch` depends on how they were altered
  (`benchmarks/tiny.py`).
- **Not for**: pictures to look at, or judging how well other autoencoders match. It has 48 times fewer
  numbers than pixels to work with and was trained on squared error alone: it keeps shapes and colours, and
  blurs texture and small writing. It has seen {photos_fitted} photos of clothes, groceries and objects.
- **Command**: `{command}` ({steps} steps, seed {seed})
- **Data**: {data}. One photo in ten, by hash of its file name, was held out.

Caltech-101 (Li, Andreeto, Ranzato and Perona, CaltechDATA, https://doi.org/10.22002/D1.20086) is used under
the Creative Commons Attribution 4.0 licence, https://creativecommons.org/licenses/by/4.0/. Its photos were
resized to 256 x 256 pixels. None of the photos lies beside these weights.
"""


def write_card(out: Path, recipe: dict[str, Any], learned: Photos, kept: Photos, network: str) -> None:
    """Measure the model in ``out``, note its latents' scale there, and write ``card.json``.

    ``tiny`` gets a ``README.md``, too.

    Parameters
    ----------
    out : Path
        With ``config.json`` and the weights; its ``scaling_factor`` is set to 1 over the latents' deviation.
    recipe : dict
        Of the training, for the card.
    learned, kept : (n, 256, 256, 3) uint8 arrays
        The photos of the training, of which every tenth is measured, and those that were held out.
    network : str
        Its name.
    """
    encoder = DiffusersEncoder(str(out), device="cpu")
    latents = encode_all(encoder, learned[::10])
    scaling = float(f"{1 / latents.std(dtype=np.float64):.4g}")
    config = json.loads((out / "config.json").read_text(encoding="utf-8")) | {"scaling_factor": scaling}
    config.pop("block_out_channels", None)  # diffusers writes it, and warns of it when it reads it
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model = AutoencoderTiny.from_pretrained(out, torch_dtype=torch.float32).eval().requires_grad_(False)
    patch = PatchEncoder()
    shape = " x ".join(map(str, encoder.space.latent_shape))
    by_channel = latents.reshape(len(latents), encoder.space.latent_shape[0], -1)
    card: dict[str, Any] = {
        "name": network,
        "what": f"AutoencoderTiny, 256 x 256 pixels to {shape} numbers, trained from scratch",
        "for": "matching without a download; it was trained on squared error and some thousand photos",
        "photos_fitted": len(learned),
        "photos_held_out": len(kept),
        "psnr_held_out_db": round(psnr(lambda x: through_tiny(model, x), kept), 2),
        "psnr_fitted_db": round(psnr(lambda x: through_tiny(model, x), learned[::10]), 2),
        "patch_psnr_held_out_db": round(psnr(lambda x: through_patch(patch, x), kept), 2),
        "patch_psnr_fitted_db": round(psnr(lambda x: through_patch(patch, x), learned[::10]), 2),
        "ms_an_image": round(milliseconds(encoder, kept), 1),
        "patch_ms_an_image": round(milliseconds(patch, kept), 1),
        "processor": processor(),
        "bytes": (out / WEIGHTS).stat().st_size,
        "patch_bytes": PATCH.stat().st_size,
        "latents_mean": round(float(latents.mean(dtype=np.float64)), 3),
        "latents_std": round(float(latents.std(dtype=np.float64)), 3),
        "latents_std_by_channel": [round(float(s), 3) for s in by_channel.std((0, 2))],
        "scaling_factor": scaling,
        "weights_sha256": hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest(),
        "recipe": recipe,
        "data": f"{len(learned) + len(kept):,} photographs from GitHub mirrors of clothing-dataset-small "
        "(CC0-1.0), GroceryStoreDataset (MIT) and Caltech-101 (CC-BY-4.0, CaltechDATA D1.20086)",
        "command": "OMP_NUM_THREADS=1 python -m latentstore.training.tiny PHOTOS"
        + ("" if network == "tiny" else f" --network {network} --out FOLDER"),
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    if network != "tiny":
        return
    text = CARD.format(**card, steps=recipe["steps"], seed=recipe["seed"])
    (out / "README.md").write_text(text, encoding="utf-8")


def psnr(through: Callable[[Photos], npt.NDArray[np.floating[Any]]], photos: Photos) -> float:
    """Return the mean over photos of the PSNR in dB, of 8-bit RGB pictures.

    Parameters
    ----------
    through : callable
        Encodes and decodes (1, 256, 256, 3) pixels, to numbers in [-1, 1].
    photos : (n, 256, 256, 3) uint8 array
    """
    values = []
    for photo in photos:
        back = np.rint((through(photo[None])[0] + 1) * 127.5).clip(0, 255)
        error = np.mean((back - photo) ** 2, dtype=np.float64)
        values.append(10 * np.log10(255**2 / max(error, 1e-12)))
    return float(np.mean(values))


def through_tiny(model: AutoencoderTiny, pixels: Photos) -> npt.NDArray[np.float32]:
    """Encode and decode (b, h, w, 3) pixels with the network as it was stored, to numbers near [-1, 1]."""
    with torch.inference_mode():
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        back: npt.NDArray[np.float32] = (
            model.decode(model.encode(x).latents).sample.permute(0, 2, 3, 1).numpy()
        )
    return back


def through_patch(encoder: PatchEncoder, pixels: Photos) -> npt.NDArray[np.float32]:
    """Encode and decode (b, h, w, 3) pixels with the linear code."""
    return encoder.decode(encoder.encode(pixels, np.zeros(len(pixels), np.int64)))


def encode_all(encoder: Encoder, photos: Photos) -> npt.NDArray[np.float32]:
    """Return (n, dim) latents, encoded one by one."""
    return np.concatenate([encoder.encode(photo[None], np.zeros(1, np.int64)) for photo in photos])


def milliseconds(encoder: Encoder, photos: Photos) -> float:
    """Return the median processor time of encoding one picture on one thread, from pixels to latents."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for photo in photos[:_TIMED]:
        began = time.process_time()
        encoder.encode(photo[None], np.zeros(1, np.int64))
        times.append(time.process_time() - began)
    torch.set_num_threads(threads)
    return 1000 * float(np.median(times))


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
