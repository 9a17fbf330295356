"""Autoencoders of diffusers as they lie in a folder or on the hub: found, loaded, hashed, halved."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
# They do not change a raw latent: how pipelines scale, tile and round it, and what only decoding reads.
_IGNORED_CONFIG = frozenset(
    {
        "scaling_factor",
        "shift_factor",
        "latents_mean",
        "latents_std",
        "latent_magnitude",
        "latent_shift",
        "sample_size",
        "force_upcast",
        "out_channels",
        "use_post_quant_conv",
        "num_vq_embeddings",
        "lookup_from_codebook",
    }
)
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
    """Hash the encoder's tensors and settings (a decoder does not change a latent).

    Of the settings only those that are not what the class would take by itself: a newer diffusers that knows
    one more, or a checkpoint saved anew with every default spelt out, must not make another space. To be
    called before any cast: the precision of a run is no part of the space.

    Notes
    -----
    It rests on diffusers' own promise that a checkpoint which leaves a setting out goes on to mean the same.
    """
    import torch

    settings = {
        name: _plain(model.config[name])
        for name, known in inspect.signature(type(model).__init__).parameters.items()
        if name in model.config and _encoders(name) and _plain(model.config[name]) != _plain(known.default)
    }
    digest = hashlib.sha256(canonical_json([type(model).__name__, settings]).encode())
    for key, tensor in sorted(model.state_dict().items()):
        if key.split(".")[0] not in _DECODER_PARTS:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _encoders(setting: str) -> bool:
    """Tell whether a setting is one of the encoder's, and not of the decoder or of pipelines."""
    only_up = setting.startswith("up") or "_up_" in setting or "decoder" in setting
    return not only_up and setting not in _IGNORED_CONFIG


def _plain(value: Any) -> Any:
    """Return a setting as JSON holds it: tuples as lists."""
    return json.loads(json.dumps(value, default=str))


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
        files = [*(f"{subfolder}/config.json" for subfolder in _SUBFOLDERS), "config.json"]
        file, config = hub_config(name, revision, files, what="Encoder", lacks="autoencoder's config.json")
        return file.rpartition("/")[0] or None, config
    for subfolder in (None, *_SUBFOLDERS):
        path = folder / (subfolder or "") / "config.json"
        if path.is_file():
            return subfolder, read_config(path)
    tried = ", ".join(f"{s}/config.json" for s in _SUBFOLDERS)
    raise EncoderError(
        f"{folder} has neither config.json nor one of {tried}: it is no diffusers model folder."
    )


def read_config(path: Path) -> Mapping[str, Any]:
    """Read a configuration. Raises EncoderError when it is no JSON."""
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise EncoderError(f"{path} is not valid JSON ({exc}).") from exc
    return config


def looks_like_hub_name(name: str) -> bool:
    """Tell whether a name has the form OWNER/NAME, and is no path."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))


def hub_config(
    name: str, revision: str | None, files: Sequence[str], *, what: str, lacks: str
) -> tuple[str, Mapping[str, Any]]:
    """Fetch the first of some configurations from the hub, or from its cache on this machine.

    Parameters
    ----------
    name : str
    revision : str or None
    files : sequence of str
        Where the repository may hold it.
    what, lacks : str
        What is named, and what a repository without such a file is without: for the message.

    Returns
    -------
    file, config

    Raises
    ------
    EncoderError
        There is no such repository, or it has none of the files.
    EncoderUnreachableError
        The hub does not answer.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub import try_to_load_from_cache as cached

    why, kind = f"it holds no {lacks}.", EncoderError
    for file in files:
        try:
            if not isinstance(cached(name, file, revision=revision), str):
                # One request, which is not tried again and again when there is no network.
                get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=_HUB_TIMEOUT)
            return file, read_config(Path(hf_hub_download(name, file, revision=revision)))
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
        f"{what} {name} is no local folder and could not be had from the hub: {why} "
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
