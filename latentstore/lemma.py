"""Lemma 1 on a diffusion model of diffusers: the one-step identity, and what it leaves out.

Noising, z_t = √ᾱ z₀ + √(1−ᾱ) ε, and one denoising step, ẑ₀ = (z_t − √(1−ᾱ) ε_θ)/√ᾱ, give
ẑ₀ − z₀ = √(1−ᾱ)/√ᾱ · (ε − ε_θ) whatever the network says: algebra, and no statement about translations.
The lemma takes ẑ₀ for E(g). A real translation is sampled in many steps, decoded to a picture of 8 bits and
encoded again; both are measured here against the same ẑ₀.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from latentstore.encoders import PatchEncoder
from latentstore.encoders.base import Pictures, to_unit
from latentstore.encoders.checkpoints import raw_output

EPS64 = float(np.finfo(np.float64).eps)
Denoise = Callable[[Any, int], Any]
"""(z_t (b, C, h, w) float64, t) → the network's output, of that shape and dtype."""

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
"""Stable Diffusion's noise schedule, as arguments of diffusers' schedulers."""


@dataclass(frozen=True, eq=False)
class Diffuser:
    """A denoiser with its noise schedule.

    Attributes
    ----------
    name : str
    denoise : callable
        (z_t, t) → what the network predicts.
    schedule : mapping
        Arguments of diffusers' schedulers: betas and ``prediction_type``.
    """

    name: str
    denoise: Denoise
    schedule: Mapping[str, Any] = field(default_factory=lambda: dict(SCHEDULE))

    def scheduler(self, kind: str = "DDIMScheduler", *, clip: bool = False, **changes: Any) -> Any:
        """Return a scheduler of diffusers in float64, so that an identity can hold to float64's rounding.

        Timesteps are spaced from the end ("trailing"): any number of steps begins at the same t. Clipping is
        diffusers' default, and no part of the lemma.
        """
        import diffusers

        settings = {**self.schedule, "timestep_spacing": "trailing", "clip_sample": clip, **changes}
        scheduler = getattr(diffusers, kind)(**settings)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.set_timesteps(int(self.schedule["num_train_timesteps"]))
        return scheduler

    def noise(self, output: Any, z_t: Any, alpha_bar: Any) -> Any:
        """Return ε_θ of what the network predicts."""
        kind = self.schedule["prediction_type"]
        if kind == "epsilon":
            return output
        if kind == "v_prediction":
            return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * z_t
        return (z_t - alpha_bar.sqrt() * output) / (1 - alpha_bar).sqrt()


@dataclass(frozen=True)
class OneStep:
    """Lemma 1 at one timestep. Deviations are ‖(ẑ₀ − z₀) − right side‖/‖right side‖.

    Attributes
    ----------
    t, alpha_bar, factor : int, float, float
        Timestep, ᾱ_t, and √(1−ᾱ)/√ᾱ.
    noise_error : float
        ‖ε − ε_θ‖/‖ε‖, which the proof of Theorem 1 takes as 0.
    moved : float
        ‖ẑ₀ − z₀‖/‖z₀ − mean‖, the mean over the pictures.
    identity, ddim, ddpm : float
        Deviation with ẑ₀ by the formula, and by the two schedulers' ``pred_original_sample``.
    rounding : float
        The deviation that one float64 rounding of z_t and ε_θ makes.
    clipped, misread : float
        Where it fails: ẑ₀ clipped to ±1; and a network that predicts v taken for one that predicts ε.
    """

    t: int
    alpha_bar: float
    factor: float
    noise_error: float
    moved: float
    identity: float
    ddim: float
    ddpm: float
    rounding: float
    clipped: float
    misread: float


def one_step(diffuser: Diffuser, z0: Any, noise: Any, t: int) -> OneStep:
    """Check Lemma 1 at a timestep.

    Parameters
    ----------
    diffuser : Diffuser
    z0, noise : (b, C, h, w) float64 tensors
    t : int
    """
    import torch

    alpha_bar = diffuser.scheduler().alphas_cumprod[t]
    z_t = add_noise(diffuser, z0, noise, t)
    output = diffuser.denoise(z_t, t)
    seen = diffuser.noise(output, z_t, alpha_bar)
    estimate = (z_t - (1 - alpha_bar).sqrt() * seen) / alpha_bar.sqrt()
    factor = ((1 - alpha_bar) / alpha_bar).sqrt()
    right = factor * (noise - seen)

    def deviation(estimated: Any) -> float:
        return _norm(estimated - z0 - right) / _norm(right)

    def predicted(kind: str = "DDIMScheduler", **changes: Any) -> Any:
        # DDPM's own step draws noise as well, which its estimate does not depend on.
        drawn = {"generator": torch.Generator(z_t.device).manual_seed(0)} if kind == "DDPMScheduler" else {}
        scheduler = diffuser.scheduler(kind, **changes)
        return scheduler.step(output, t, z_t, **drawn).pred_original_sample

    taken_for = "epsilon" if diffuser.schedule["prediction_type"] == "v_prediction" else "v_prediction"
    terms = _norm(z_t) + float((1 - alpha_bar).sqrt()) * _norm(seen)
    return OneStep(
        t=t,
        alpha_bar=float(alpha_bar),
        factor=float(factor),
        noise_error=_norm(noise - seen) / _norm(noise),
        moved=_norm(estimate - z0) / _norm(z0 - z0.mean(dim=0)),
        identity=deviation(estimate),
        ddim=deviation(predicted()),
        ddpm=deviation(predicted("DDPMScheduler")),
        rounding=EPS64 * terms / float(alpha_bar.sqrt()) / _norm(right),
        clipped=deviation(predicted(clip=True)),
        misread=deviation(predicted(prediction_type=taken_for)),
    )


