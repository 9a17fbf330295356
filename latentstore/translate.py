"""Text-guided image-to-image translation by any such pipeline of diffusers, as the paper's data set is made.

A picture is encoded, noised up to a strength, and denoised under a prompt (SDEdit, Meng et al., 2022).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentstore.encoders.base import Pictures
from latentstore.encoders.checkpoints import first_line, hub_config, looks_like_hub_name, read_config
from latentstore.encoders.devices import exact_kernels, pick_device
from latentstore.errors import EncoderError, MissingExtraError, UsageError
from latentstore.schema import canonical_json

STEPS, GUIDANCE = 20, 7.5
"""The guidance is the paper's (sec. 5.1). Steps are of the whole schedule; a strength runs a part of it."""
SHIPPED = {name: Path(__file__).parent / "data" / "world" / name for name in ("a", "b")}
"""Small models that come with the package, by name."""
_INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")
_NEEDED = ("prompt", "image", "strength", "num_inference_steps", "guidance_scale", "generator", "output_type")
_NOT_LOADED = ("safety_checker", "feature_extractor")
"""A checker would replace pictures by black ones; the extractor serves it alone."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class Translator:
    """A text-guided image-to-image model of diffusers.

    Whatever `AutoPipelineForImage2Image` takes and can be given a strength. Weights are read from safetensors
    alone, and no code of a checkpoint is run.

    Parameters
    ----------
    model : str
        The folder of a pipeline (with ``model_index.json``), a hub name (``OWNER/NAME``), or one of
        :data:`SHIPPED`.
    name : str, optional
        What it is called in manifests and folders; by default the last part of ``model``.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``. On a CPU it computes in float32, on CUDA in float16.
    revision : str, optional
        Of the hub repository.

    Attributes
    ----------
    name : str
    device : torch.device
    factor : int
        The sides of a picture, in pixels, must be multiples of it.
    size : int or None
        The side of the pictures that it was made for, in pixels; None where its configuration does not say.

    Raises
    ------
    EncoderError
        Not found, no image-to-image pipeline, damaged, pickled, or with weights missing.
    EncoderUnreachableError
        The hub does not answer.
    MissingExtraError
        transformers, which holds the text encoders, is not installed.
    UsageError
        The device cannot be had, or the name cannot be that of a folder.
    """

    def __init__(
        self, model: str, *, name: str | None = None, device: str = "auto", revision: str | None = None
    ) -> None:
        import torch

        self.name = name_of(model) if name is None else name
        model = str(SHIPPED.get(model, model))
        check_name(self.name)
        self.device = pick_device(device)
        _require_transformers()
        index = _find_index(model, revision)
        self._dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        with _silent():
            self._pipe = _load(model, revision, index, self._dtype).to(self.device)
        self._pipe.set_progress_bar_config(disable=True)
        if getattr(self._pipe, "watermark", None) is not None:
            self._pipe.watermark = None  # whether there is one depends on what else is installed
        processor = getattr(self._pipe, "image_processor", None)
        scale = processor.config.vae_scale_factor if processor is not None else 8
        self.factor = int(scale)
        self.size = _native_size(self._pipe)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every network's weights and of what the configurations state (scheduler, scaling).

        Weights are hashed in float16, so that a model has one digest on every device.
        """
        import torch

        digest = hashlib.sha256()
        for part, held in sorted(self._pipe.components.items()):
            digest.update(canonical_json([part, type(held).__name__, _stated(held)]).encode())
            if not isinstance(held, torch.nn.Module):
                continue
            for key, tensor in sorted(held.state_dict().items()):
                plain = tensor.detach().cpu()
                plain = plain.half() if plain.is_floating_point() else plain
                digest.update(f"{key} {plain.dtype} {tuple(plain.shape)}".encode())
                digest.update(plain.contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def translate(
        self,
        pictures: Pictures,
        prompts: Sequence[str],
        *,
        strength: float,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        seeds: Sequence[int],
    ) -> Pictures:
        """Translate pictures, each under its own prompt and from its own noise.

        A result depends on its picture, prompt and seed alone, and not on its company in the batch; batches
        of other sizes may move last bits. On a CPU equal batches give equal bytes.

        Parameters
        ----------
        pictures : (b, h, w, 3) uint8 array
            ``h`` and ``w`` multiples of :attr:`factor`.
        prompts : b strings
        strength : float
            In (0, 1]: the part of the schedule that is run, so ``int(steps * strength)`` steps.
        steps : int
            Of the whole schedule.
        guidance : float
            Scale of classifier-free guidance; 1 or less turns it off, and halves the work.
        seeds : b non-negative ints below 2^63

        Returns
        -------
        (b, h, w, 3) uint8 array

        Raises
        ------
        UsageError
            Lengths, sizes, strength or steps that do not fit.
        EncoderError
            The model fails on such pictures, gives what is not finite, or draws noise that no seed decides.
        """
        self.check(pictures.shape[1:], strength=strength, steps=steps)
        if not len(pictures) == len(prompts) == len(seeds):
            raise UsageError(
                f"{len(pictures)} pictures came with {len(prompts)} prompts and {len(seeds)} seeds; each "
                "picture needs one of both."
            )
        if not len(pictures):
            return np.empty_like(pictures)
        import torch

        # On the CPU, so that a seed means the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        asked = {
            "prompt": list(prompts),
            "image": [Image.fromarray(p) for p in pictures],
            "strength": strength,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "generator": generators,
            "output_type": "np",
        }
        try:
            with _silent(), exact_kernels(self.device), self._no_other_noise():
                made = np.asarray(self._pipe(**asked).images)
        except torch.cuda.OutOfMemoryError as exc:
            raise EncoderError(
                f"{len(pictures)} pictures of {pictures.shape[2]} x {pictures.shape[1]} pixels at once are "
                f"too much for the memory of {torch.cuda.get_device_name(self.device)}. Choose a smaller "
                "--batch."
            ) from exc
        except EncoderError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
            raise EncoderError(
                f"Model {self.name} cannot translate pictures of {pictures.shape[2]} x {pictures.shape[1]} "
                f"pixels: {first_line(exc)}"
            ) from exc
        if made.shape != pictures.shape or not np.isfinite(made).all():
            what = "what is not finite" if made.shape == pictures.shape else f"shape {made.shape}"
            raise EncoderError(
                f"Model {self.name} was given pictures of shape {pictures.shape} and made {what} of them in "
                f"{str(self._dtype).removeprefix('torch.')}. Use another model, or --device cpu, which "
                "computes in float32."
            )
        return np.rint(made.clip(0, 1) * 255).astype(np.uint8)

    def check(self, shape: Sequence[int], *, strength: float, steps: int) -> None:
        """Refuse what diffusers would refuse in the middle of the work, or would change without a word.

        Parameters
        ----------
        shape : (h, w, 3)

        Raises
        ------
        UsageError
        """
        real_steps(strength, steps)
        if len(shape) != 3 or shape[2] != 3 or shape[0] % self.factor or shape[1] % self.factor:
            near = max(1, round(shape[0] / self.factor)) * self.factor
            raise UsageError(
                f"Model {self.name} translates RGB pictures whose sides are multiples of {self.factor} "
                f"pixels, and was given some of shape {tuple(shape)}. Use a size such as {near}."
            )

    def reads_whole(self, prompt: str) -> bool:
        """Tell whether a prompt is read to its end: what is beyond a text encoder's length is cut off."""
        tokenizers = [held for part, held in self._pipe.components.items() if part.startswith("tokenizer")]
        with _silent():
            lengths = [(len(t(prompt).input_ids), t.model_max_length) for t in tokenizers if t is not None]
        return not lengths or any(length <= most for length, most in lengths)

    @contextmanager
    def _no_other_noise(self) -> Iterator[None]:
        """Refuse noise from torch's global generators: no rerun would give the same picture."""
        import torch

        devices = [self.device] if self.device.type == "cuda" else []

        def states() -> list[Any]:
            return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

        with torch.random.fork_rng(devices=devices):
            before = states()
            yield
            drawn = not all(map(torch.equal, before, states()))
        if drawn:
            raise EncoderError(
                f"Model {self.name} draws noise from torch's global generator (its scheduler is "
                f"{type(self._pipe.scheduler).__name__}), so that no seed decides its pictures. Save it with "
                "another scheduler, for example DDIMScheduler."
            )


