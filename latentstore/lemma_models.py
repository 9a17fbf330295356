"""Diffusion models to check Lemma 1 on: small ones from a configuration, an exact one, a local pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentstore.encoders.base import Pictures
from latentstore.encoders.checkpoints import first_line, load_autoencoder
from latentstore.errors import UsageError
from latentstore.lemma import SCHEDULE, Denoise, Diffuser, VaeCode

TOKENS = 77
"""Length of a text condition of Stable Diffusion."""
_KEYS = (*SCHEDULE, "trained_betas", "rescale_betas_zero_snr")


def small_unet(seed: int = 0) -> Diffuser:
    """Return a text-conditional UNet of some 50,000 weights, built from a configuration and not trained."""
    from diffusers import UNet2DConditionModel

    unet = _seeded(
        seed,
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
    )
    return Diffuser("small UNet, untrained", _network(unet))


def small_vae(pictures: Pictures, seed: int = 0) -> VaeCode:
    """Return an AutoencoderKL with 4 channels at 1/8 of the size, built from a configuration, not trained."""
    from diffusers import AutoencoderKL

    vae = _seeded(
        seed,
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            layers_per_block=1,
        ),
    )
    return VaeCode("small AutoencoderKL, untrained", vae, pictures)


def ideal_gaussian() -> Diffuser:
    """Return the exact denoiser of latents drawn from N(0, I): E[ε | z_t] = √(1−ᾱ) z_t.

    No network can do better on such latents; every other gap is of training, this one is of the lemma. DDIM
    in many steps leaves z_t as it is (its marginals are N(0, I) at every t), the one-step estimate is √ᾱ z_t.
    """
    alpha_bar = Diffuser("", lambda z, t: z).scheduler().alphas_cumprod
    return Diffuser("exact denoiser", lambda z, t: (1 - alpha_bar[t]).sqrt() * z)


def load_pipeline(folder: Path, device: Any = "cpu") -> tuple[Diffuser, VaeCode]:
    """Load the subfolders ``unet``, ``scheduler`` and ``vae`` of a pipeline, in float32.

    The text condition is zeros: the lemma holds for any, and no text encoder is read.

    Raises
    ------
    UsageError
        A part is missing or damaged, or is of a kind that the lemma does not speak about.
    EncoderError
        The autoencoder cannot be loaded.
    """
    import diffusers
    import torch

    schedule = _schedule(folder)
    config = _json(folder / "unet" / "config.json")
    kind = config.get("_class_name")
    if kind not in ("UNet2DConditionModel", "UNet2DModel"):
        raise UsageError(
            f"{folder / 'unet'} holds a {kind or 'model of unknown class'}; Lemma 1 is checked on a "
            "UNet2DConditionModel or UNet2DModel. Name the folder of such a pipeline."
        )
    if config.get("addition_embed_type") or config.get("encoder_hid_dim_type"):
        raise UsageError(
            f"The UNet in {folder} needs more than a text condition (addition_embed_type "
            f"{config.get('addition_embed_type')!r}, encoder_hid_dim_type "
            f"{config.get('encoder_hid_dim_type')!r}), which is not read here. Use a pipeline like Stable "
            "Diffusion 1 or 2."
        )
    try:
        unet, info = getattr(diffusers, kind).from_pretrained(
            folder,
            subfolder="unet",
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise UsageError(f"The {kind} in {folder} cannot be loaded: {first_line(exc)}") from exc
    if info["missing_keys"]:
        raise UsageError(
            f"The {kind} in {folder} lacks {len(info['missing_keys'])} of its weights "
            f"({min(info['missing_keys'])}, for one). Fetch the checkpoint again."
        )
    vae = load_autoencoder(str(folder), None)[0]
    channels = vae.config.get("latent_channels", vae.config.get("vq_embed_dim"))
    if unet.config.in_channels != channels:
        raise UsageError(
            f"The UNet in {folder} reads {unet.config.in_channels} channels, its autoencoder writes "
            f"{channels}: an inpainting or depth model, say. Name a plain image-to-image pipeline."
        )
    name = folder.name or str(folder)
    unet, vae = (torch.nn.Module.to(m.eval(), device) for m in (unet, vae))
    return Diffuser(f"UNet of {name}", _network(unet), schedule), VaeCode(f"VAE of {name}", vae)


def _schedule(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UsageError(
            f"There is no pipeline folder {folder} (looked in {Path.cwd()}). Name one that holds unet, vae "
            "and scheduler, as diffusers saves them."
        )
    config = _json(folder / "scheduler" / "scheduler_config.json")
    if "beta_start" not in config and config.get("trained_betas") is None:
        raise UsageError(
            f"The {config.get('_class_name', 'scheduler')} in {folder} has no betas, so no ᾱ: Lemma 1 is "
            "about z_t = √ᾱ z₀ + √(1−ᾱ) ε, and not about rectified flows, say. Use a pipeline like Stable "
            "Diffusion 1 or 2."
        )
    return SCHEDULE | {k: config[k] for k in _KEYS if config.get(k) is not None}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read ({exc.strerror or exc}). A pipeline folder holds unet, vae and "
            "scheduler, as diffusers saves them."
        ) from exc
    except ValueError as exc:
        raise UsageError(f"{path} is not valid JSON ({exc}).") from exc
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__}, not an object of settings.")
    return found


def _network(unet: Any) -> Denoise:
    """Return a UNet as a denoiser of float64 latents; it computes in its own dtype."""
    import torch

    width = unet.config.get("cross_attention_dim")
    size = width[0] if isinstance(width, (list, tuple)) else width
    condition = torch.zeros(1, TOKENS, size or 0, device=unet.device)

    def denoise(z: Any, t: int) -> Any:
        given = {} if size is None else {"encoder_hidden_states": condition.expand(len(z), -1, -1)}
        with torch.inference_mode():
            out = unet(z.to(unet.dtype), t, **given).sample
        # A network of a learned variance writes that into further channels.
        return out[:, : z.shape[1]].to(z.dtype)

    return denoise


def _seeded(seed: int, build: Callable[[], Any]) -> Any:
    """Build a network from a seed, and leave torch's own generator as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()
