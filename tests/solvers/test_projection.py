import json
import pickle

import numpy as np
import pytest
import torch

from solvers.arrays import as_like, namespace, to_host
from solvers.errors import ProjectionFormatError, SolverUsageError, SpaceError
from solvers.projection import Projection, identity_hash

D, M = 64, 12


@pytest.fixture
def projection():
    rng = np.random.default_rng(0)
    return Projection(
        rng.standard_normal((D, M)),
        rng.standard_normal((D, M)),
        center=rng.standard_normal(D),
        score="bias",
        spectrum=np.arange(5.0),
        method="analytic",
        knobs={"alpha_bar": 0.1, "rank": None},
        space_id="space-a",
        data_hash="abc",
        used_identities=identity_hash(["x", "y", "x"]),
        seed=3,
        provenance={"numpy": np.float64(1.5), "fit": {"rank": np.int64(3)}},
    )


@pytest.fixture
def rows():
    return np.random.default_rng(1).standard_normal((7, D)).astype(np.float32)


def test_round_trip_is_exact(projection, rows, tmp_path):
    path = tmp_path / "W.safetensors"
    projection.save(path)
    again = Projection.load(path)
    for name in ("query_map", "reference_map", "center", "spectrum", "used_identities"):
        assert np.array_equal(getattr(again, name), getattr(projection, name))
    for name in ("score", "method", "knobs", "space_id", "data_hash", "seed"):
        assert getattr(again, name) == getattr(projection, name)
    assert again.provenance == {"numpy": 1.5, "fit": {"rank": 3}}
    assert np.array_equal(again.queries(rows), projection.queries(rows))
    assert [p.name for p in tmp_path.iterdir()] == ["W.safetensors"]  # no partial left behind
    assert not again.symmetric


def test_a_symmetric_map_is_stored_once(tmp_path):
    W = np.random.default_rng(0).standard_normal((D, M))
    Projection(W, W).save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 1.5 * W.size * 4
    assert Projection.load(tmp_path / "a.safetensors").symmetric


def test_cosine_rows_have_unit_length_and_zero_rows_stay_zero(rows):
    W = np.random.default_rng(0).standard_normal((D, M))
    p = Projection(W, W)
    rows[2] = 0
    rows[3] *= 1e-25  # squares underflow in float32
    lengths = np.linalg.norm(p(rows), axis=1)
    assert lengths[2] == 0
    # A sum of M squares and one division: a few eps32.
    assert np.abs(np.delete(lengths, 2) - 1).max() < 4 * np.finfo(np.float32).eps
    assert np.allclose(p.coordinates(rows[:2]), rows[:2] @ W, atol=1e-4)


def test_bias_score_is_a_plain_inner_product(projection, rows):
    r = projection.coordinates(rows, "reference")
    expected = projection.coordinates(rows) @ r.T - 0.5 * (r**2).sum(axis=1)
    scores = projection.queries(rows) @ projection.references(rows).T
    assert np.allclose(scores, expected, rtol=1e-4, atol=1e-3)
    # It orders references by distance where both maps are one.
    p = Projection(projection.query_map, projection.query_map, score="bias")
    distance = ((p.coordinates(rows)[:, None] - p.coordinates(rows)[None]) ** 2).sum(axis=2)
    scores = p.queries(rows) @ p.references(rows).T
    assert np.array_equal(np.argsort(-scores, axis=1), np.argsort(distance, axis=1))