def name_of(model: str) -> str:
    """Return what a model is called when it is not named: the last part of its folder or hub name."""
    if model in SHIPPED:
        return model
    folder = Path(model)
    last = folder.resolve().name if folder.exists() else model.rstrip("/").rpartition("/")[2]
    return _UNSAFE.sub("-", last).strip(".-")


def check_name(name: str) -> None:
    """Refuse a name of a model that no folder can have. Raises UsageError."""
    if not name or _UNSAFE.search(name) or name.startswith("."):
        raise UsageError(
            f"A model cannot be called {name!r}: its translations go into a folder of that name. Use "
            "letters, digits, dots, - and _, and no dot in front."
        )


def check_model(model: str, revision: str | None = None) -> None:
    """Refuse what is no pipeline before any is loaded.

    Raises
    ------
    EncoderError, EncoderUnreachableError, MissingExtraError
        As :class:`Translator`.
    """
    _require_transformers()
    _find_index(str(SHIPPED.get(model, model)), revision)


def real_steps(strength: float, steps: int) -> int:
    """Return how many steps of the schedule a strength runs: ``int(steps * strength)``, as in diffusers.

    Raises
    ------
    UsageError
        A strength outside (0, 1], or less than one step.
    """
    if not 0 < strength <= 1:
        raise UsageError(
            f"--strength is {strength:g}; it is above 0 (nothing is changed) and at most 1 (nothing is kept)."
        )
    real = int(steps * strength)
    if real < 1:
        raise UsageError(
            f"--strength {strength:g} of --steps {steps} is {steps * strength:g} steps, and at least 1 is "
            f"needed. Use --steps {int(np.ceil(1 / strength))} or more, or a larger --strength."
        )
    return real


