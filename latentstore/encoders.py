"""Encoders: square RGB pictures to flattened latents. ``patch`` is built in; the rest come from diffusers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from latentstore.errors import EncoderError, UsageError
from latentstore.schema import Posterior, Space, canonical_json

BUILT_IN = ("patch",)
DEFAULT = "patch"
_DATA = Path(__file__).parent / "data"
_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
# They do not change what the encoder computes.
_IGNORED_CONFIG = frozenset({"scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size"})


class Encoder(Protocol):
    """What encoding needs of an encoder.

    Attributes
    ----------
    space : Space
        Decides which latents may be compared.
    facts : dict
        For the provenance: name, scaling and shift (recorded, never applied), dtype, device, versions.
    batch : int
        The fixed number of pictures of one call; a smaller last batch is padded by the caller.
    """

    space: Space
    facts: dict[str, Any]
    batch: int

    def encode(self, images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return (b, dim) latents of (b, size, size, 3) pictures; ``rows`` of the store, or -1 for none."""
        ...


class PatchEncoder:
    """The best linear code of its size: PCA of 8 x 8 RGB patches to 4 numbers.

    At 256 x 256 pixels a latent is 4 x 32 x 32 = 4,096 numbers, like Stable Diffusion's. It is linear and
    learned no semantics: for trials, before any download.

    Parameters
    ----------
    image_size : int
        A multiple of 8 (64 gives 256-d latents).

    Notes
    -----
    Principal component analysis (Pearson 1901; Hotelling 1933): no other linear map of a patch to 4
    numbers and back has a smaller mean squared error on the photos it was fitted on. See
    ``latentstore/data/patch.json`` for the data and the PSNR on held-out photos.
    """

    batch = 64

    def __init__(self, image_size: int = 256) -> None:
        from safetensors.numpy import load

        if image_size < 8 or image_size % 8:
            raise UsageError(
                f"The patch encoder needs an image size that is a multiple of 8, not {image_size}."
            )
        raw = (_DATA / "patch.safetensors").read_bytes()
        weights = load(raw)
        self._mean: npt.NDArray[np.float32] = weights["mean"]
        self._components: npt.NDArray[np.float32] = weights["components"]
        side = image_size // 8
        self.space = Space(
            encoder="patch",
            weights=hashlib.sha256(self._mean.tobytes() + self._components.tobytes()).hexdigest(),
            image_size=image_size,
            latent_shape=(len(self._components), side, side),
        )
        self.facts: dict[str, Any] = {
            "name": "patch",
            "dtype": "float32",
            "device": "cpu",
            **_versions("numpy"),
        }

    def encode(self, images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return (b, dim) latents."""
        del rows
        channels, side, _ = self.space.latent_shape
        codes = np.matmul(patches(images) - self._mean, self._components.T, dtype=np.float32)
        return np.ascontiguousarray(
            codes.reshape(len(images), side * side, channels).transpose(0, 2, 1)
        ).reshape(len(images), -1)

    def decode(self, latents: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        """Return (b, size, size, 3) pictures in [-1, 1]: the least-squares reconstruction."""
        channels, side, _ = self.space.latent_shape
        codes = np.asarray(latents, np.float32).reshape(-1, channels, side * side).transpose(0, 2, 1)
        flat = codes @ self._components + self._mean
        grid = flat.reshape(-1, side, side, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
        return grid.reshape(-1, side * 8, side * 8, 3)


def patches(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Cut (b, size, size, 3) pictures into (b, (size/8)², 192) patches in [-1, 1], row by row."""
    b, size = images.shape[:2]
    side = size // 8
    grid = images.reshape(b, side, 8, side, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    return to_unit(grid.reshape(b, side * side, 192))


def to_unit(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Map 0…255 to [-1, 1] as ``ToTensor`` and ``Normalize([0.5], [0.5])`` do."""
    return (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


class DiffusersEncoder:
    """Any image autoencoder of diffusers, by hub name or local folder: the paper's feature extractor.

    Raw posterior mean (or a sample, seeded per picture), flattened as C x H x W; scaling and shift are
    recorded and not applied.

    Parameters
    ----------
    name : str
        A folder with ``config.json`` (or ``vae/config.json``), or a hub name (``OWNER/NAME``).
    image_size : int
    posterior : {"mean", "sample"}
        For encoders with a posterior; those without one are ``deterministic``.
    seed : int
        Of the per-picture noise when sampling.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    revision : str, optional
        Of the hub repository.

    Raises
    ------
    EncoderError
        Not found, not an image autoencoder, or without safetensors weights.
    """

    batch = 16

    def __init__(
        self,
        name: str,
        *,
        image_size: int = 256,
        posterior: Posterior = "mean",
        seed: int = 0,
        device: str = "auto",
        revision: str | None = None,
    ) -> None:
        import torch

        self.device = _device(device)
        self.model = _load_autoencoder(name, revision).eval().requires_grad_(False).to(self.device)
        self._seed = seed
        kind = type(self.model).__name__
        with torch.inference_mode():
            shape = tuple(
                self._run(torch.zeros(1, 3, image_size, image_size, device=self.device), None).shape[1:]
            )
        if len(shape) != 3:
            raise EncoderError(
                f"{name} gives latents of shape {shape}; an image autoencoder gives (C, H, W)."
            )
        has_posterior = kind == "AutoencoderKL"
        self._posterior: Posterior = posterior if has_posterior else "deterministic"
        self.space = Space(
            encoder=kind,
            weights=_hash_model(self.model),
            image_size=image_size,
            latent_shape=shape,
            posterior=self._posterior,
            seed=seed if self._posterior == "sample" else None,
        )
        config = self.model.config
        self.facts: dict[str, Any] = {
            "name": name,
            "revision": revision,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "scaling_factor": config.get("scaling_factor"),
            "shift_factor": config.get("shift_factor"),
            **_versions("torch", "diffusers", "numpy"),
        }

    def encode(self, images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return (b, dim) latents."""
        import torch

        del rows
        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            x = x.permute(0, 3, 1, 2).to(torch.float32).div(255).sub(0.5).div(0.5).to(self.model.dtype)
            latents = self._run(x, images)
            out: npt.NDArray[np.float32] = latents.flatten(1).float().cpu().numpy()
        return out

    def _run(self, x: Any, images: npt.NDArray[np.uint8] | None) -> Any:
        import torch

        out = self.model.encode(x)
        if not hasattr(out, "latent_dist"):
            return out.latents
        if images is None or self._posterior != "sample":
            return out.latent_dist.mode()
        noise = np.stack([row_noise(self._seed, noise_key(p), self.space.dim) for p in images])
        noise_t = torch.from_numpy(noise.reshape(len(images), *self.space.latent_shape)).to(x.device)
        return out.latent_dist.mean + out.latent_dist.std * noise_t.to(x.dtype)


def noise_key(picture: npt.NDArray[np.uint8]) -> int:
    """Return what seeds the posterior's noise of a picture: its pixels, so that no two pictures share noise.

    Row numbers would not do: a query in place 0 would carry the noise of the collection's row 0, and find it.
    """
    return int.from_bytes(hashlib.sha256(picture.tobytes()).digest()[:7], "big")


def row_noise(seed: int, row: int, dim: int, *, stream: int = 0) -> npt.NDArray[np.float32]:
    """Return the (dim,) standard normal noise of one row: the same in any batch, order or process.

    Other seeds, rows and streams give independent noise.
    """
    return np.random.default_rng([seed, row, stream]).standard_normal(dim, dtype=np.float32)


def load_encoder(
    name: str = DEFAULT,
    *,
    image_size: int = 256,
    posterior: Posterior = "mean",
    seed: int = 0,
    device: str = "auto",
    revision: str | None = None,
) -> Encoder:
    """Return an encoder by name: a built-in one, a local folder, or a hub name.

    Raises
    ------
    EncoderError
    """
    if name in BUILT_IN:
        return PatchEncoder(image_size)
    if not (Path(name).exists() or _looks_like_hub_name(name)):
        raise EncoderError(
            f"There is no encoder {name!r}: it is not built in ({', '.join(BUILT_IN)}), no folder of that "
            f"name is in {Path.cwd()}, and it is no hub name (OWNER/NAME, for example "
            "stabilityai/stable-diffusion-2)."
        )
    return DiffusersEncoder(
        name, image_size=image_size, posterior=posterior, seed=seed, device=device, revision=revision
    )


def load_for(space: Space, facts: Mapping[str, Any], *, device: str = "auto") -> Encoder:
    """Load the encoder that a store was made with.

    Raises
    ------
    EncoderError
        It cannot be found any more, or its weights have changed since.
    """
    encoder = load_encoder(
        str(facts["name"]),
        image_size=space.image_size,
        posterior=space.posterior,
        seed=space.seed or 0,
        device=device,
        revision=facts.get("revision"),
    )
    if encoder.space.id != space.id:
        raise EncoderError(
            f"Encoder {facts['name']!r} is now space {encoder.space.id}, but the store was made in space "
            f"{space.id}: its weights or settings have changed. Use the weights of then, or encode again."
        )
    return encoder


def _looks_like_hub_name(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))


def _load_autoencoder(name: str, revision: str | None) -> Any:
    import diffusers

    subfolder, config = _find_config(name, revision)
    kind = config.get("_class_name") if isinstance(config, Mapping) else None
    if kind not in _CLASSES:
        raise EncoderError(
            f"{name} holds a {kind or 'model of unknown class'}; latentstore encodes with "
            f"{' or '.join(_CLASSES)}. Name the folder or hub repository of the autoencoder (VAE)."
        )
    try:
        # use_safetensors: a pickled checkpoint could run code.
        model, info = getattr(diffusers, kind).from_pretrained(
            name, subfolder=subfolder, revision=revision, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise EncoderError(f"The {kind} in {name} cannot be loaded: {_first_line(exc)}") from exc
    if info["missing_keys"]:
        # diffusers would fill them with random numbers.
        raise EncoderError(
            f"The {kind} in {name} lacks {len(info['missing_keys'])} of its weights "
            f"({min(info['missing_keys'])}, for one). Fetch the checkpoint again."
        )
    return model


def _find_config(name: str, revision: str | None) -> tuple[str | None, Mapping[str, Any]]:
    """Find the autoencoder's configuration at the top, or in ``vae/`` of a pipeline."""
    folder = Path(name)
    if folder.exists():
        for subfolder in (None, "vae"):
            path = folder / (subfolder or "") / "config.json"
            if path.is_file():
                try:
                    return subfolder, json.loads(path.read_text(encoding="utf-8"))
                except ValueError as exc:
                    raise EncoderError(f"{path} is not valid JSON ({exc}).") from exc
        raise EncoderError(
            f"{folder} has neither config.json nor vae/config.json: it is no diffusers model folder."
        )
    from diffusers import AutoencoderKL

    errors = []
    for subfolder in ("vae", None):
        try:
            return subfolder, AutoencoderKL.load_config(name, subfolder=subfolder, revision=revision)
        except (OSError, ValueError) as exc:
            errors.append(_first_line(exc))
    raise EncoderError(
        f"Encoder {name} is no local folder and could not be had from the hub: {errors[-1]} "
        "If this machine is offline, download it elsewhere and name the folder."
    )


def _hash_model(model: Any) -> str:
    """Hash the configuration and the encoder's tensors (a decoder does not change a latent)."""
    config = {
        k: v
        for k, v in sorted(model.config.items())
        if not k.startswith("_") and k not in _IGNORED_CONFIG and "decoder" not in k
    }
    digest = hashlib.sha256(
        canonical_json([type(model).__name__, json.loads(json.dumps(config, default=str))]).encode()
    )
    for key, tensor in sorted(model.state_dict().items()):
        if not key.startswith(("decoder.", "post_quant_conv.")):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            import torch

            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise UsageError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N.") from exc
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device is {name!r}, but torch {torch.__version__} sees no CUDA device here. Use cpu or auto."
        )
    return device


def _versions(*packages: str) -> dict[str, Any]:
    from importlib.metadata import version

    return {"versions": {name: version(name) for name in packages}}


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:300]
