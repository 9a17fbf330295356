"""Autoencoders of diffusers as they lie in a folder or on the hub: found, loaded, hashed, halved."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentstore.errors import EncoderError, EncoderUnreachableError
from latentstore.schema import canonical_json

CLASSES = (
    "AutoencoderKL",
    "AutoencoderTiny",
    "AsymmetricAutoencoderKL",
    "AutoencoderDC",
    "ConsistencyDecoderVAE",
    "VQModel",
)
# Where pipelines keep their autoencoder; Kandinsky calls it movq.
_SUBFOLDERS = ("vae", "movq")
# No latent passes through them on its way out of the encoder.
_DECODER_PARTS = frozenset({"decoder", "decoder_unet", "post_quant_conv", "quantize"})
# They do not change what the encoder computes.
_IGNORED_CONFIG = frozenset({"scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size"})
_HUB_TIMEOUT = 10.0


def load_autoencoder(name: str, revision: str | None) -> tuple[Any, Mapping[str, Any]]:
    """Load an image autoencoder in float32, whatever precision its checkpoint has.

    Returns
    -------
    model, config
        ``config`` is what the checkpoint itself states, without the defaults of diffusers.

    Raises
    ------
    EncoderError
        Not found, of another class, damaged, pickled, or with weights missing.
    """
    subfolder, config = _find_config(name, revision)
    kind = config.get("_class_name") if isinstance(config, Mapping) else None
    if kind not in CLASSES:
        raise EncoderError(
            f"{name} holds a {kind or 'model of unknown class'}; latentstore encodes with "
            f"{', '.join(CLASSES[:-1])} or {CLASSES[-1]}. Name the folder or hub repository of the "
            "autoencoder (VAE)."
        )
    import diffusers
    import torch

    try:
        with _quiet():
            # use_safetensors: a pickled checkpoint could run code.
            model, info = getattr(diffusers, kind).from_pretrained(
                name,
                subfolder=subfolder,
                revision=revision,
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise EncoderError(f"The {kind} in {name} cannot be loaded: {first_line(exc)}") from exc
    if info["missing_keys"]:
        # diffusers would fill them with random numbers.
        raise EncoderError(
            f"The {kind} in {name} lacks {len(info['missing_keys'])} of its weights "
            f"({min(info['missing_keys'])}, for one). Fetch the checkpoint again."
        )
    return model.eval().requires_grad_(False), config


def hash_model(model: Any) -> str:
    """Hash the configuration and the encoder's tensors (a decoder does not change a latent).

    To be called before any cast: the precision of a run is no part of the space.
    """
    import torch

    config = {
        k: v
        for k, v in sorted(model.config.items())
        if not k.startswith("_") and k not in _IGNORED_CONFIG and "decoder" not in k
    }
    digest = hashlib.sha256(
        canonical_json([type(model).__name__, json.loads(json.dumps(config, default=str))]).encode()
    )
    for key, tensor in sorted(model.state_dict().items()):
        if key.split(".")[0] not in _DECODER_PARTS:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def drop_decoder(model: Any) -> None:
    """Free what encoding never uses: half of the weights, or more."""
    for part in _DECODER_PARTS:
        if hasattr(model, part):
            delattr(model, part)


def probe(model: Any, name: str, image_size: int) -> tuple[tuple[int, int, int], bool]:
    """Ask for the shape of a latent, and whether it has a posterior, without computing one.

    Returns
    -------
    (C, H, W), has_posterior

    Raises
    ------
    EncoderError
        The model cannot encode RGB pictures of this size to such a shape.
    """
    import torch

    shapes_only = torch.nn.Module.to(copy.deepcopy(model), "meta")
    try:
        with torch.inference_mode():
            out = shapes_only.encode(torch.zeros(1, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError) as exc:
        raise EncoderError(
            f"The {type(model).__name__} in {name} cannot encode RGB pictures of {image_size} x {image_size} "
            f"pixels ({first_line(exc)}). Try an --image-size that is a multiple of 64."
        ) from exc
    shape = tuple(raw_output(out)[0].shape[1:])
    if len(shape) != 3 or 0 in shape:
        raise EncoderError(
            f"{name} gives latents of shape {shape}; an image autoencoder gives (C, H, W), none of them 0."
        )
    return shape, hasattr(out, "latent_dist")


def raw_output(out: Any) -> tuple[Any, Any]:
    """Return (latents or the posterior's mean, the posterior or None) of what ``model.encode`` gave."""
    if hasattr(out, "latent_dist"):
        return out.latent_dist.mode(), out.latent_dist
    return (out.latents if hasattr(out, "latents") else out.latent), None


def first_line(exc: BaseException) -> str:
    """Return the first line of a library's message, for one of ours."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:300]


def _find_config(name: str, revision: str | None) -> tuple[str | None, Mapping[str, Any]]:
    """Find the autoencoder's configuration at the top, or in a pipeline's subfolder."""
    folder = Path(name)
    if not folder.exists():
        return _hub_config(name, revision)
    for subfolder in (None, *_SUBFOLDERS):
        path = folder / (subfolder or "") / "config.json"
        if path.is_file():
            return subfolder, _read_config(path)
    tried = ", ".join(f"{s}/config.json" for s in _SUBFOLDERS)
    raise EncoderError(
        f"{folder} has neither config.json nor one of {tried}: it is no diffusers model folder."
    )


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise EncoderError(f"{path} is not valid JSON ({exc}).") from exc
    return config


def _hub_config(name: str, revision: str | None) -> tuple[str | None, Mapping[str, Any]]:
    """Fetch the configuration from the hub, or from its cache on this machine."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub import try_to_load_from_cache as cached

    why, kind = "it holds no autoencoder's config.json.", EncoderError
    for subfolder in (*_SUBFOLDERS, None):
        file = f"{subfolder}/config.json" if subfolder else "config.json"
        try:
            if not isinstance(cached(name, file, revision=revision), str):
                # One request, which is not tried again and again when there is no network.
                get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=_HUB_TIMEOUT)
            return subfolder, _read_config(Path(hf_hub_download(name, file, revision=revision)))
        except errors.EntryNotFoundError:
            continue
        except EncoderError:
            raise
        except Exception as exc:  # the hub's client raises other kinds in each of its versions
            why = f"{first_line(exc).rstrip('.')}."
            named_wrongly = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
            if not isinstance(exc, (*named_wrongly, errors.HFValidationError)):
                kind = EncoderUnreachableError
            break
    raise kind(
        f"Encoder {name} is no local folder and could not be had from the hub: {why} "
        "If this machine is offline, download it elsewhere and name the folder."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers' remarks on configurations off the terminal; what is wrong is raised."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        logging.set_verbosity(before)
