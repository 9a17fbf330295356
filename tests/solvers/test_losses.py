import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from solvers import losses
from solvers.errors import SolverUsageError
from solvers.losses import DEFAULTS, LOSSES, gradients

EPS32 = float(np.finfo(np.float32).eps)
SETTINGS = [
    ("cosface", 64.0, 0.35),
    ("cosface", 8.0, 0.0),
    ("softmax", 1.0, 0.0),
    ("softmax", 0.3, 0.0),
    ("circle", 256.0, 0.25),
    ("circle", 16.0, 0.4),
]


def numpy_loss_and_gradients(name, y, C, labels, scale, margin):
    """The loss in float64 NumPy with gradients derived by hand, through both normalisations."""
    y_norm, c_norm = (np.linalg.norm(a, axis=1, keepdims=True) for a in (y, C))
    if name == "softmax":
        y_norm, c_norm = np.ones_like(y_norm), np.ones_like(c_norm)
    u, v = y / np.maximum(y_norm, 1e-12), C / np.maximum(c_norm, 1e-12)
    hot = np.eye(len(C))[labels]
    cos = u @ v.T
    if name == "circle":
        weight = np.where(hot, np.maximum(1 + margin - cos, 0), np.maximum(cos + margin, 0))
        logits = scale * weight * (cos - np.where(hot, 1 - margin, margin))
        slope = scale * weight  # the weights are constants to the gradient
    else:
        logits, slope = scale * (cos - margin * hot), scale
    shifted = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    d_cos = slope * (p - hot) / len(y)
    d_u, d_v = d_cos @ v, d_cos.T @ u
    if name == "softmax":
        return -log_p[hot.astype(bool)].mean(), d_u, d_v
    d_y = (d_u - u * (u * d_u).sum(axis=1, keepdims=True)) / np.maximum(y_norm, 1e-12)
    d_c = (d_v - v * (v * d_v).sum(axis=1, keepdims=True)) / np.maximum(c_norm, 1e-12)
    return -log_p[hot.astype(bool)].mean(), d_y, d_c


def world(rows=24, classes=9, m=10, seed=0):
    """Embeddings near their classes' weights, lengths far from 1; class 0 has one row, 1 none, 2 many."""
    rng = np.random.default_rng(seed)
    C = rng.standard_normal((classes, m)) * rng.uniform(0.1, 4, (classes, 1))
    labels = np.concatenate([[0], np.full(6, 2), rng.integers(2, classes, size=rows - 7)])
    y = (C[labels] + rng.standard_normal((rows, m))) * rng.uniform(0.2, 3, (rows, 1))
    return y, C, labels


def through_autograd(name, y, C, labels, dtype=torch.float64, **knobs):
    ty, tC = (torch.tensor(a, dtype=dtype, requires_grad=True) for a in (y, C))
    value = LOSSES[name](ty, tC, torch.tensor(labels), **knobs)
    value.backward()
    return float(value.detach()), ty.grad.numpy(), tC.grad.numpy()


@pytest.mark.parametrize("rows_a_block", [1, 5, 24, 1000])
@pytest.mark.parametrize(("name", "scale", "margin"), SETTINGS)
def test_loss_and_gradients_agree_with_numpy(name, scale, margin, rows_a_block):
    y, C, labels = world()
    block = rows_a_block * len(C) * 8 * (2 if name == "circle" else 1)
    expected = numpy_loss_and_gradients(name, y, C, labels, scale, margin)
    found = through_autograd(name, y, C, labels, scale=scale, margin=margin, block_bytes=block)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()
    # Another margin, or other labels, is another loss: the agreement is no accident.
    other = numpy_loss_and_gradients(name, y, C, labels[::-1], scale, margin)
    assert abs(other[0] - expected[0]) > 1e-3 * abs(expected[0])


