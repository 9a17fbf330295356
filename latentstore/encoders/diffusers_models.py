"""Image autoencoders of diffusers as encoders, at the speed of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from latentstore.encoders.base import Latents, Pictures, noise_key, row_noise, versions
from latentstore.encoders.checkpoints import (
    drop_decoder,
    first_line,
    hash_model,
    load_autoencoder,
    probe,
    raw_output,
)
from latentstore.encoders.devices import (
    DTYPES,
    Precision,
    Transfers,
    exact_kernels,
    pick_device,
    pick_precision,
)
from latentstore.errors import EncoderError, UsageError
from latentstore.schema import Posterior, Space

# Measured on two cores, more pictures in a call gain a CPU nothing, and each query is padded to a batch.
# A GPU needs some to be filled (its number is not measured yet); 28 divides the rows of every full shard.
CPU_BATCH, CUDA_BATCH = 1, 28


class DiffusersEncoder:
    """An image autoencoder of diffusers, by hub name or local folder: the paper's feature extractor.

    Raw latents, flattened as C x H x W; scaling and shift are recorded and not applied. Of a class with a
    posterior (``AutoencoderKL`` with any number of channels, ``AsymmetricAutoencoderKL``,
    ``ConsistencyDecoderVAE``) that is the mean, or a sample that is seeded per picture. The others are
    deterministic: ``AutoencoderTiny``, ``AutoencoderDC``, and ``VQModel`` (Kandinsky's MoVQ), whose latent is
    taken before the quantisation, as Kandinsky's own image-to-image does: rounding to the codebook
    would throw away what tells pictures apart. Only the encoder's half stays in memory.

    Parameters
    ----------
    name : str
        A folder with ``config.json`` (or ``vae/config.json``, ``movq/config.json``), or a hub name
        (``OWNER/NAME``).
    image_size : int
    posterior : {"mean", "sample"}
        For encoders with a posterior; those without one are ``deterministic``.
    seed : int
        Of the per-picture noise when sampling.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    revision : str, optional
        Of the hub repository.
    precision : {"auto", "fp32", "bf16", "fp16"}
        Of the arithmetic. It is provenance and no part of the space: the id is that of the checkpoint.
    compiled : bool
        Run the encoder through ``torch.compile``.
    batch : int, optional
        Pictures of one call. It is provenance too: last bits may depend on it.

    Attributes
    ----------
    model : torch.nn.Module
        The autoencoder without its decoder, on the device and in the precision of the run.
    upcast : int
        Pictures so far that overflowed the reduced precision, and were encoded in float32 (see Notes).
    notes : list of str
        What the user of this run should know.

    Raises
    ------
    EncoderError
        Not found, not an image autoencoder, without safetensors weights, or it cannot be compiled here.
    UsageError
        The device, precision or batch cannot be had.

    Notes
    -----
    A picture whose latent is not finite in a reduced precision is encoded again in float32, from the
    checkpoint's own weights, and only that picture's row is replaced. The choice therefore depends on the
    picture alone: not on its company in the batch, on what the run met before, on a resume or on the worker.
    A switch to float32 for the rest of the run would save the second try, and give other bytes after a kill.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int = 256,
        posterior: Posterior = "mean",
        seed: int = 0,
        device: str = "auto",
        revision: str | None = None,
        precision: Precision = "auto",
        compiled: bool = False,
        batch: int | None = None,
    ) -> None:
        import torch

        if batch is not None and batch < 1:
            raise UsageError(f"--batch is {batch}; a batch has at least 1 picture.")
        self.device = pick_device(device)
        chosen = pick_precision(precision, self.device)
        self.batch = batch or (CUDA_BATCH if self.device.type == "cuda" else CPU_BATCH)
        full, stated = load_autoencoder(name, revision)
        config = full.config
        weights = hash_model(full)
        drop_decoder(full)
        self._notes: list[str] = []
        if chosen == "fp16" and stated.get("force_upcast"):
            chosen = "fp32"
            self._notes.append(
                f"{name} says that it overflows float16 (force_upcast), so it runs in float32; bf16 is safe"
            )
        self._dtype = getattr(torch, DTYPES[chosen])
        shape, has_posterior = probe(full, name, image_size)
        self._seed = seed
        self._posterior: Posterior = posterior if has_posterior else "deterministic"
        self._full = torch.nn.Module.to(full, memory_format=torch.channels_last)
        reduced = self._dtype != torch.float32
        self.model = torch.nn.Module.to(
            copy.deepcopy(full) if reduced else full, device=self.device, dtype=self._dtype
        )
        self._transfers = Transfers(self.device)
        self.upcast = 0
        self.space = Space(
            encoder=type(full).__name__,
            weights=weights,
            image_size=image_size,
            latent_shape=shape,
            posterior=self._posterior,
            seed=seed if self._posterior == "sample" else None,
        )
        self.facts: dict[str, Any] = {
            "name": name,
            "revision": revision,
            "dtype": DTYPES[chosen],
            "batch": self.batch,
            "compiled": compiled,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "scaling_factor": config.get("scaling_factor"),
            "shift_factor": config.get("shift_factor"),
            **versions("torch", "diffusers", "numpy"),
        }
        if compiled:
            self._compile()

    @property
    def notes(self) -> list[str]:
        """What the user of this run should know: nothing, or a sentence each."""
        if not self.upcast:
            return list(self._notes)
        # No count: the notes of several workers are one when they say the same.
        return [
            *self._notes,
            f"pictures that overflowed {self.facts['dtype']} were encoded in float32 instead",
        ]

    def encode(self, images: Pictures, rows: npt.NDArray[np.int64]) -> Latents:
        """Return (b, dim) latents of (b, size, size, 3) pictures."""
        return self.submit(images, rows)()

    def submit(self, images: Pictures, rows: npt.NDArray[np.int64]) -> Callable[[], Latents]:
        """Start on a batch, and return what waits for its latents.

        On a GPU the next batch can be submitted while this one is under way. ``images`` must stay as they
        are until then.
        """
        del rows
        arriving = self._run(self.model, images)
        return lambda: self._finite(arriving(), images)

    def _run(self, model: Any, images: Pictures) -> Callable[[], Latents]:
        import torch

        try:
            with torch.inference_mode(), exact_kernels(self.device):
                return self._transfers.fetch(self._latents(model, images))
        except torch.cuda.OutOfMemoryError as exc:
            raise EncoderError(
                f"{len(images)} pictures of {self.space.image_size} pixels at once are too much for the "
                f"memory of {self.facts['device']}. Choose a smaller --batch."
            ) from exc

    def _latents(self, model: Any, images: Pictures) -> Any:
        """Return (b, dim) float32 latents on the device."""
        import torch

        x = self._transfers.upload(images)
        # Rows of pixels are already in the order of channels_last. Scaled in float32 in any precision.
        x = x.permute(0, 3, 1, 2).to(torch.float32).div(255).sub(0.5).div(0.5).to(model.dtype)
        latents, posterior = raw_output(model.encode(x))
        if self._posterior == "sample":
            # Anew in float32, with diffusers' own clamp of the log-variance; the noise is float32 as well,
            # so that a picture has the same in any precision.
            wide = type(posterior)(posterior.parameters.float())
            latents = wide.mean + wide.std * self._noise(images)
        return latents.flatten(1).float()

    def _noise(self, images: Pictures) -> Any:
        import torch

        noise = np.stack([row_noise(self._seed, noise_key(p), self.space.dim) for p in images])
        return torch.from_numpy(noise).reshape(-1, *self.space.latent_shape).to(self.device)

    def _finite(self, latents: Latents, images: Pictures) -> Latents:
        """Take from a run in float32 the rows that the reduced precision could not hold."""
        import torch

        bad = ~np.isfinite(latents).all(axis=1)
        if not bad.any() or self._dtype == torch.float32:
            return latents
        self._full = torch.nn.Module.to(self._full, self.device)
        # The whole batch, not those pictures alone: its shape is fixed, and may decide the last bits.
        latents[bad] = self._run(self._full, images)()[bad]
        mended = int(np.isfinite(latents[bad]).all(axis=1).sum())
        if mended:
            self.upcast += mended
            self.facts["upcast"] = True
        return latents

    def _compile(self) -> None:
        size = self.space.image_size
        self.model.encoder.compile(dynamic=False)
        try:
            self._run(self.model, np.zeros((self.batch, size, size, 3), np.uint8))()
        except RuntimeError as exc:
            raise EncoderError(
                f"torch.compile fails for {self.facts['name']} on this machine ({first_line(exc)}). "
                "Leave --compile out."
            ) from exc
