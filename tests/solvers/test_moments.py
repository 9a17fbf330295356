"""Moments: streamed, merged, saved and grouped sums are those of the whole, on every array library."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from solver_worlds import planted

from solvers import moments as moments_module
from solvers.arrays import to_host
from solvers.data import PairData
from solvers.errors import ProjectionFormatError, SolverUsageError
from solvers.halves import single
from solvers.methods import METHODS, build, check_rank, get
from solvers.moments import Moments, bytes_needed, merged, products_for
from solvers.products import pack, symmetric, unpack
from solvers.sums import PairSums, RowSums

D, N, PER = 64, 300, 3
ROOT = Path(__file__).parents[2]
EPS64, EPS32 = (float(np.finfo(t).eps) for t in (np.float64, np.float32))


@pytest.fixture(scope="module")
def world():
    """100 origins far from zero with 3 translations each: o (100, D), g (300, D), of (300,)."""
    rng = np.random.default_rng(0)
    o = rng.standard_normal((N // PER, D)) + 3
    of = np.repeat(np.arange(N // PER), PER)
    return o, o[of] + 1e-3 * rng.standard_normal((N, D)), of


@pytest.fixture(params=["numpy", "torch", "cupy"])
def library(request):
    """Brings NumPy arrays into a library; the one without a device or package is skipped by name."""
    if request.param == "numpy":
        return lambda x: x
    found = pytest.importorskip(request.param)
    if request.param == "cupy" and not found.is_available():
        pytest.skip("CuPy finds no GPU")
    return found.asarray


def whole(o, g, of, **options):
    moments = Moments(D, **options)
    moments.update(o, g, of)
    return moments


def numbers(moments):
    """What the methods read, on the host."""
    p, r = moments.pairs, moments.origins
    names = ("mean_o", "mean_t", "mean_g", "second_t", "cov_oo", "cov_ot", "cov_tt", "cov_og", "cov_gg")
    return {
        **{name: to_host(getattr(p, name)) for name in names},
        "origins.mean": to_host(r.mean),
        "origins.cov": to_host(r.cov),
    }


def assert_same(a, b, tolerance):
    assert (a.pairs.n, a.origins.n) == (b.pairs.n, b.origins.n)
    for name, x in numbers(a).items():
        y = numbers(b)[name]
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name


def truth(o, g, of):
    x, t = o[of], g - o[of]
    oc, gc, tc = (v - v.mean(axis=0) for v in (x, g, t))
    return {
        "mean_o": x.mean(axis=0),
        "mean_t": t.mean(axis=0),
        "mean_g": g.mean(axis=0),
        "second_t": t.T @ t / N,
        "cov_oo": oc.T @ oc / N,
        "cov_ot": oc.T @ tc / N,
        "cov_tt": tc.T @ tc / N,
        "cov_og": oc.T @ gc / N,
        "cov_gg": gc.T @ gc / N,
        "origins.mean": o.mean(axis=0),
        "origins.cov": np.cov(o.T, bias=True),
    }


def test_sums_are_those_of_the_whole_in_every_library(world, library):
    o, g, of = world
    moments = Moments(D, shift=o[0], like=None if library(o) is o else library(o))
    moments.update(library(o), library(g), of)
    found = numbers(moments)
    for name, value in truth(*world).items():
        # Differences of 1e-3 carry the rounding of latents of size 3 that they were formed from.
        scale = max(np.linalg.norm(value), 1e-3 * D)
        assert np.linalg.norm(found[name] - value) <= 1e-12 * scale, name
    squares = float((o[of] ** 2).sum() + (g**2).sum())
    assert moments.pairs.squares == pytest.approx(squares, rel=1e-12)
    assert moments.origins.squares == pytest.approx(float((o**2).sum()), rel=1e-12)


def test_row_by_row_and_grouped_pairs_are_the_same_pairs(world):
    o, g, of = world
    grouped, paired = PairSums(D), PairSums(D)
    grouped.update(o, g, of)
    paired.update(o[of], g)
    for name in ("sum_o", "sum_t", "oo", "ot", "tt"):
        x, y = getattr(grouped, name), getattr(paired, name)
        # 300 terms in another order, and the roots of the weights 3: some 300 eps64 of the largest.
        assert np.abs(x - y).max() <= 300 * EPS64 * np.abs(y).max(), name


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    # float64: sums of 300 terms in other orders. float32: half an eps of rounding an entry and a tile, of
    # sums about a mean that is near the true one.
    [("float64", 1e-12), ("float32", 1e-6)],
)
def test_streamed_merged_and_batched_sums_agree(world, precision, tolerance):
    o, g, of = world
    options = {"precision": precision, "shift": o.mean(axis=0)}
    if precision == "float32":
        o, g = o.astype(np.float32), g.astype(np.float32)
    batch = whole(o, g, of, **options)

    def part(first, last):
        rows = slice(PER * first, PER * last)
        return whole(o[first:last], g[rows], of[rows] - first, **options)

    streamed = Moments(D, **options)
    for first in range(90, -1, -10):  # in another order, too
        rows = slice(PER * first, PER * (first + 10))
        streamed.update(o[first : first + 10], g[rows], of[rows] - first)
    assert_same(streamed, batch, tolerance)
    cuts = [(0, 7), (7, 40), (40, 41), (41, 75), (75, 100)]
    for order in (cuts, cuts[::-1], cuts[2:] + cuts[:2]):
        assert_same(merged(part(*cut) for cut in order), batch, tolerance)
    # The opposite: a part that is left out shows.
    with pytest.raises(AssertionError):
        assert_same(merged(part(*cut) for cut in cuts[1:]), batch, tolerance)


def test_parts_about_other_shifts_merge(world):
    o, g, of = world
    one = whole(o[:50], g[:150], of[:150], shift=np.full(D, 2.5))
    one.merge(whole(o[50:], g[150:], of[150:] - 50, shift=o[99]))
    assert_same(one, whole(o, g, of, shift=o.mean(axis=0)), 1e-12)


def test_tiles_change_nothing(world, monkeypatch):
    o, g, of = world
    expected = whole(o, g, of, shift=o.mean(axis=0))
    for module in ("sums", "products"):
        monkeypatch.setattr(f"solvers.{module}.TILE", 32)
    assert_same(whole(o, g, of, shift=o.mean(axis=0)), expected, 1e-12)
    # In row order or not, an origin's translations may come in any order.
    mixed = np.random.default_rng(1).permutation(N)
    assert_same(whole(o, g[mixed], of[mixed], shift=o.mean(axis=0)), expected, 1e-12)


def test_differences_keep_the_digits_that_sums_of_squares_lose(world):
    o, g, of = world
    o, g = o + 1e5, g + 1e5
    pairs = whole(o, g, of).pairs
    exact = (g - o[of]).T @ (g - o[of])
    scale = np.abs(exact).max()
    gg = g.T @ g
    og = o[of].T @ g
    from_sums = symmetric(pairs.oo) + gg - og - og.T
    assert np.abs(symmetric(pairs.tt) - exact).max() < 1e-9 * scale
    assert np.abs(from_sums - exact).max() > 1e-2 * scale


def test_a_shift_keeps_the_digits_of_the_covariance():
    rows = 1e4 + np.random.default_rng(2).standard_normal((500, D)).astype(np.float32)
    exact = np.cov(rows.astype(np.float64).T, bias=True)
    near, far = RowSums(D, shift=rows[0], precision="float32"), RowSums(D, precision="float32")
    near.update(rows)
    far.update(rows)
    assert np.linalg.norm(near.cov - exact) < 1e-5 * np.linalg.norm(exact)
    assert np.linalg.norm(far.cov - exact) > np.linalg.norm(exact)


def test_precision_follows_the_storage():
    assert [products_for(e) for e in (2.0**-10, 2.0**-7, 2.0**-23, None)] == [
        "float32", "float32", "float64", "float64",
    ]  # fmt: skip


def test_saving_is_lossless_and_atomic(world, tmp_path):
    o, g, of = world
    moments = whole(o, g, of, shift=o[0], precision="float32")
    moments.save(tmp_path / "m.safetensors", {"part": "3"})
    again, facts = Moments.load(tmp_path / "m.safetensors")
    assert facts["part"] == "3"
    assert (again.dim, again.precision) == (D, "float32")
    assert_same(again, moments, 0.0)
    size = (tmp_path / "m.safetensors").stat().st_size
    assert bytes_needed(D)[1] <= size <= bytes_needed(D)[1] + 10_000
    again.update(o[:5], g[:15], of[:15])  # what was loaded can go on
    moments.update(o[:5], g[:15], of[:15])
    assert_same(again, moments, 0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ProjectionFormatError):
        Moments.load(tmp_path / "bad.safetensors")
    moments_module.write_safetensors(tmp_path / "v1", {"n": np.ones(1)}, {"format": "solvers.moments"})
    with pytest.raises(ProjectionFormatError, match="version"):
        Moments.load(tmp_path / "v1")


def test_triangles_pack_without_loss():
    a = np.triu(np.random.default_rng(4).standard_normal((7, 7)))
    assert len(pack(a)) == 28
    assert np.array_equal(unpack(pack(a), 7), a)
    assert np.array_equal(symmetric(a), a + np.triu(a, 1).T)


def test_wrong_blocks_are_refused(world):
    o, g, of = world
    with pytest.raises(SolverUsageError, match="as many"):
        Moments(D).update(o, g)
    for wrong in (of[:-1], of + 1):
        with pytest.raises(SolverUsageError, match="one of the 100 origins"):
            Moments(D).update(o, g, wrong)
    with pytest.raises(SolverUsageError, match="shape"):
        Moments(D + 1).update(o, g, of)
    with pytest.raises(SolverUsageError, match="merged"):
        Moments(D).merge(Moments(D + 1))
    with pytest.raises(SolverUsageError, match="no rows"):
        _ = Moments(D).pairs.mean_o
    with pytest.raises(SolverUsageError, match="0, at least 1"):
        merged([])
    bad = g.copy()
    bad[7, 0] = np.inf
    moments = Moments(D)
    with pytest.raises(SolverUsageError, match="1 of 300"):
        moments.update(o, bad, of)
    assert moments.pairs.n == moments.origins.n == 0  # a refused block leaves nothing behind
    assert not moments.pairs.oo.any()


def test_float32_sums_lose_a_null_space_that_float64_keeps():
    """The Gram squares the condition number: what float32 tiles do to a plant over four decades."""
    o, g, null = planted(2000, D, D // 2, seed=5)
    T = g - o
    fine, coarse = PairSums(D), PairSums(D, precision="float32")
    for sums in (fine, coarse):
        sums.update(o, g)
    angles = []
    for sums in (fine, coarse):
        vectors = np.linalg.eigh(sums.second_t)[1][:, : D // 2]
        angles.append(np.linalg.norm(T @ vectors) / np.linalg.norm(T))
    assert null.shape[1] == D // 2
    assert angles[0] < 1e-12 < EPS32 * 1e-2 < angles[1]


def test_methods_have_one_name_and_declare_what_they_need():
    without = ["identity", "centred", "pca", "analytic", "norm-weighted"]
    joint = ["plda", "cca", "regression", "procrustes"]
    assert set(METHODS) == {*without, *joint, "svd", "gnull", "kissme", "cosface"}
    assert [n for n, m in METHODS.items() if not m.needs_pairs] == without
    assert [n for n, m in METHODS.items() if m.needs_torch] == ["cosface"]
    assert [n for n, m in METHODS.items() if not m.symmetric] == ["analytic", *joint]
    assert build("svd", rank=7, lam=None).rank == 7
    assert build("analytic", rank="all").rank is None
    with pytest.raises(SolverUsageError, match="Did you mean 'analytic'"):
        get("analitic")
    with pytest.raises(SolverUsageError, match="no knob lam"):
        build("svd", lam=1.0)
    with pytest.raises(SolverUsageError, match="number"):
        build("svd", rank="all")
    with pytest.raises(SolverUsageError, match="4097"):
        check_rank(4097, 4096)


def test_importing_the_solvers_loads_nothing_heavy():
    code = (
        "import sys, solvers, solvers.closed, solvers.metrics, solvers.projection\n"
        "import solvers.sgd, solvers.selection\n"
        "heavy = {'torch', 'cupy', 'faiss', 'dask', 'diffusers', 'latentstore', 'cli'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [np.uint8, np.uint32, np.int32])
def test_which_origin_may_be_any_whole_number_in_any_order(world, kind):
    o, g, of = world
    mixed = np.random.default_rng(3).permutation(N)
    assert_same(whole(o, g[mixed], of[mixed].astype(kind)), whole(o, g, of), 1e-12)
    for wrong in (of.astype(float), of > 3, of - 1):
        with pytest.raises(SolverUsageError, match="whole numbers"):
            whole(o, g, wrong)


def test_a_large_block_that_is_refused_leaves_nothing_behind(monkeypatch):
    for module in ("sums", "products"):
        monkeypatch.setattr(f"solvers.{module}.TILE", 32)
    rows = np.ones((200, D))
    rows[199, 3] = np.nan
    pairs, sums = PairSums(D), RowSums(D)
    with pytest.raises(SolverUsageError, match="1 of 200 translations"):
        pairs.update(np.ones((200, D)), rows)
    with pytest.raises(SolverUsageError, match="1 of 200 rows"):
        sums.update(rows)
    for bad in (np.zeros(199, int), np.full(200, -1)):
        with pytest.raises(SolverUsageError, match="one of the 200 origins"):
            pairs.update(np.ones((200, D)), np.ones((200, D)), bad)
    assert pairs.n == sums.n == 0
    assert not pairs.tt.any()
    assert not sums.xx.any()


def test_arrays_of_the_user_stay_as_they_are(world):
    o, g, of = (x.copy() for x in world)
    moments = Moments(D)
    moments.update(o, g, of)
    moments.update(o[of], g)
    moments.update(np.asfortranarray(o)[::-1], g[:100][::-1])
    assert all(np.array_equal(x, y) for x, y in zip((o, g, of), world, strict=True))


def test_a_span_holds_its_pairs_or_is_not_used():
    """Announced origins that are not the pairs' own, and differences far smaller than the latents."""
    rng = np.random.default_rng(6)
    o, g, other = (rng.standard_normal((n, D)) for n in (10, 10, 12))
    apart = PairData.from_arrays(o, g, origins=other).moments
    assert apart.basis is None
    t = g - o
    assert np.linalg.norm(apart.pairs.second_t - t.T @ t / 10) < 1e-12 * np.linalg.norm(t.T @ t / 10)
    far = 1e3 + rng.standard_normal((10, D))
    near = far + 1e-9 * rng.standard_normal((10, D))
    inside = PairData.from_arrays(far, near).moments
    assert inside.basis is not None
    exact = (near - far).T @ (near - far) / 10
    lifted = inside.basis @ inside.pairs.second_t @ inside.basis.T
    # Projecting rounds by some eps of each difference, not of the latents.
    assert np.linalg.norm(lifted - exact) < 1e-12 * np.linalg.norm(exact)
    assert Moments(D).basis is None
    with pytest.raises(SolverUsageError, match="different bases"):
        inside.merge(Moments(inside.dim))


