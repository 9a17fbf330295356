import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from solvers.errors import ProjectionFormatError, SolverUsageError
from solvers.files import write_safetensors
from solvers.heads import HEADS, build_head, load_head, save_head

SHAPE, DIM, RANK = (4, 6, 6), 144, 36
OPTIONS = {"mlp": {"layers": 3}, "convolution": {"latent_shape": SHAPE}, "attention": {"latent_shape": SHAPE}}


def head(name, dim=DIM, rank=RANK, **knobs):
    return build_head(name, dim, rank, **{**OPTIONS.get(name, {}), **knobs})


def rows(n=5, dim=DIM, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_maps_rows_one_by_one_and_every_parameter_learns(name):
    module, x = head(name), rows()
    y = module(x)
    assert y.shape == (5, RANK)
    assert y.dtype == torch.float32
    # Row by row the products may be summed in another order: eps of their size apart.
    apart = torch.cat([module(row[None]) for row in x])
    assert torch.allclose(y, apart, atol=8 * torch.finfo(torch.float32).eps * float(y.detach().abs().max()))
    y.square().sum().backward()
    for parameter in module.parameters():
        assert float(parameter.detach().abs().max()) > 0  # a rate in units of its size means something
        assert float(parameter.grad.abs().max()) > 0
    assert module.parameter_count == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_only_the_linear_heads_are_linear(name):
    module, (a, b) = head(name).double(), (rows(1, seed=s).double() for s in (0, 1))
    with torch.no_grad():
        apart = (module(a + b) - module(a) - module(b)).abs().max() / module(a + b).abs().max()
    assert (float(apart) < 1e-12) == (name in ("linear", "convolution"))


def test_the_linear_head_and_an_mlp_of_one_layer_are_the_same_w():
    x, linear = rows(), head("linear")
    assert linear.weight.shape == (DIM, RANK)
    assert torch.equal(linear(x), x @ linear.weight)
    gram = (linear.weight.T @ linear.weight).detach().numpy()
    assert np.abs(gram - np.eye(RANK)).max() < 8 * np.finfo(np.float32).eps
    assert torch.equal(head("mlp", layers=1)(x), linear(x))
    assert not torch.allclose(head("mlp", layers=2)(x), linear(x))


def test_an_mlp_is_w_and_residual_layers_with_relu():
    module, x = head("mlp", layers=3), rows()
    h = x.numpy() @ module.weight.detach().numpy()
    for matrix in module.residual:
        h = h + np.maximum(h, 0) @ matrix.detach().numpy()
    assert np.abs(module(x).detach().numpy() - h).max() < 1e-5
    # Deep or not, the layers begin as a slight change of x W.
    for layers in (2, 7):
        y, w = head("mlp", layers=layers)(x), head("linear")(x)
        assert 0.01 < float(((y - w).norm() / w.norm()).detach()) < 1.0


@pytest.mark.parametrize(
    ("shape", "rank", "stride", "kernel"),
    [
        ((4, 32, 32), 512, 2, 3),
        ((4, 6, 6), 36, 1, 3),
        ((4, 8, 8), 48, 2, 3),
        ((4, 8, 8), 4, 4, 7),
        ((2, 5, 3), 7, 5, 9),
    ],
)
def test_a_convolution_fills_the_rank_and_sees_every_value(shape, rank, stride, kernel):
    dim = int(np.prod(shape))
    module = build_head("convolution", dim, rank, latent_shape=shape)
    assert (module.stride, module.weight.shape[-1]) == (stride, kernel)
    x = rows(1, dim).requires_grad_()
    module(x).square().sum().backward()
    assert int((x.grad == 0).sum()) == 0
    assert module.multiply_adds == rank * shape[0] * kernel * kernel


def test_a_convolution_shifts_with_its_image_and_attention_mixes_all_of_it():
    image = rows(1).reshape(1, *SHAPE)
    shifted = torch.roll(image, 1, dims=3)
    conv = head("convolution", rank=36)
    a, b = (conv(i.reshape(1, -1)).reshape(6, 6) for i in (image, shifted))
    assert torch.allclose(a[:, 1:-2], b[:, 2:-1], atol=1e-5)  # away from the edges
    # One changed position reaches, through attention, the tokens of all others.
    attention = head("attention").double()
    attention.weight.data = torch.eye(DIM, dtype=torch.float64)
    changed = image.double().clone()
    changed[0, :, 2, 2] += 1
    with torch.no_grad():
        apart = attention(changed.reshape(1, -1)) - attention(image.double().reshape(1, -1))
    assert int((apart == 0).sum()) == 0


def test_attention_is_softmax_of_scaled_products():
    module, x = head("attention").double(), rows(2).double()
    tokens = x.reshape(2, 4, 36).permute(0, 2, 1).numpy()
    inward, outward = (p.detach().numpy() for p in (module.inward, module.outward))
    q, k, v = np.split(tokens @ inward, 3, axis=2)
    mixed = np.empty_like(q)
    for at in range(0, q.shape[2], 16):
        own = slice(at, at + 16)
        weight = np.exp(q[..., own] @ k[..., own].transpose(0, 2, 1) / 4)
        mixed[..., own] = weight / weight.sum(axis=2, keepdims=True) @ v[..., own]
    expected = (tokens + mixed @ outward).transpose(0, 2, 1).reshape(2, -1) @ module.weight.detach().numpy()
    assert np.abs(module(x).detach().numpy() - expected).max() < 1e-10
    pairs, per_token = 2 * 36 * 36 * 64, 4 * 192 + 64 * 4
    assert module.multiply_adds == pairs + 36 * per_token + DIM * RANK


# Run as a child, which forks one for each head: a process's largest memory never falls again, and torch is
# imported once (its optimisers import torch._dynamo at their first step). The first run brings in all other
# libraries and holds a sixteenth of the batch at a time; embeddings, their gradient and copies are 4 more
# arrays. Of two steps the second has Adam's moments beside it.
GROWTH = """
import gc, os, sys
from dataclasses import replace
import numpy as np
import torch._dynamo
from solvers.heads import build_head
from solvers.sgd import ArraySource, CosFace, train

CLASSES = 64
SIZES = {
    "mlp": ((4, 12, 12), 576, 4096),
    "convolution": ((4, 24, 24), 2304, 1024),
    "attention": ((4, 24, 24), 32, 64),
}

def peak(cfg, source):
    train(cfg, source)
    gc.collect()
    # Not getrusage: its peak is inherited from the process that started this one.
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

def growth(name):
    shape, rank, rows = SIZES[name]
    dim = int(np.prod(shape))
    knobs = {"layers": 7} if name == "mlp" else {"latent_shape": shape}
    labels = np.repeat(np.arange(CLASSES), rows // CLASSES)
    source = ArraySource(np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32), labels)
    cfg = CosFace(
        rank=rank, head=name, steps=2, batch_identities=CLASSES, per_identity=rows // CLASSES,
        class_init="random", device="cpu", accumulate=16, ema=False, **knobs,
    )
    parts = peak(cfg, source)
    grown = peak(replace(cfg, accumulate=1), source) - parts
    return (build_head(name, dim, rank, **knobs).row_bytes + 16 * rank) * rows * 15 // 16, grown

for name in SIZES:
    child = os.fork()
    if child == 0:
        print(name, *growth(name), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.fixture(scope="module")
def growths():
    """By head: the bytes that are counted for a batch, and those by which the process grew."""
    run = subprocess.run(
        [sys.executable, "-c", GROWTH],
        capture_output=True,
        text=True,
        # Memory that is freed is given back at once: what is counted is what is held, to the megabyte.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = (line.split() for line in run.stdout.splitlines())
    return {name: (int(counted), int(measured)) for name, counted, measured in lines}


@pytest.mark.parametrize("name", ["mlp", "convolution", "attention"])
def test_what_a_batch_holds_in_the_head_is_counted(growths, name):
    counted, measured = growths[name]
    # Too little would let a run die; far too much would refuse one that fits.
    assert 0.7 * measured < counted < 1.6 * measured


@pytest.mark.parametrize("name", HEADS)
def test_a_seed_reproduces_and_leaves_the_global_generators_alone(name):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    x = rows()
    first, again, other = (head(name, seed=s)(x) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("name", HEADS)
def test_a_saved_head_comes_back(tmp_path, name):
    module, x = head(name), rows()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)  # not what the seed gives
    save_head(tmp_path / "head.safetensors", module, {"space": "abc", "step": 3})
    found, info = load_head(tmp_path / "head.safetensors")
    assert torch.equal(found(x), module(x))
    assert (found.spec, info) == (module.spec, {"space": "abc", "step": 3})


def test_a_file_that_is_not_the_head_it_names_is_refused(tmp_path):
    path = tmp_path / "head.safetensors"
    save_head(path, head("linear"), {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(ProjectionFormatError, match="damaged"):
        load_head(path)
    spec = {"name": "linear", "dim": DIM, "rank": RANK}
    lies = [
        {**spec, "rank": RANK + 1},
        {**spec, "name": "mlp", "layers": 2},
        {**spec, "name": "x"},
        {"name": "mlp"},
    ]
    for lie in lies:
        text = json.dumps({"spec": lie, "info": {}})
        weight = {"weight": np.ones((DIM, RANK), np.float32)}
        write_safetensors(path, weight, {"format": "solvers.head", "version": "1", "info": text})
        with pytest.raises(ProjectionFormatError, match="head"):
            load_head(path)
    write_safetensors(path, {}, {"format": "solvers.projection", "version": "1"})
    with pytest.raises(ProjectionFormatError):
        load_head(path)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("transformer", {}),
        ("linear", {"layers": 2}),
        ("linear", {"rank": DIM + 1}),
        ("mlp", {"layers": 0}),
        ("mlp", {"layers": 8}),
        ("convolution", {"latent_shape": None}),
        ("attention", {"latent_shape": (4, 6, 7)}),
        ("attention", {"latent_shape": (36, 4)}),
    ],
)
def test_what_cannot_be_built_is_refused(name, knobs):
    with pytest.raises(SolverUsageError):
        head(name, **knobs)