def add_noise(diffuser: Diffuser, z0: Any, noise: Any, t: int) -> Any:
    """Return z_t = √ᾱ z₀ + √(1−ᾱ) ε, as diffusers computes it."""
    import torch

    return diffuser.scheduler().add_noise(z0, noise, torch.full((len(z0),), t, device=z0.device))


def start(diffuser: Diffuser, strength: float) -> int:
    """Return the timestep at which image-to-image sampling of that strength begins."""
    return round(int(diffuser.schedule["num_train_timesteps"]) * strength) - 1


def estimate(diffuser: Diffuser, z_t: Any, t: int) -> Any:
    """Return ẑ₀, the one-step estimate that Lemma 1 takes for the translation."""
    output = diffuser.denoise(z_t, t)
    return diffuser.scheduler().step(output, t, z_t).pred_original_sample


def sample(diffuser: Diffuser, z_t: Any, strength: float, steps: int) -> Any:
    """Denoise as image-to-image does: the last ``strength`` of ``steps`` DDIM steps, without fresh noise."""
    scheduler = diffuser.scheduler()
    scheduler.set_timesteps(steps)
    z = z_t
    for t in scheduler.timesteps[steps - round(steps * strength) :].tolist():
        z = scheduler.step(diffuser.denoise(z, t), t, z).prev_sample
    return z


def distance(a: Any, b: Any, scale: Any) -> float:
    """Return ‖a − b‖/‖scale‖ over all pictures."""
    return _norm(a - b) / _norm(scale)


# --- codes: pictures to latents and back -------------------------------------------------------------------


class Code(Protocol):
    """An autoencoder between pictures of 8 bits and latents as a diffusion model sees them."""

    name: str

    def encode(self, pictures: Pictures) -> Any:
        """Return (b, C, h, w) float64 latents of (b, size, size, 3) pictures, scaled for the denoiser."""
        ...

    def decode(self, z: Any) -> Pictures:
        """Return the pictures of latents, rounded and cut to 8 bits as a file holds them."""
        ...


class PatchCode:
    """The built-in patch code, fitted on photographs, scaled to mean 0 and deviation 1 on given pictures."""

    name = "patch code"

    def __init__(self, pictures: Pictures) -> None:
        self._encoder = PatchEncoder(pictures.shape[1])
        raw = self._raw(pictures)
        self._shift, self._scale = float(raw.mean()), float(raw.std())

    def encode(self, pictures: Pictures) -> Any:
        """Return latents; see :class:`Code`."""
        import torch

        return torch.from_numpy((self._raw(pictures) - self._shift) / self._scale)

    def decode(self, z: Any) -> Pictures:
        """Return pictures; see :class:`Code`."""
        raw = z.cpu().numpy() * self._scale + self._shift
        return to_8_bits(self._encoder.decode(raw.reshape(len(raw), -1)))

    def _raw(self, pictures: Pictures) -> Any:
        latents = self._encoder.encode(pictures, np.full(len(pictures), -1))
        return latents.reshape(-1, *self._encoder.space.latent_shape).astype(np.float64)


class VaeCode:
    """An autoencoder of diffusers, with the shift and scale that its pipeline applies.

    Parameters
    ----------
    name : str
    vae : torch.nn.Module
    pictures : array, optional
        Where the shift and scale are taken from; without, the model's own ``shift_factor`` and
        ``scaling_factor`` are.
    """

    def __init__(self, name: str, vae: Any, pictures: Pictures | None = None) -> None:
        self.name, self._vae = name, vae
        config = vae.config
        self._shift = float(config.get("shift_factor") or 0.0)
        self._scale = 1.0 / float(config.get("scaling_factor") or 1.0)
        if pictures is not None:
            raw = self._raw(pictures)
            self._shift, self._scale = float(raw.mean()), float(raw.std())

    def encode(self, pictures: Pictures) -> Any:
        """Return latents; see :class:`Code`."""
        return (self._raw(pictures) - self._shift) / self._scale

    def decode(self, z: Any) -> Pictures:
        """Return pictures; see :class:`Code`."""
        import torch

        with torch.inference_mode():
            decoded = self._vae.decode((z * self._scale + self._shift).to(self._vae.dtype)).sample
        return to_8_bits(decoded.float().permute(0, 2, 3, 1).cpu().numpy())

    def _raw(self, pictures: Pictures) -> Any:
        import torch

        x = torch.from_numpy(to_unit(pictures)).permute(0, 3, 1, 2).to(self._vae.device, self._vae.dtype)
        with torch.inference_mode():
            return raw_output(self._vae.encode(x))[0].double()


def to_8_bits(unit: np.ndarray) -> Pictures:
    """Round pictures in [-1, 1] to 0…255; what lies outside is cut."""
    return np.clip(np.rint((np.asarray(unit, np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)


def _norm(x: Any) -> float:
    return float(x.norm())