@pytest.mark.parametrize(("name", "scale", "margin"), SETTINGS)
def test_float32_is_as_close_as_its_rounding_allows(name, scale, margin):
    y, C, labels = world(rows=60, classes=40, m=32)
    y, C = y.astype(np.float32), C.astype(np.float32)
    wide = (a.astype(np.float64) for a in (y, C))
    expected = numpy_loss_and_gradients(name, *wide, labels, scale, margin)
    found = through_autograd(name, y, C, labels, dtype=torch.float32, scale=scale, margin=margin)
    # A product of m terms is off by sqrt(m) eps of its size; logits multiply that by how steep they are
    # in it (circle: scale times a weight of at most 2 + m), probabilities and gradients inherit it.
    size = np.linalg.norm(y, axis=1).max() * np.linalg.norm(C, axis=1).max() if name == "softmax" else 1.0
    steep = scale * (2 + margin if name == "circle" else 1.0) * size
    tolerance = 4 * np.sqrt(y.shape[1]) * EPS32 * max(steep, 1.0)
    assert abs(found[0] - expected[0]) < tolerance * max(1.0, abs(expected[0]))
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_incoming_gradient_multiplies_and_what_is_not_needed_is_not_formed(name):
    y, C, labels = (torch.tensor(a) for a in world())
    scale, margin = DEFAULTS[name]
    free = y.clone().requires_grad_()
    LOSSES[name](free, C, labels, scale=scale, margin=margin).backward()
    thrice = y.clone().requires_grad_()
    (3.0 * LOSSES[name](thrice, C, labels, scale=scale, margin=margin)).backward()
    assert torch.allclose(thrice.grad, 3.0 * free.grad, rtol=1e-12)
    loss, d_y, d_classes = gradients(name, y, C, labels, scale=scale, margin=margin, needed=(False, True))
    assert d_y is None
    assert not loss.requires_grad
    assert d_classes.shape == C.shape
    again = LOSSES[name](free, C, labels, scale=scale, margin=margin)
    slope = torch.autograd.grad(again, free, create_graph=True)[0].sum()
    with pytest.raises(RuntimeError):  # there is no second derivative, and none is made up
        slope.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(LOSSES))
def test_zero_rows_have_finite_gradients(name, dtype):
    y, C, labels = world()
    y[3], C[4] = 0.0, 0.0
    scale, margin = DEFAULTS[name]
    found = through_autograd(name, y, C, labels, dtype=dtype, scale=scale, margin=margin)
    assert np.isfinite(found[0])
    assert all(np.isfinite(g).all() for g in found[1:])
    if dtype is torch.float64:
        expected = numpy_loss_and_gradients(name, y, C, labels, scale, margin)
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        # Rows are compared each by its own size: that of a zero row is divided by 1e-12.
        for got, want in zip(found[1:], expected[1:], strict=True):
            own = np.abs(want).max(axis=1)
            assert (np.abs(got - want).max(axis=1) <= 1e-6 * own + 1e-12).all()


@pytest.mark.parametrize("name", ["cosface", "circle"])
def test_lengths_do_not_count_where_rows_are_normalised_and_do_where_not(name):
    y, C, labels = world()
    rng = np.random.default_rng(1)
    scale, margin = DEFAULTS[name]
    longer = y * rng.uniform(0.1, 10, (len(y), 1)), C * rng.uniform(0.1, 10, (len(C), 1))
    knobs = {"scale": scale, "margin": margin}
    first, second = (
        through_autograd(name, y, C, labels, **knobs),
        through_autograd(name, *longer, labels, **knobs),
    )
    assert second[0] == pytest.approx(first[0], rel=1e-12)
    assert np.abs((first[1] * y).sum(axis=1)).max() < 1e-12 * np.abs(first[1]).max() * np.abs(y).max()
    plain = {"scale": 1.0, "margin": 0.0}
    lengths = [through_autograd("softmax", *a, labels, **plain)[0] for a in ((y, C), longer)]
    assert lengths[1] != pytest.approx(lengths[0], rel=1e-3)


@pytest.mark.parametrize("name", list(LOSSES))
def test_no_array_is_larger_than_a_block_and_the_gradients(name):
    rows, classes, m, a_block = 64, 500, 8, 4
    y, C = torch.randn(rows, m, generator=torch.manual_seed(0)), torch.randn(classes, m)
    labels = torch.arange(rows) % classes
    scale, margin = DEFAULTS[name]

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.seen = max(Largest.seen, out.numel())
            return out

    def largest(block_rows):
        Largest.seen = 0
        held = 4 * (2 if name == "circle" else 1)
        with Largest():
            gradients(name, y, C, labels, scale=scale, margin=margin, block_bytes=block_rows * classes * held)
        return Largest.seen

    assert largest(a_block) == max(a_block * classes, classes * m)
    assert largest(rows) == rows * classes  # the count sees the logits when they are there


