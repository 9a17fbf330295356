"""Reduced precision: near float32, in the same space, and a row's bytes depend on its picture alone."""

from __future__ import annotations

import numpy as np
import pytest
from store_worlds import SIZE
from vae_worlds import build, load, pictures, reload, save, unit

from latentstore.encode import Source, encode
from latentstore.encoders import load_for, noise_key, recorded_settings, row_noise
from latentstore.encoders.devices import exact_kernels, pick_precision
from latentstore.errors import UsageError
from latentstore.store import open_store

DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CALM, LOUD = 4, 4


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return save(tmp_path_factory.mktemp("kl"), "AutoencoderKL", force_upcast=False)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A VAE whose first layer leaves float16 for pictures of full contrast, as SDXL's inner ones do."""
    import torch

    model = build("AutoencoderKL", force_upcast=False)
    with torch.no_grad():
        model.encoder.conv_in.bias.zero_()
        widest = model.encoder.conv_in(unit(loud())).abs().amax((1, 2, 3)).min()
        model.encoder.conv_in.weight *= 2 * torch.finfo(torch.float16).max / widest
        assert model.encoder.conv_in(unit(calm())).abs().max() < torch.finfo(torch.float16).max / 4
    folder = tmp_path_factory.mktemp("overflowing")
    model.save_pretrained(folder)
    return folder


