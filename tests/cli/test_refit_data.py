"""What refits read: sums of kept parts, or coordinates, in place of rows; and the same W as from rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cli_helpers import picture

from cli.collection import Collection
from cli.refit_data import ModelPairs, less, mean_of
from cli.workflows import run_encode, run_simulate
from latentstore.reader import Reader
from latentstore.simulate import Diffusion
from solvers.data import PairData
from solvers.methods import build
from solvers.moments import Moments

EPS32, EPS64 = (float(np.finfo(t).eps) for t in (np.float32, np.float64))
PARTS, PER, RANK = 4, 3, 8


@pytest.fixture(scope="module", params=[32, 64], ids=["more rows than dimensions", "fewer"])
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPairs:
    """60 pictures with 3 simulated translations each, of 64 or of 256 values."""
    folder = tmp_path_factory.mktemp("refits")
    (folder / "images").mkdir()
    for i in range(60):
        picture(i, 64).save(folder / "images" / f"{i}.png")
    run_encode(folder / "images", folder / "latents.zarr", encoder="patch", image_size=request.param)
    run_simulate(folder / "latents.zarr", folder / "pairs.zarr", Diffusion(0.2), per_origin=PER)
    (found,) = ModelPairs.by_model(Collection.open(folder / "pairs.zarr"), PARTS).values()
    assert found.in_span == (request.param == 64)
    return found


def rows(pairs: ModelPairs, chosen: np.ndarray, origins: np.ndarray) -> PairData:
    """The same pairs as plain float64 arrays, written out row by row."""
    o, g, own = (
        pairs.collection.read(r).astype(np.float64)
        for r in (pairs.origins[chosen], pairs.translations[chosen], origins)
    )
    return PairData.from_arrays(o, g, origins=own)


def sigma(data: PairData, method: str) -> np.ndarray:
    return np.linalg.svd(build(method, rank=RANK).fit(data).query_map, compute_uv=False)


def tolerance(pairs: ModelPairs) -> float:
    """Coordinates are in float64; tiles of float32 round sums by eps32, which a ridge passes on tenfold."""
    return 1e4 * EPS64 if pairs.in_span else 100 * EPS32


@pytest.mark.parametrize("method", ["gnull", "plda", "cca", "kissme"])
def test_a_fit_without_a_part_is_that_on_the_rows_that_are_left(pairs: ModelPairs, method: str) -> None:
    part_of = np.repeat(pairs.parts, [len(t.origins) for t in pairs.tasks])
    spectra = [sigma(pairs.whole, method)]
    for part in pairs.parts:
        data, chosen = pairs.without(part), np.flatnonzero(part_of != part)
        own = np.unique(pairs.origins[chosen])
        assert (data.n_pairs, data.n_origins) == (len(chosen), len(own))
        assert len(chosen) == PER * len(own), "an origin counts once, its translations each"
        spectra.append(sigma(data, method))
        expected = sigma(rows(pairs, chosen, own), method)
        np.testing.assert_allclose(spectra[-1], expected, rtol=tolerance(pairs))
    # The parts differ, and by more than the tolerance: leaving out the wrong one would be seen.
    for a, b in itertools.pairwise(spectra):
        assert np.abs(a - b).max() > 10 * tolerance(pairs) * a.max()


def test_a_resample_counts_an_origin_once_for_each_time_its_identity_is_drawn(pairs: ModelPairs) -> None:
    data = pairs.drawn(np.random.default_rng(3))
    count = len(np.unique(pairs.origins))
    drawn = np.random.default_rng(3).integers(count, size=count)
    assert (data.n_origins, data.n_pairs) == (count, PER * count)
    # The same draws again, from the identities alone.
    chosen = np.concatenate([np.flatnonzero(pairs.identities == i) for i in drawn])
    own = np.concatenate([np.unique(pairs.origins[pairs.identities == i]) for i in drawn])
    assert len(set(own.tolist())) < len(own), "some identity is drawn twice"
    for method in ("gnull", "plda"):
        expected = sigma(rows(pairs, chosen, own), method)
        np.testing.assert_allclose(sigma(data, method), expected, rtol=tolerance(pairs))
        if method == "gnull":  # the only one here that reads origins apart from pairs
            once = sigma(rows(pairs, chosen, np.unique(own)), method)
            assert np.abs(expected - once).max() > 10 * tolerance(pairs) * expected.max()


def test_rows_are_read_once_whatever_the_number_of_fits(
    pairs: ModelPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    gather = Reader.gather
    monkeypatch.setattr(
        Reader, "gather", lambda self, rows, *out: read.append(len(rows)) or gather(self, rows, *out)
    )
    (fresh,) = ModelPairs.by_model(Collection.open(pairs.collection.store.path), PARTS).values()
    for data in (fresh.whole, *map(fresh.without, fresh.parts)):
        sigma(data, "gnull")
    n, own = len(fresh.translations), len(np.unique(fresh.origins))
    # Sums take an origin twice, for its pairs and for itself; and the shift's rows.
    most = n + own if fresh.in_span else n + 2 * own + own
    assert n < sum(read) <= most
    read.clear()
    fresh.forget()
    if not fresh.in_span:
        fresh.plan.run()
        read.clear()
        for data in (fresh.whole, *map(fresh.without, fresh.parts)):
            sigma(data, "gnull")
        assert not read, "kept parts are taken up"


def test_a_total_less_a_part_is_the_sum_of_the_others() -> None:
    rng = np.random.default_rng(0)
    shift = rng.standard_normal(5)
    parts = []
    for _ in range(3):
        o = rng.standard_normal((7, 5))
        t = rng.standard_normal((7, 5)) * [1, 1, 1, 1, 0]  # nothing ever moves the last
        part = Moments(5, shift=shift)
        part.update(o, o + t)
        parts.append(part)
    total, others = (Moments(5, shift=shift) for _ in range(2))
    for part in parts:
        total.merge(part)
    for part in parts[1:]:
        others.merge(part)
    left = less(total, parts[0])
    assert (left.pairs.n, left.origins.n) == (14, 14)
    for name in ("second_t", "cov_oo", "cov_ot", "mean_t", "mean_o"):
        np.testing.assert_allclose(getattr(left.pairs, name), getattr(others.pairs, name), atol=64 * EPS64)
    np.testing.assert_allclose(left.origins.cov, others.origins.cov, atol=64 * EPS64)


def test_the_mean_of_blocks_is_that_of_their_rows() -> None:
    x = np.random.default_rng(1).standard_normal((10, 3)).astype(np.float16)
    found = mean_of(iter([x[:7], x[7:]]), 3)
    np.testing.assert_allclose(found, x.astype(np.float64).mean(axis=0), rtol=16 * EPS64)
