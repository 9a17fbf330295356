"""theory, its half about networks: Lemma 1 with its gaps, and Table 4 for two autoencoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cli.render import counted
from latentstore.encoders import load_encoder
from latentstore.encoders.devices import pick_device
from latentstore.errors import ImageError, UsageError
from latentstore.results import Figure, Role
from latentstore.sources.source import Source

SMALL = 64
"""Side of the pictures of the models built from configurations, in pixels."""
PICTURES, VAE_PICTURES = 4, 32
LEVELS = (0.02, 0.25, 0.5, 0.75, 0.9)
"""Noise levels of the identity, as shares of the training timesteps."""
SAMPLINGS = {0.5: (2, 10, 50), 0.9: (10, 50)}
"""Strength → numbers of DDIM steps, of which the share ``strength`` is taken. 1 step only fits 0.5."""

DEVIATION = "Lemma 1: deviation from the right side"
NOISE = "‖ε − ε_θ‖/‖ε‖"
FACTOR = "√(1−ᾱ)/√ᾱ"
GAP = "distance from ẑ₀ in ‖ẑ₀ − z₀‖"
ROUND_TRIP = "‖E(D(z₀)) − z₀‖/‖z₀ − mean‖"
CONV, EMBED = "cosine of the last convolutions", "mean cosine of the embeddings"
PRINTED = "the paper prints 0.002 to 0.169 for the convolution and 0.023 to 0.121 for the embeddings"
AGAIN = "decoded and encoded again"


@dataclass(frozen=True, eq=False)
class Case:
    """A denoiser with latents to noise; ``code`` is None where the latents are no pictures'."""

    name: str
    diffuser: Any
    z0: Any
    code: Any = None


def read_pictures(folder: Path | None, count: int, size: int, seed: int) -> tuple[Any, str]:
    """Return up to ``count`` (n, size, size, 3) pictures, and what they are.

    Without a folder they are smooth random colour fields: enough for an identity, no photographs.

    Raises
    ------
    UsageError
        The folder holds no picture that can be read.
    """
    if folder is None:
        rng = np.random.default_rng(seed)
        fields = (Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count))
        drawn = [np.asarray(f.resize((size, size), Image.Resampling.BICUBIC)) for f in fields]
        return np.stack(drawn), f"{count} drawn colour fields of {size} × {size} pixels, no photographs"
    source, why = Source.of(folder), ""
    found: list[Any] = []
    for row in source.list().to_pylist():
        if len(found) < count:
            try:
                found.append(source.load(row, size).rgb)
            except ImageError as exc:
                why = f" ({row['path']}: {exc.status}: {exc.reason})"
    if not found:
        raise UsageError(f"None of the pictures in {folder} can be read{why}. Name another folder.")
    first = "the one readable picture" if len(found) == 1 else f"the first {len(found)} readable pictures"
    return np.stack(found), f"{first} of {folder} at {size} × {size} pixels"