def loud():
    """Black and white squares, of full contrast."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 2, (LOUD, 8, 8, 3), dtype=np.uint8) * np.uint8(255)
    return squares.repeat(8, 1).repeat(8, 2)


def calm():
    """Pictures of a twelfth of the contrast."""
    return (128 + (pictures(CALM).astype(np.int16) - 128) // 12).astype(np.uint8)


def both(order=None):
    x = np.concatenate([calm(), loud()])
    return x if order is None else x[order]


def in_reduced(folder, x, dtype):
    """What the model itself gives in a reduced precision."""
    import torch

    model = torch.nn.Module.to(reload(folder, "AutoencoderKL"), getattr(torch, dtype))
    with torch.inference_mode():
        return model.encode(unit(x, model.dtype)).latent_dist.mean.flatten(1).float().numpy()


# --- one space ---------------------------------------------------------------------------------------


def test_precision_is_provenance_and_no_part_of_the_space(kl):
    import torch

    encoders = {p: load(kl, precision=p) for p in DTYPE}
    assert len({e.space.id for e in encoders.values()}) == 1
    assert {p: e.facts["dtype"] for p, e in encoders.items()} == DTYPE
    assert {p: e.model.dtype for p, e in encoders.items()} == {p: getattr(torch, d) for p, d in DTYPE.items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_is_near_float32(kl, precision):
    import torch

    x, rows = pictures(4), np.arange(4)
    full, reduced = load(kl, batch=4).encode(x, rows), load(kl, batch=4, precision=precision).encode(x, rows)
    assert reduced.dtype == np.float32
    # Some 30 roundings one after another (12 convolutions, their norms and activations), each of eps / 2 at
    # most, through normalised layers that pass a relative error on: below 30 eps, above none at all.
    eps = torch.finfo(getattr(torch, DTYPE[precision])).eps
    error = np.linalg.norm(reduced - full, axis=1) / np.linalg.norm(full, axis=1)
    assert (error < 30 * eps).all()
    assert (error > eps / 30).all()


def test_auto_is_float32_on_a_cpu(kl):
    assert load(kl).facts["dtype"] == "float32"
    assert load(kl).notes == []


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_auto_on_a_gpu_follows_the_card(monkeypatch, capability, precision):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", torch.device("cuda")) == precision
    assert pick_precision("fp32", torch.device("cuda")) == "fp32"


def test_unknown_precisions_and_batches_are_refused(kl):
    with pytest.raises(UsageError, match="--precision is 'int8'"):
        load(kl, precision="int8")
    with pytest.raises(UsageError, match="--batch is 0"):
        load(kl, batch=0)
    with pytest.raises(UsageError, match="Leave --precision bf16 out"):
        load("patch", precision="bf16")
    with pytest.raises(UsageError, match="Leave --compile out"):
        load("patch", compiled=True)


# --- overflow ----------------------------------------------------------------------------------------


def test_only_the_pictures_that_overflow_go_through_float32(overflowing):
    x, rows = both(), np.arange(CALM + LOUD)
    alone = in_reduced(overflowing, x, "float16")
    assert [bool(f) for f in np.isfinite(alone).all(1)] == [True] * CALM + [False] * LOUD
    encoder = load(overflowing, precision="fp16", batch=len(x))
    latents = encoder.encode(x, rows)
    full = load(overflowing, batch=len(x)).encode(x, rows)
    np.testing.assert_array_equal(latents[CALM:], full[CALM:])
    np.testing.assert_array_equal(latents[:CALM], encoder.encode(both()[[0, 1, 2, 3] * 2], rows)[:CALM])
    # The same half floats in another memory order.
    np.testing.assert_allclose(latents[:CALM], alone[:CALM], atol=30 * 2**-10 * np.abs(alone[:CALM]).max())
    assert (latents[:CALM] != full[:CALM]).mean() > 0.5


def test_an_overflow_is_told_once(overflowing):
    encoder = load(overflowing, precision="fp16", batch=4)
    encoder.encode(calm(), np.arange(4))
    assert (encoder.notes, encoder.upcast, "upcast" in encoder.facts) == ([], 0, False)
    for _ in range(3):
        encoder.encode(loud(), np.arange(4))
    assert encoder.notes == ["pictures that overflowed float16 were encoded in float32 instead"]
    assert (encoder.upcast, encoder.facts["upcast"]) == (12, True)


def test_bfloat16_has_the_range(overflowing):
    encoder = load(overflowing, precision="bf16", batch=4)
    assert np.isfinite(encoder.encode(loud(), np.arange(4))).all()
    assert encoder.notes == []


def test_what_came_before_changes_nothing(overflowing):
    """Were the switch to float32 kept, the calm pictures behind a loud one would have other bytes."""
    encoder = load(overflowing, precision="fp16", batch=4)
    before = encoder.encode(calm(), np.arange(4))
    encoder.encode(loud(), np.arange(4))
    np.testing.assert_array_equal(encoder.encode(calm(), np.arange(4)), before)
    order = [6, 1, 4, 3]  # calm ones in the same places, in other company
    mixed = encoder.encode(both(order), np.arange(4))
    np.testing.assert_array_equal(mixed[[1, 3]], before[[1, 3]])


def test_a_resumed_run_gives_the_bytes_of_one_that_was_not(overflowing, tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(88):  # a shard that begins with a loud one, and one of calm ones alone
        Image.fromarray(both()[4 if i < 2 else i % 4]).save(folder / f"{i:03d}.png")

    def run():
        """As a fresh process would, which has met no overflow yet."""
        fresh = load(overflowing, precision="fp16", batch=12, image_size=32)
        encode(Source(folder), tmp_path / "s.zarr", fresh, shard_rows=84, threads=1)
        return fresh.upcast, open_store(tmp_path / "s.zarr").reader.read(0, 88)

    upcast, whole = run()
    assert upcast == 2
    assert np.isfinite(whole).all()
    (tmp_path / "s.zarr" / "done" / "000001.json").unlink()
    upcast, resumed = run()
    assert upcast == 0
    np.testing.assert_array_equal(resumed, whole)
    provenance = open_store(tmp_path / "s.zarr").provenance["encoder"]
    assert (provenance["dtype"], provenance["batch"]) == ("float16", 12)


def test_what_is_not_finite_in_float32_stays_so(tmp_path):
    import torch

    model = build("AutoencoderKL", force_upcast=False)
    with torch.no_grad():
        model.encoder.conv_in.weight[0, 0, 0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    encoder = load(tmp_path, precision="fp16", batch=4)
    assert not np.isfinite(encoder.encode(loud(), np.arange(4))).any()
    assert (encoder.notes, encoder.upcast) == ([], 0)


def test_a_model_that_asks_for_float32_gets_it(kl, tmp_path):
    save(tmp_path / "sdxl", "AutoencoderKL", force_upcast=True)
    asked = load(tmp_path / "sdxl", precision="fp16")
    assert asked.facts["dtype"] == "float32"
    assert "force_upcast" in asked.notes[0]
    assert load(tmp_path / "sdxl", precision="bf16").facts["dtype"] == "bfloat16"
    # diffusers fills in "true" where a checkpoint, as Stable Diffusion 2's, says nothing.
    config = tmp_path / "sdxl" / "config.json"
    config.write_text(config.read_text().replace('"force_upcast": true,', ""))
    assert load(tmp_path / "sdxl", precision="fp16").facts["dtype"] == "float16"


# --- samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", DTYPE)
@pytest.mark.parametrize("batch", [2, 4])
def test_the_noise_is_the_same_in_any_precision_and_batch(kl, precision, batch):
    import torch

    x, rows = pictures(batch), np.arange(batch)
    options = {"precision": precision, "batch": batch}
    sample = load(kl, posterior="sample", seed=5, **options)
    mean = load(kl, **options).encode(x, rows)
    with torch.inference_mode():
        logvar = sample.model.encode(unit(x, sample.model.dtype)).latent_dist.logvar.float()
    std = (0.5 * logvar).exp().flatten(1).numpy()
    noise = np.stack([row_noise(5, noise_key(p), sample.space.dim) for p in x])
    # mean + std * noise in float32: two roundings of at most the sum's size.
    np.testing.assert_allclose(sample.encode(x, rows) - mean, std * noise, atol=2e-6)


def test_the_spread_is_clamped_as_diffusers_does(tmp_path):
    """At the clamp a standard deviation is e^10, and three of them leave float16."""
    import torch

    model = build("AutoencoderKL", force_upcast=False)
    with torch.no_grad():
        model.quant_conv.bias[4:] = 1000
    model.save_pretrained(tmp_path)
    x, rows = pictures(2), np.arange(2)
    for precision in DTYPE:
        encoder = load(tmp_path, posterior="sample", precision=precision, batch=2)
        latents = encoder.encode(x, rows)
        noise = np.stack([row_noise(0, noise_key(p), encoder.space.dim) for p in x])
        # e^10 times the noise, plus a mean of order 1.
        np.testing.assert_allclose(latents, np.exp(10) * noise, atol=20)
        assert np.abs(latents).max() > np.finfo(np.float16).max
        assert encoder.upcast == 0


# --- settings ----------------------------------------------------------------------------------------


def test_a_store_is_compared_in_its_own_precision(kl):
    encoder = load(kl, precision="bf16", batch=3)
    again = load_for(encoder.space, encoder.facts, device="cpu")
    assert (again.facts["dtype"], again.batch) == ("bfloat16", 3)
    x = pictures(3)
    np.testing.assert_array_equal(again.encode(x, np.arange(3)), encoder.encode(x, np.arange(3)))
    assert recorded_settings(encoder.facts | {"device": "NVIDIA H200"}, "cpu") == {}
    assert recorded_settings({"name": "patch", "dtype": "float32", "device": "cpu"}) == {}
    # A store of before there was a choice.
    old = {k: v for k, v in encoder.facts.items() if k not in ("batch", "compiled")} | {"dtype": "float32"}
    assert load_for(encoder.space, old, device="cpu").facts["dtype"] == "float32"


@pytest.mark.parametrize("precision", DTYPE)
def test_rows_hardly_depend_on_the_batch(kl, precision):
    import torch

    x = pictures(6)
    one, three = (load(kl, precision=precision, batch=b) for b in (1, 3))
    assert (one.facts["batch"], three.facts["batch"]) == (1, 3)
    assert one.space == three.space
    a = np.concatenate([one.encode(x[i : i + 1], np.arange(1)) for i in range(6)])
    b = np.concatenate([three.encode(x[i : i + 3], np.arange(3)) for i in (0, 3)])
    eps = torch.finfo(getattr(torch, DTYPE[precision])).eps
    assert (np.linalg.norm(a - b, axis=1) < 30 * eps * np.linalg.norm(a, axis=1)).all()  # as above


def test_no_global_state_is_changed(kl, overflowing):
    import torch
    from diffusers.utils import logging

    def state():
        return (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled(),
            torch.random.get_rng_state().sum().item(),
            logging.get_verbosity(),
        )

    before = state()
    for folder in (kl, overflowing):
        load(folder, precision="fp16", posterior="sample", batch=4).encode(loud(), np.arange(4))
    with exact_kernels(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.deterministic
    assert state() == before


# --- compiled ----------------------------------------------------------------------------------------


def test_compiled_goes_through_torch_compile(kl):
    """Without the minute that generating code takes: torch is told to run what it would compile as it is."""
    import torch

    x = pictures(2)
    with torch.compiler.set_stance("force_eager"):
        encoder = load(kl, compiled=True, batch=2)
        np.testing.assert_array_equal(
            encoder.encode(x, np.arange(2)), load(kl, batch=2).encode(x, np.arange(2))
        )
    assert encoder.model.encoder._compiled_call_impl is not None
    assert load(kl).model.encoder._compiled_call_impl is None
    assert encoder.facts["compiled"]
    assert encoder.space == load(kl).space
    assert recorded_settings(encoder.facts, "cpu")["compiled"]


def test_memory_that_does_not_suffice_is_one_paragraph(kl, monkeypatch):
    import torch

    def full(x):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    encoder = load(kl, batch=2)
    monkeypatch.setattr(encoder.model, "encode", full)
    with pytest.raises(UsageError, match=f"2 pictures of {SIZE} pixels .* smaller --batch"):
        encoder.encode(pictures(2), np.arange(2))
