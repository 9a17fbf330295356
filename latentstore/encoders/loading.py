"""Encoders by name, and the encoder that a store was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentstore.encoders.base import Encoder
from latentstore.encoders.checkpoints import looks_like_hub_name
from latentstore.encoders.devices import DTYPES, Precision, pick_device
from latentstore.encoders.diffusers_models import DiffusersEncoder
from latentstore.encoders.patch import PatchEncoder
from latentstore.errors import EncoderError, UsageError
from latentstore.schema import Posterior, Space

BUILT_IN = ("patch",)
DEFAULT = "tiny"
SHIPPED = {"tiny": Path(__file__).resolve().parent.parent / "data" / "tiny"}
"""Networks that come with the package, by name."""
_CELL = 8
"""Pixels on a side of what one place of their latents stands for."""


def load_encoder(
    name: str = DEFAULT,
    *,
    image_size: int = 256,
    posterior: Posterior = "mean",
    seed: int = 0,
    device: str = "auto",
    revision: str | None = None,
    precision: Precision = "auto",
    compiled: bool = False,
    batch: int | None = None,
) -> Encoder:
    """Return an encoder by name: a built-in one, a local folder, or a hub name.

    The parameters are :class:`DiffusersEncoder`'s. They are plain values, so that a worker in another process
    can build the same encoder from them.

    Raises
    ------
    EncoderError
    UsageError
    """
    if name in BUILT_IN:
        if compiled or precision not in ("auto", "fp32"):
            asked = "--compile" if compiled else f"--precision {precision}"
            raise UsageError(
                f"The {name} encoder is no network: it runs in float32, as it stands. Leave {asked} out, or "
                "name a network with --encoder."
            )
        return PatchEncoder(image_size, batch)
    if name not in SHIPPED and not (Path(name).exists() or looks_like_hub_name(name)):
        known = ", ".join((*SHIPPED, *BUILT_IN))
        raise EncoderError(
            f"There is no encoder {name!r}: it is not built in ({known}), no folder "
            f"of that name is in {Path.cwd()}, and it is no hub name (OWNER/NAME, for example "
            "stabilityai/stable-diffusion-2)."
        )
    if name in SHIPPED and (image_size < _CELL or image_size % _CELL):
        # The network would take it, and give a latent whose last row and column stand for fewer pixels.
        raise UsageError(
            f"The {name} encoder needs an image size that is a multiple of {_CELL}, not {image_size}."
        )
    encoder = DiffusersEncoder(
        str(SHIPPED.get(name, name)),
        image_size=image_size,
        posterior=posterior,
        seed=seed,
        device=device,
        revision=revision,
        precision=precision,
        compiled=compiled,
        batch=batch,
    )
    if name in SHIPPED:
        encoder.facts["name"] = name  # a store does not depend on where the package lies
    return encoder


def recorded_settings(facts: Mapping[str, Any], device: str = "auto") -> dict[str, Any]:
    """Return how a store's rows were computed, as ``load_encoder`` takes it: precision, batch, compiled.

    Nothing on another kind of device than then: what suits a GPU can be very slow on a CPU.
    """
    if facts.get("name") in BUILT_IN:
        return {}
    kind = "cpu" if facts.get("device", "cpu") == "cpu" else "cuda"
    if pick_device(device).type != kind:
        return {}
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        "precision": names.get(facts.get("dtype", ""), "auto"),
        "batch": facts.get("batch"),
        "compiled": facts.get("compiled", False),
    }


def load_for(space: Space, facts: Mapping[str, Any], *, device: str = "auto") -> Encoder:
    """Load the encoder that a store was made with, in the precision of then if the device is of that kind.

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
        # Compiling takes longer than the few pictures that are compared with a store.
        **recorded_settings(facts, device) | {"compiled": False},
    )
    if encoder.space.id != space.id:
        raise EncoderError(
            f"Encoder {facts['name']!r} is now space {encoder.space.id}, but the store was made in space "
            f"{space.id}: its weights or settings have changed, or the store is of an early latentstore, "
            "whose ids of networks held the defaults of the diffusers of then, too. Use the weights of then, "
            "or encode again."
        )
    return encoder