def test_far_logits_underflow_to_zero_and_no_further():
    """Nothing subnormal enters a product, and a label at the far end still has its loss."""
    y, C = torch.eye(4, 6), torch.cat([torch.eye(4, 6), -torch.eye(4, 6)])
    labels = torch.arange(4) + 4  # the opposite of each row
    loss, d_y, d_classes = gradients("softmax", 95.0 * y, C, labels, scale=1.0, margin=0.0)
    assert float(loss) == pytest.approx(190.0, rel=1e-6)  # e^-95 is subnormal
    tiny = float(np.finfo(np.float32).tiny)
    for g in (d_y, d_classes):
        assert not ((g != 0) & (g.abs() < tiny)).any()


@pytest.mark.parametrize("name", list(LOSSES))
def test_rounded_products_lose_their_operands_last_bits_alone(name):
    y, C, labels = world(rows=60, classes=40, m=32)
    margin = DEFAULTS[name][1]
    # Steeper ones turn a rounding into another winner: compare where they are smooth.
    scale = {"cosface": 8.0, "softmax": 0.05, "circle": 8.0}[name]
    knobs = {"dtype": torch.float32, "scale": scale, "margin": margin}
    full = through_autograd(name, y, C, labels, **knobs)
    rounded = through_autograd(name, y, C, labels, product_dtype=torch.bfloat16, **knobs)
    for got, want in zip(rounded[1:], full[1:], strict=True):
        assert got.dtype == np.float32
        # Each operand is off by 2^-9 of its size; 8 times that, because logits multiply it by the scale.
        assert 0 < np.abs(got - want).max() < 8 * 2.0**-8 * np.abs(want).max()


def test_where_torch_cannot_sum_in_another_type_the_rounded_operands_are_widened():
    """On CUDA an older torch has no such product: what it is asked by is asked here of the one installed."""
    version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    assert losses._sums_in_other_types() == (version >= (2, 8))
    a, b = (torch.randn(6, 5, generator=torch.manual_seed(s)).bfloat16() for s in (0, 1))
    found = losses._product(a, b.T, torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, a.float() @ b.float().T)
    assert not torch.equal(found, (a @ b.T).float()), "8 bits of a result are fewer"


def test_what_does_not_fit_is_refused():
    y, C, labels = (torch.tensor(a) for a in world())
    for bad in (
        (y[:, :3], C, labels),
        (y, C, labels[:-1]),
        (y[0], C, labels[:1]),
        (y[:0], C, labels[:0]),
    ):
        with pytest.raises(SolverUsageError):
            LOSSES["cosface"](*bad, scale=64.0, margin=0.35)
    with pytest.raises(SolverUsageError, match="no margin"):
        LOSSES["softmax"](y, C, labels, scale=1.0, margin=0.35)
    for scale, margin in ((0.0, 0.1), (np.inf, 0.1), (1.0, np.nan)):
        with pytest.raises(SolverUsageError):
            LOSSES["circle"](y, C, labels, scale=scale, margin=margin)
    with pytest.raises(SolverUsageError, match="no loss"):
        gradients("arcface", y, C, labels, scale=1.0, margin=0.0)


def test_pytorch_metric_learning_agrees():
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    y, C, labels = world()
    theirs = peers.CosFaceLoss(len(C), C.shape[1], margin=0.35, scale=64)
    theirs.W = torch.nn.Parameter(torch.tensor(C.T))
    ty = torch.tensor(y, requires_grad=True)
    value = theirs(ty, torch.tensor(labels))
    value.backward()
    loss, d_y, d_classes = through_autograd("cosface", y, C, labels, scale=64.0, margin=0.35)
    assert loss == pytest.approx(float(value.detach()), rel=1e-6)
    assert np.abs(d_y - ty.grad.numpy()).max() < 1e-6 * np.abs(d_y).max()
    assert np.abs(d_classes - theirs.W.grad.numpy().T).max() < 1e-6 * np.abs(d_classes).max()

    # Their Circle loss is over pairs: with the class weights as one reference a class it is the class level.
    pairs = peers.CircleLoss(m=0.25, gamma=256)
    ty, tC = (torch.tensor(a, requires_grad=True) for a in (y, C))
    value = pairs(ty, torch.tensor(labels), ref_emb=tC, ref_labels=torch.arange(len(C)))
    value.backward()
    loss, d_y, d_classes = through_autograd("circle", y, C, labels, scale=256.0, margin=0.25)
    assert loss == pytest.approx(float(value.detach()), rel=1e-6)
    assert np.abs(d_y - ty.grad.numpy()).max() < 1e-6 * np.abs(d_y).max()
    assert np.abs(d_classes - tC.grad.numpy()).max() < 1e-6 * np.abs(d_classes).max()