def cases(pipeline: Path | None, images: Path | None, size: int, device: str, seed: int) -> Iterator[Case]:
    """Yield the models that Lemma 1 is checked on: built ones, or a pipeline; and the exact denoiser."""
    import torch

    from latentstore import lemma, lemma_models

    if pipeline is None:
        pictures, _ = read_pictures(images, PICTURES, SMALL, seed)
        unet = lemma_models.small_unet(seed)
        for code in (lemma.PatchCode(pictures), lemma_models.small_vae(pictures, seed)):
            yield Case(f"{unet.name}, on the {code.name}", unet, code.encode(pictures), code)
    else:
        unet, vae = lemma_models.load_pipeline(pipeline, pick_device(device))
        pictures, _ = read_pictures(images, PICTURES, size, seed)
        yield Case(f"{unet.name}, on its VAE", unet, vae.encode(pictures), vae)
    drawn = np.random.default_rng([seed, 2]).standard_normal((PICTURES, 4, SMALL // 8, SMALL // 8))
    yield Case(
        "exact denoiser, on latents from N(0, I)", lemma_models.ideal_gaussian(), torch.from_numpy(drawn)
    )


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Let torch compute on one thread: the threads of a network this small only wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lemma_figures(case: Case, seed: int) -> list[Figure]:
    """Return the identity at several noise levels, and how far real translations end from it."""
    import torch

    from latentstore import lemma

    drawn = np.random.default_rng([seed, 3]).standard_normal(tuple(case.z0.shape))
    noise = torch.from_numpy(drawn).to(case.z0.device)
    out = []
    for level in LEVELS:
        out += _identity(
            case, lemma.one_step(case.diffuser, case.z0, noise, lemma.start(case.diffuser, level))
        )
    if case.code is not None:
        spread = case.z0 - case.z0.mean(dim=0)
        value = lemma.distance(_again(case, case.z0), case.z0, spread)
        note = "Eq. 11 takes it as 0"
        out.append(Figure(ROUND_TRIP, value, AGAIN, "method", case.name, n=len(case.z0), note=note))
    for strength, numbers in SAMPLINGS.items():
        out += _gaps(case, noise, strength, numbers)
    return out


def _identity(case: Case, at: Any) -> list[Figure]:
    group, n = f"{case.name}: t = {at.t}, ᾱ = {at.alpha_bar:.4g}", len(case.z0)
    rounding = f"float64 rounding of z_t and ε_θ alone gives {at.rounding:.0e}"
    sides: tuple[tuple[str, float, Role, str], ...] = (
        ("one-step formula", at.identity, "method", rounding),
        ("DDIM's pred_original_sample", at.ddim, "method", rounding),
        ("DDPM's pred_original_sample", at.ddpm, "method", rounding),
        (
            "ẑ₀ clipped to ±1",
            at.clipped,
            "control",
            "diffusers' default; without effect where ẑ₀ lies within ±1",
        ),
        ("ε_θ misread", at.misread, "control", "one of ε- and v-prediction taken for the other"),
    )
    return [
        *(Figure(DEVIATION, value, who, role, group, n=n, note=note) for who, value, role, note in sides),
        Figure(FACTOR, at.factor, "", "note", group),
        Figure(NOISE, at.noise_error, "", "note", group, n=n, note="the proof of Theorem 1 takes it as 0"),
        Figure("‖ẑ₀ − z₀‖/‖z₀ − mean‖", at.moved, "", "note", group, n=n),
    ]


def _gaps(case: Case, noise: Any, strength: float, numbers: tuple[int, ...]) -> list[Figure]:
    from latentstore import lemma

    t = lemma.start(case.diffuser, strength)
    z_t = lemma.add_noise(case.diffuser, case.z0, noise, t)
    one = lemma.estimate(case.diffuser, z_t, t)
    ends = {}
    for number in numbers:
        taken = round(number * strength)
        ends[counted(taken, "step")] = lemma.sample(case.diffuser, z_t, strength, number)
    if case.code is not None:
        last = list(ends)[-1]
        ends |= {f"ẑ₀, {AGAIN}": _again(case, one), f"{last}, {AGAIN}": _again(case, ends[last])}
    group = f"{case.name}: strength {strength}"
    return [
        Figure(
            GAP,
            lemma.distance(end, one, one - case.z0),
            name,
            "control" if name == "1 step" else "method",
            group,
            n=len(case.z0),
            note="0 is the lemma's E(g)",
        )
        for name, end in ends.items()
    ]


def _again(case: Case, z: Any) -> Any:
    return case.code.encode(case.code.decode(z))


def vae_figures(
    names: tuple[str, str], images: Path | None, size: int, device: str, seed: int
) -> tuple[list[Figure], list[str]]:
    """Return Table 4 for two autoencoders, and what is to be said of it.

    Raises
    ------
    EncoderError, UsageError
        One of them cannot be loaded, or there are fewer than two pictures.
    """
    from latentstore.vae_likeness import likeness

    a, b = (load_encoder(name, image_size=size, device=device) for name in names)
    pictures, what = read_pictures(images, VAE_PICTURES, size, seed)
    found = likeness(a, b, pictures)
    pair, group = f"{names[0]} × {names[1]}", "Table 4"
    turned = f"{names[0]} × itself, channels moved on by one"
    rows: tuple[tuple[str, float | None, str, Role, str], ...] = (
        (CONV, found.conv, pair, "method", PRINTED),
        (CONV, found.conv_turned, turned, "control", "the same code to a linear map"),
        (EMBED, found.embed, pair, "method", PRINTED),
        (EMBED, found.embed_turned, turned, "control", "the same code to a linear map"),
        (EMBED, found.embed_unrelated, "embeddings of unrelated pictures", "control", ""),
    )
    figures = [
        Figure(name, value, who, role, group, n=found.n, note=note)
        for name, value, who, role, note in rows
        if value is not None
    ]
    warning = (
        f"Table 4 was taken on {what}. A low cosine does not show that two autoencoders see different "
        "things: moving the channels of one's latents on by one, which any W can undo, gives the control."
    )
    said = [warning]
    if found.conv is None:
        said.append(f"The last convolutions of {pair} cannot be compared: other shapes, or no network.")
    if found.embed is None:
        shapes = (" × ".join(map(str, one.space.latent_shape)) for one in (a, b))
        said.append(
            f"The embeddings of {pair} are {' and '.join(shapes)} and have no cosine, as SD3's in the print."
        )
    return figures, said


def verdict(figures: list[Figure]) -> list[str]:
    """Say in two sentences what Lemma 1 comes to, and how far sampling lies from it."""
    held = [f.value for f in figures if f.name == DEVIATION and f.role == "method"]
    gaps = [f for f in figures if f.name == GAP and f.role == "method"]
    sampled = [f.value for f in gaps if AGAIN not in f.subject]
    again = [f.value for f in gaps if AGAIN in f.subject]
    holds = (
        f"Lemma 1 holds for one step, as algebra: both sides agree to {max(held):.0e} at every noise level, "
        "whatever the denoiser says."
    )
    gap = (
        "It says less of a translation that is sampled: after several steps the end lies "
        f"{_range(sampled)} of ‖ẑ₀ − z₀‖ from the one-step ẑ₀"
        + (f"; decoded and encoded again, {_range(again)}." if again else ".")
    )
    exact = [f.value for f in gaps if f.group.startswith("exact denoiser")]
    trained = f"With the exact denoiser of Gaussian latents it is {_range(exact)}: no lack of training."
    return [holds, f"{gap} {trained}"]


def _range(values: list[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}"


def caveats(images: Path | None, seed: int, *, built: bool) -> list[str]:
    """Return what the lemma and its proof leave out; of models that were built, what they are."""
    pixels = (
        "Lemma 1, Eq. 11: The proof takes E(D(z)) = z and one denoising step; the distances above are what "
        "that leaves out. It also takes E(g) for the latent that the network sees: raw latents differ from "
        "it by the autoencoder's scaling factor."
    )
    noise = (
        "Theorem 1: The proof takes ε − ε_θ ≈ 0. Even the exact denoiser leaves ‖ε − ε_θ‖/‖ε‖ = √ᾱ on "
        "latents from N(0, I), and the lemma multiplies it by √(1−ᾱ)/√ᾱ: what is left tends to the "
        "origin's own size as ᾱ falls."
    )
    out = [pixels, noise]
    if built:
        _, what = read_pictures(images, PICTURES, SMALL, seed)
        out.append(
            "The UNet and the AutoencoderKL are small, built from configurations and not trained; only the "
            f"patch code is fitted (on photographs). Latents are of {what}. --pipeline FOLDER takes a "
            "trained model of diffusers, with a text condition of zeros."
        )
    return out