def test_a_flipped_bit_in_kept_sums_is_found(world, tmp_path):
    path = tmp_path / "m.safetensors"
    whole(*world).save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(ProjectionFormatError, match="checksum"):
        Moments.load(path)


def test_float32_sums_say_so_after_merging(world):
    coarse, fine = whole(*world, precision="float32"), whole(*world)
    fine.merge(coarse)
    assert fine.precision == "float32"


def test_every_half_is_widened_exactly():
    """Shifted bits give what NumPy's conversion gives, of all 65,536 halves: subnormal, infinite and NaN."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    for rows in (halves, halves[::-1], halves.byteswap().view(halves.dtype.newbyteorder())):
        widened, expected = single(rows), rows.astype(np.float32)
        same = (widened.view(np.uint32) == expected.view(np.uint32)) | np.isnan(expected)
        assert same.all()
        assert np.array_equal(np.isnan(widened), np.isnan(expected))
    out = np.empty(halves.shape, np.float32)
    assert single(halves, out) is out


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("side", [0, 1])
def test_a_half_that_is_not_finite_is_refused(bad, side):
    rng = np.random.default_rng(0)
    o, g = (rng.standard_normal((n, 6)).astype(np.float16) for n in (3, 9))
    (o, g)[side][2, 4] = bad
    sums = PairSums(6, precision="float32")
    with pytest.raises(SolverUsageError, match="not finite"):
        sums.update(o, g, np.repeat(np.arange(3), 3))
    assert sums.n == 0