def _require_transformers() -> None:
    if find_spec("transformers") is None:
        raise MissingExtraError(
            "Translating needs transformers, which holds the models' text encoders and is not installed: "
            "pip install 'latentstore[translate]'."
        )


def _find_index(model: str, revision: str | None) -> Mapping[str, Any]:
    """Return the pipeline's list of parts."""
    folder = Path(model)
    if not folder.exists():
        if not looks_like_hub_name(model):
            raise EncoderError(
                f"There is no model {model}: it does not come with the package ({', '.join(SHIPPED)}), no "
                f"such folder is in {Path.cwd()}, and it is no hub name (OWNER/NAME, for example "
                "stabilityai/stable-diffusion-2)."
            )
        lacks = f"{_INDEX}, so no pipeline"
        index = hub_config(model, revision, [_INDEX], what="Model", lacks=lacks)[1]
    elif (folder / _INDEX).is_file():
        index = read_config(folder / _INDEX)
    else:
        raise EncoderError(
            f"{folder} has no {_INDEX}: it is no pipeline of diffusers. Name the folder that holds its unet, "
            "vae, text_encoder and scheduler, as save_pretrained writes it."
        )
    if not (isinstance(index, Mapping) and isinstance(index.get("_class_name"), str)):
        raise EncoderError(
            f"The {_INDEX} of {model} names no pipeline class of diffusers; a pipeline of its own code is "
            "not run."
        )
    return index


def _load(model: str, revision: str | None, index: Mapping[str, Any], dtype: Any) -> Any:
    """Return the image-to-image pipeline, each of its networks loaded with every weight accounted for."""
    kind = index["_class_name"]
    try:
        from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

        left_out: dict[str, Any] = {part: None for part in _NOT_LOADED if part in index}
        folder = model
        if not Path(model).exists():
            folder = DiffusionPipeline.download(model, revision=revision, use_safetensors=True, **left_out)
        networks = {
            part: _network(folder, part, cls, dtype)
            for part, cls in _networks(index).items()
            if part not in left_out
        }
        # Which keyword arguments a pipeline knows is told by its index; others would be warned about.
        if "requires_safety_checker" in index:
            left_out["requires_safety_checker"] = False
        pipe = AutoPipelineForImage2Image.from_pretrained(
            folder, use_safetensors=True, **left_out, **networks
        )
    except EncoderError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError) as exc:
        raise EncoderError(
            f"The {kind} in {model} cannot be loaded for image-to-image: {first_line(exc)}"
        ) from exc
    missing = [name for name in _NEEDED if name not in inspect.signature(type(pipe).__call__).parameters]
    if missing:
        raise EncoderError(
            f"The {type(pipe).__name__} in {model} takes no {', '.join(missing)}: it edits by instruction or "
            "example, and has no strength of translation. Use a model such as Stable Diffusion."
        )
    return pipe


def _networks(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes of a pipeline's networks, by part."""
    import torch

    found = {}
    for part, named in index.items():
        if isinstance(named, list) and len(named) == 2 and named[0] in _LIBRARIES:
            cls = getattr(importlib.import_module(named[0]), str(named[1]), None)
            if inspect.isclass(cls) and issubclass(cls, torch.nn.Module):
                found[part] = cls
    return found


def _network(folder: str, part: str, cls: Any, dtype: Any) -> Any:
    # use_safetensors: a pickled checkpoint could run code.
    model, info = cls.from_pretrained(
        folder, subfolder=part, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        # They would be random numbers.
        raise EncoderError(
            f"The {part} in {folder} lacks {len(info['missing_keys'])} of its weights "
            f"({min(info['missing_keys'])}, for one). Fetch the checkpoint again."
        )
    return model.eval().requires_grad_(False)


def _native_size(pipe: Any) -> int | None:
    """Return the side in pixels of the pictures that a pipeline was made for."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    sample = getattr(denoiser.config, "sample_size", None) if denoiser is not None else None
    side = sample or getattr(pipe, "default_sample_size", None)
    side = min(side) if isinstance(side, list | tuple) else side
    return None if side is None else int(side) * int(getattr(pipe, "vae_scale_factor", 8))


def _stated(held: Any) -> dict[str, str]:
    """Return the settings of a diffusers class that are not its defaults, spelt out or not."""
    config = getattr(held, "config", None)
    if not isinstance(config, Mapping):
        return {}
    known = inspect.signature(type(held).__init__).parameters
    spelt = {name: json.dumps(config[name], default=str) for name in known if name in config}
    return {k: v for k, v in spelt.items() if v != json.dumps(known[k].default, default=str)}


@contextmanager
def _silent() -> Iterator[None]:
    """Keep remarks, bars and deprecations of the libraries off the terminal; what is wrong is raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