@pytest.mark.parametrize("score", ["cosine", "bias"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_torch_arrays_give_the_same(projection, rows, score, dtype):
    p = projection.with_score(score)
    host = rows.astype(dtype)
    for method in ("queries", "references", "coordinates"):
        ours = getattr(p, method)(host)
        theirs = getattr(p, method)(torch.from_numpy(host))
        assert isinstance(theirs, torch.Tensor)
        assert ours.dtype == (np.float64 if dtype == "float64" else np.float32)
        assert np.allclose(theirs.numpy(), ours, rtol=1e-4, atol=1e-4)


def test_bfloat16_rows_are_taken(projection, rows):
    half = torch.from_numpy(rows).to(torch.bfloat16)
    assert np.allclose(projection(half).numpy(), projection(half.float()).numpy())
    assert np.array_equal(to_host(half), half.float().numpy())


def test_cupy_arrays_give_the_same(projection, rows):
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        pytest.skip("no CUDA device")
    for method in ("queries", "references"):
        theirs = getattr(projection, method)(cupy.asarray(rows))
        assert isinstance(theirs, cupy.ndarray)
        assert np.allclose(to_host(theirs), getattr(projection, method)(rows), rtol=1e-4, atol=1e-3)


def test_mixed_libraries_are_refused(rows):
    with pytest.raises(SolverUsageError, match="one library"):
        namespace(rows, torch.zeros(3))
    assert as_like(rows, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_latents_of_another_space_are_refused(projection):
    projection.check_space("space-a")
    with pytest.raises(SpaceError, match=r"space-a.*space-b"):
        projection.check_space("space-b")
    with pytest.raises(SolverUsageError, match="64"):
        projection(np.zeros((2, D + 1), dtype=np.float32))


def test_truncated_is_a_prefix(projection, rows):
    p = projection.with_score("cosine")
    short = p.truncated(4)
    assert (short.rank, short.knobs["rank"]) == (4, 4)
    assert np.allclose(short.coordinates(rows), p.coordinates(rows)[:, :4], atol=1e-5)
    for m in (0, M + 1):
        with pytest.raises(SolverUsageError):
            p.truncated(m)


def test_identities_are_hashed_stably_and_merged():
    # BLAKE2b of the name, eight bytes, little endian: a file must mean the same everywhere.
    assert identity_hash(["a"]).tolist() == [0x2F42665B399EF840]
    assert identity_hash([]).dtype == np.uint64
    W = np.eye(4, 2)
    p = Projection(W, W).using(["b", "a"]).using(identity_hash(["a", "c"]))
    assert np.array_equal(p.used_identities, np.unique(identity_hash(["a", "b", "c"])))


def test_official_weight_is_read_and_transposed(tmp_path):
    weight = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    for name, content in (
        ("w.pth", weight),
        ("w.pt", {"weight": weight.half()}),
        ("w.bin", {"weight": weight}),
    ):
        torch.save(content, tmp_path / name)
        p = Projection.load(tmp_path / name)
        assert (p.dim, p.rank, p.space_id, p.symmetric) == (4096, 512, "", True)
        tolerance = 0 if name != "w.pt" else 2e-3  # half: eps16 of entries up to about 4
        assert np.abs(p.query_map - weight.numpy().T).max() <= tolerance
        p.check_space("anything")


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_of_another_kind_are_refused(tmp_path, projection, capsys):
    (tmp_path / "w.pt").write_bytes(pickle.dumps(_Evil()))
    torch.save({"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)}, tmp_path / "two.pt")
    torch.save(torch.zeros(8, 4), tmp_path / "turned.pt")
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    for name in ("w.pt", "two.pt", "turned.pt", "x.safetensors"):
        with pytest.raises(ProjectionFormatError):
            Projection.load(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        Projection.load(tmp_path / "absent.safetensors")


def test_impossible_projections_are_refused():
    W = np.eye(4, 2)
    with pytest.raises(SolverUsageError, match="shape"):
        Projection(W, np.eye(4, 3))
    with pytest.raises(SolverUsageError, match="centre"):
        Projection(W, W, center=np.zeros(3))
    with pytest.raises(SolverUsageError, match="score"):
        Projection(W, W, score="dot")
    with pytest.raises(SolverUsageError, match="finite"):
        Projection(W * np.nan, W)


def test_identity_maps_skip_the_product_but_not_the_centre(rows):
    eye, center = np.eye(D), np.full(D, 0.5)
    assert np.array_equal(Projection(eye, eye, center=center).coordinates(rows), rows - np.float32(0.5))
    nearly = eye.copy()
    nearly[0, 1] = 1e-3
    assert not np.array_equal(Projection(nearly, nearly).coordinates(rows), rows)


def test_metadata_is_json(projection, tmp_path):
    from safetensors import safe_open

    projection.save(tmp_path / "W.safetensors")
    with safe_open(tmp_path / "W.safetensors", framework="numpy") as handle:
        assert json.loads(handle.metadata()["info"])["method"] == "analytic"


def weighted(score="cosine", **parts):
    rng = np.random.default_rng(2)
    maps = rng.standard_normal((2, D, M))
    return Projection(*maps, center=rng.standard_normal(D), score=score, **parts)


def test_queries_may_have_a_centre_of_their_own(rows):
    own = np.random.default_rng(3).standard_normal(D).astype(np.float32)
    p, shared = weighted(query_center=own), weighted()
    assert np.array_equal(p.references(rows), shared.references(rows))
    moved = rows - own + shared.center
    assert np.abs(p.queries(rows) - shared.queries(moved)).max() < 1e-5
    assert np.abs(p.queries(rows) - shared.queries(rows)).max() > 0.01
    with pytest.raises(SolverUsageError, match="centre"):
        weighted(query_center=own[:-1])


def test_a_norm_map_divides_instead_of_the_own_norm(rows):
    norm_map = np.random.default_rng(4).standard_normal((D, 5)).astype(np.float32)
    p = weighted(norm_map=norm_map)
    for side, found in (("query", p.queries(rows)), ("reference", p.references(rows))):
        norm = np.linalg.norm((rows - p.center) @ norm_map, axis=1, keepdims=True)
        assert np.abs(found - p.coordinates(rows, side) / norm).max() < 1e-5 * np.abs(found).max()
    # Each query is divided by one number: its ranking is that of the references' norm alone.
    scores = p.queries(rows) @ p.references(rows).T
    plain = p.coordinates(rows) @ p.references(rows).T
    assert np.array_equal(np.argsort(scores, axis=1), np.argsort(plain, axis=1))
    # A row without a norm, the centre itself, scores zero.
    assert not p.references(p.center[None]).any()
    with pytest.raises(SolverUsageError, match="no meaning"):
        p.with_score("bias")
    with pytest.raises(SolverUsageError, match=f"{D} rows"):
        weighted(norm_map=norm_map[:-1])
    with pytest.raises(SolverUsageError, match="norm map"):
        weighted(norm_map=np.full((D, 2), np.nan))


def test_centres_and_norm_map_are_kept_by_files_and_prefixes(rows, tmp_path):
    rng = np.random.default_rng(5)
    p = weighted(query_center=rng.standard_normal(D), norm_map=rng.standard_normal((D, 5)))
    p.save(tmp_path / "W.safetensors")
    again = Projection.load(tmp_path / "W.safetensors")
    assert np.array_equal(again.queries(rows), p.queries(rows))
    assert np.array_equal(again.references(rows), p.references(rows))
    short = p.truncated(4)
    assert np.array_equal(short.norm_map, p.norm_map)
    assert np.array_equal(short.query_center, p.query_center)
    assert short.rank == 4
    tensors = torch.from_numpy(rows)
    assert np.abs(to_host(p.queries(tensors)) - p.queries(rows)).max() < 1e-4
    # A file from before there were any has neither.
    weighted().save(tmp_path / "old.safetensors")
    old = Projection.load(tmp_path / "old.safetensors")
    assert old.query_center is None
    assert old.norm_map is None
