"""Encoders: square RGB pictures to flattened latents. ``tiny`` and ``patch`` come with the package."""

from __future__ import annotations

from latentstore.encoders.base import Encoder, begin, blank_batch, noise_key, row_noise, to_unit
from latentstore.encoders.devices import Precision
from latentstore.encoders.diffusers_models import DiffusersEncoder
from latentstore.encoders.loading import BUILT_IN, DEFAULT, load_encoder, load_for, recorded_settings
from latentstore.encoders.patch import PatchEncoder, patches

__all__ = [
    "BUILT_IN",
    "DEFAULT",
    "DiffusersEncoder",
    "Encoder",
    "PatchEncoder",
    "Precision",
    "begin",
    "blank_batch",
    "load_encoder",
    "load_for",
    "noise_key",
    "patches",
    "recorded_settings",
    "row_noise",
    "to_unit",
]
