"""Near-duplicates: planted ones are found, different pictures are not joined, and chains stay chains."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import ImageEnhance
from store_worlds import file_bytes, make_store, space_of, tree

from latentstore import duplicates, photos
from latentstore.attacks import jpeg
from latentstore.duplicates import CEILING, FLOOR, Whitening, find, set_threshold
from latentstore.encoders import PatchEncoder
from latentstore.errors import UsageError
from latentstore.groups import load, write
from latentstore.verify import verify

SIZE = 128
KINDS = {
    "JPEG 90": jpeg(90),
    "JPEG 50": jpeg(50),
    "JPEG 30": jpeg(30),
    "half": lambda image, seed: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image, seed: ImageEnhance.Brightness(image).enhance(1.1),
    "darker": lambda image, seed: ImageEnhance.Brightness(image).enhance(0.9),
}


def whiten(latents):
    """The whitening by its definition, in float64."""
    mean = latents.mean(0, dtype=np.float64)
    _, s, vectors = np.linalg.svd(latents - mean, full_matrices=False)
    m = duplicates.sketch_rank(len(latents))
    return Whitening(mean, vectors[:m].T / (s[:m] / np.sqrt(len(latents))))


def plain(dim):
    """No whitening: sketch and centred latent are the vector itself."""
    return Whitening(np.zeros(dim), np.eye(dim))


def found_in(latents, whitening=None, **options):
    whitening = whiten(latents.astype(np.float64)) if whitening is None else whitening
    return find(lambda rows: latents[rows], np.arange(len(latents)), whitening, **options)


def cosine_chain(cosines, dim=32):
    """Unit rows in which neighbours have the given cosines, and others the products along the way."""
    rows = [np.eye(dim)[0]]
    for i, c in enumerate(cosines):
        rows.append(c * rows[-1] + np.sqrt(1 - c * c) * np.eye(dim)[i + 1])
    return np.array(rows, np.float32)


def clusters(n, dim, *, spread, seed=0):
    """Rows around n/4 centres; how far from it, and so every cosine, differs by row."""
    rng = np.random.default_rng(seed)
    centre = np.repeat(rng.standard_normal((n // 4, dim)), 4, axis=0)
    far = rng.uniform(0, spread, (len(centre), 1))
    return (centre + far * rng.standard_normal(centre.shape)).astype(np.float16)


def brute_force(latents, whitening, threshold):
    """Every pair at or above the threshold, by the score's definition in float64."""
    x = latents.astype(np.float64) - whitening.mean
    cosines = []
    for y in (x @ whitening.map, x):
        y = y / np.linalg.norm(y, axis=1, keepdims=True)
        cosines.append(y @ y.T)
    score, whole = cosines
    i, j = np.nonzero(np.triu((score >= threshold) & (whole >= duplicates.WHOLE), 1))
    return set(zip(i.tolist(), j.tolist(), strict=True)), score


# --- pictures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiles():
    """Tiles of real photographs, and planted near-duplicates of the first of them by kind."""
    pytest.importorskip("skimage")
    cut = [tile for photo in photos.bundled() for _, tile in list(photos.tiles(photo, SIZE))[:12]]
    order = np.random.default_rng(0).permutation(len(cut))
    planted = [
        (int(source), list(KINDS)[i % len(KINDS)], list(KINDS.values())[i % len(KINDS)](cut[source], i))
        for i, source in enumerate(order[:30])
    ]
    encoder = PatchEncoder(SIZE)
    pictures = [*cut, *(image for _, _, image in planted)]
    pixels = np.stack([np.asarray(p.convert("RGB").resize((SIZE, SIZE)), np.uint8) for p in pictures])
    latents = encoder.encode(pixels, np.arange(len(pixels))).astype(np.float16)
    return latents, len(cut), [(source, kind) for source, kind, _ in planted]


def test_planted_near_duplicates_are_found_and_different_pictures_are_not_joined(tiles):
    latents, n, planted = tiles
    found = found_in(latents)
    group = found.of("group")
    missed = [kind for i, (s, kind) in enumerate(planted) if group.get(n + i, -1) != group.get(s)]
    assert not missed
    origin = list(range(n)) + [source for source, _ in planted]
    assert all(len({origin[row] for row in rows}) == 1 for rows in found.members.values())


def test_without_planted_ones_no_two_different_pictures_are_joined(tiles):
    latents, n, _ = tiles
    assert not found_in(latents[:n]).members


def test_pictures_that_share_only_a_background_are_not_joined():
    """Raw cosine would join them all, at any threshold that finds their duplicates."""
    rng = np.random.default_rng(0)
    detail = rng.standard_normal((200, 64))
    latents = (20 * rng.standard_normal(64) + detail).astype(np.float32)
    unit = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    raw = unit @ unit.T
    assert raw[np.triu_indices(200, 1)].min() > CEILING
    assert not found_in(latents).members
    twice = np.concatenate([latents, latents[:9] + 0.05 * rng.standard_normal((9, 64)).astype(np.float32)])
    assert [sorted(m) for m in found_in(twice).members.values()] == [[i, 200 + i] for i in range(9)]


def test_duplicates_are_not_whitened_apart():
    """Over its full span a collection has no two rows alike: the sketch must stay well below."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((100, 400))
    latents = np.concatenate([latents, latents[:20] + 0.1 * rng.standard_normal((20, 400))])
    assert len(found_in(latents.astype(np.float32)).members) == 20
    mean = latents.mean(0)
    _, s, v = np.linalg.svd(latents - mean, full_matrices=False)
    whole = Whitening(mean, v[:119].T / s[:119])
    assert not found_in(latents.astype(np.float32), whole, threshold=FLOOR).members


# --- exactness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [37, 2048])
def test_exact_search_equals_brute_force(monkeypatch, block):
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    latents = clusters(200, 48, spread=0.8)
    whitening = whiten(latents.astype(np.float64))
    wanted, score = brute_force(latents, whitening, 0.85)
    assert 50 < len(wanted) < 300, "graded cosines, some on either side"
    found = found_in(latents, whitening, threshold=0.85, search="exact")
    assert found.settings["pairs"] == len(wanted)
    assert set(found.row.tolist()) == {row for pair in wanted for row in pair}
    # The sketch is kept in float32: a cosine of unit rows is off by no more than m roundings.
    tolerance = 32 * whitening.map.shape[1] * np.finfo(np.float32).eps
    np.testing.assert_allclose(found.score, np.where(
        found.row == found.group, 1, score[found.row, found.group]), atol=tolerance)  # fmt: skip
    assert (found.score >= 0.85).all()


def test_rounding_loses_no_pair_at_the_threshold():
    """Its own score as threshold keeps a pair, though the float32 product falls on either side of it."""
    latents = clusters(200, 48, spread=0.8)
    whitening = whiten(latents.astype(np.float64))
    graded = found_in(latents, whitening, threshold=0.85)
    scores = np.unique(graded.score[graded.row != graded.group])
    assert len(scores) > 30
    for score in scores.tolist():
        again = found_in(latents, whitening, threshold=score)
        assert score in again.score.tolist()


def test_candidates_of_the_sketch_are_scored_on_the_whole_latent():
    """Two rows that agree in the whitened directions and differ outside them are no duplicates."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((40, 64)).astype(np.float32)
    latents[1, :32] = latents[0, :32]
    half = Whitening(np.zeros(64), np.eye(64)[:, :32])
    assert not found_in(latents, half, threshold=0.85).members
    latents[1] = latents[0] + 0.01 * latents[1]
    assert list(found_in(latents, half, threshold=0.85).members.values()) == [[0, 1]]


def test_candidate_search_finds_a_subset_and_says_how_much_of_it():
    pytest.importorskip("faiss")
    latents = clusters(3000, 32, spread=0.5)
    exact = found_in(latents, plain(32), threshold=0.85, search="exact")
    near = found_in(latents, plain(32), threshold=0.85, search="ivf")
    sketch = latents / np.linalg.norm(latents.astype(np.float32), axis=1, keepdims=True).astype(np.float32)
    least = 0.85 - 1e-5
    all_pairs = {tuple(p) for p in duplicates._all_pairs(sketch, least).tolist()}
    some_pairs = {tuple(p) for p in duplicates._near_cells(sketch, least)[0].tolist()}
    assert some_pairs <= all_pairs
    assert len(some_pairs) > 0.95 * len(all_pairs)
    assert near.settings["pairs"] <= exact.settings["pairs"]
    assert set(near.row.tolist()) <= set(exact.row.tolist())
    sampled, hit = near.settings["candidates sampled"], near.settings["candidates found"]
    assert 0.95 * sampled < hit <= sampled
    assert sampled > 500
    assert "candidates sampled" not in exact.settings


def test_the_recall_counts_what_the_candidates_lack():
    sketch = clusters(400, 32, spread=0.3).astype(np.float32)
    sketch /= np.linalg.norm(sketch, axis=1, keepdims=True)
    pairs = duplicates._all_pairs(sketch, 0.85)
    assert duplicates._recall(sketch, pairs, 0.85) == (len(pairs), len(pairs))
    assert duplicates._recall(sketch, pairs[::2], 0.85) == (len(pairs[::2]), len(pairs))


# --- groups -----------------------------------------------------------------------------------------------


def test_a_chain_of_small_steps_does_not_make_its_two_ends_one_origin():
    chain = cosine_chain([0.9] * 6)
    found = found_in(np.concatenate([chain, -chain[:1]]), plain(32), threshold=0.85)
    group, component = found.of("group"), found.of("component")
    assert set(component) == set(range(7)), "all in the chain, and the other row not"
    assert len(set(component.values())) == 1
    assert group[0] != group[6]
    assert len(found.members) > 1
    first = chain[found.group]
    assert (np.einsum("rd,rd->r", chain[found.row], first) >= 0.85 - 1e-6).all()
    assert found.settings["pairs between groups"] > 0


def test_a_picture_in_the_middle_of_its_versions_leads_one_group():
    rng = np.random.default_rng(0)
    noise = np.linalg.qr(rng.standard_normal((32, 6)))[0].T
    versions = 0.9 * noise[0] + np.sqrt(1 - 0.81) * noise[1:]  # 0.81 among each other
    found = found_in(np.concatenate([versions, noise[:1]]).astype(np.float32), plain(32), threshold=0.85)
    assert found.members == {5: [5, 0, 1, 2, 3, 4]}
    np.testing.assert_allclose(found.score, [1, *[0.9] * 5], atol=1e-6)
    assert found.settings["pairs between groups"] == 0


def test_equal_latents_are_one_group_with_score_one_and_cost_no_pairs():
    latents = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    latents[10:30] = latents[3]
    latents[35] = latents[3] + 0.01
    found = found_in(latents, plain(32), threshold=0.85)
    assert {frozenset(m) for m in found.members.values()} == {frozenset([3, 35, *range(10, 30)])}
    assert found.settings["pairs"] == 1
    assert found.settings["equal latents"] == 20
    assert set(found.component.tolist()) == {3}


def test_rows_are_named_as_the_store_numbers_them():
    latents = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    latents[33] = latents[21] * 1.01
    rows = np.arange(20, 40)
    found = find(lambda r: latents[r], rows, plain(32), threshold=0.85)
    assert found.members == {21: [21, 33]}
    assert found.of("component") == {21: 21, 33: 21}


# --- the threshold ----------------------------------------------------------------------------------------


def scores_with_tail(rate, pairs=1000):
    """Unit rows at right angles, but for pairs with cosines 0.3 + an exponential of that rate."""
    rows = np.eye(2 * pairs, dtype=np.float32)
    c = np.minimum(0.3 + np.random.default_rng(0).exponential(1 / rate, pairs), 0.97)
    own = np.arange(pairs)
    rows[pairs + own, own], rows[pairs + own, pairs + own] = c, np.sqrt(1 - c * c)
    return rows


def test_the_threshold_follows_the_tail_of_different_pictures():
    steep, how = set_threshold(scores_with_tail(20.0))
    assert steep == FLOOR
    assert how["clear of different pairs from"] < FLOOR
    assert how["different pairs expected"] < 1
    slow, how = set_threshold(scores_with_tail(11.5))  # 0.3 + ln 1000 / 11.5 = 0.90
    assert FLOOR < slow < CEILING
    assert how["different pairs expected"] == pytest.approx(1)
    heavy, how = set_threshold(scores_with_tail(3.0))
    assert heavy == CEILING
    assert how["different pairs expected"] > 1


def test_without_a_tail_the_threshold_is_the_floor():
    limit, how = set_threshold(np.eye(40, dtype=np.float32))
    assert (limit, how["different pairs expected"]) == (FLOOR, None)


@pytest.mark.parametrize("rate", [2.0, 13.0, 200.0])
def test_the_rate_of_a_cut_off_exponential(rate):
    x = np.random.default_rng(0).exponential(1 / rate, 400_000)
    x = x[x < 0.3]
    # The estimate scatters by its rate over the root of the sample; a cut-off at a flat tail costs more.
    assert duplicates._exponential_rate(x, 0.3) == pytest.approx(rate, rel=0.02 if rate > 5 else 0.1)


@pytest.mark.parametrize("x", [np.full(50, 0.29), np.linspace(0, 0.3, 50)])
def test_a_tail_that_does_not_fall_leads_to_the_ceiling(x):
    assert duplicates._exponential_rate(x, 0.3) == 1.0


# --- refusals ---------------------------------------------------------------------------------------------


def test_too_little_to_tell_from_chance_is_refused():
    few = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    with pytest.raises(UsageError, match=r"20 images.*10 directions.*16"):
        found_in(few)


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(threshold):
    with pytest.raises(UsageError, match="--threshold"):
        found_in(np.eye(32, dtype=np.float32), plain(32), threshold=threshold)


def test_more_pairs_than_can_be_held_are_refused(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 100)
    white = 1 + 0.001 * np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    with pytest.raises(UsageError, match="higher --threshold"):
        found_in(white, plain(32), threshold=0.85)


# --- on disk ----------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    latents = clusters(120, 32, spread=0.3)
    store = make_store(tmp_path / "s.zarr", latents)
    found = found_in(latents, plain(32), threshold=0.85)
    write(store, found, store.data_hash())
    return store, found


def test_groups_are_kept_and_read_again(kept):
    store, found = kept
    again, why = load(store)
    assert why == ""
    for name in ("row", "group", "component", "score"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert again.members == found.members
    body = json.loads((store.root / "duplicates" / "groups.json").read_text())
    assert body["threshold"] == 0.85
    assert body["space id"] == space_of(32).id
    assert body["data hash"] == store.data_hash()
    assert body["groups"] == len(found.members)


def test_writing_again_gives_the_same_bytes_and_leaves_no_partial(kept):
    store, found = kept
    before = tree(store.root)
    write(store, found, store.data_hash())
    assert tree(store.root) == before
    assert not [name for name in before if name.endswith(".partial")]


def test_the_store_is_whole_with_its_groups(kept):
    """Its folder's metadata is sealed: it stays as it was made, or comes back as it was."""
    store, found = kept
    assert not verify(store).damages
    before = tree(store.root)
    (store.root / "duplicates" / "zarr.json").unlink()
    assert verify(store).damages
    write(store, found, store.data_hash())
    assert tree(store.root) == before


def test_zarr_opens_the_store_without_a_warning(kept):
    import zarr

    assert "duplicates" in dict(zarr.open_group(kept[0].root, mode="r").members())


def test_a_store_without_groups_says_which_command_makes_them(tmp_path):
    store = make_store(tmp_path / "s.zarr", clusters(40, 32, spread=0.3))
    groups, why = load(store)
    assert groups is None
    assert f"latentstore duplicates {store.path}" in why
    assert "not looked for" in why


def test_groups_of_other_latents_are_not_used(kept):
    store, found = kept
    write(store, found, "0123456789abcdef")
    groups, why = load(store)
    assert groups is None
    assert "before its latents changed" in why
    assert f"latentstore duplicates {store.path}" in why


@pytest.mark.parametrize("name", ["groups.json", "groups.parquet"])
def test_a_changed_byte_is_seen(kept, name):
    store, _ = kept
    path = store.root / "duplicates" / name
    whole = path.read_bytes()
    for at in np.random.default_rng(0).permutation(len(whole))[:60].tolist():
        if whole[at : at + 1].isspace():
            continue
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        groups, why = load(store)
        assert groups is None, at
        assert "damaged" in why
    path.write_bytes(whole[: len(whole) // 2])
    assert load(store)[0] is None
    path.write_bytes(whole)
    assert load(store)[0] is not None


def test_a_picture_file_is_not_taken_for_groups(kept):
    store, _ = kept
    (store.root / "duplicates" / "groups.json").write_bytes(
        file_bytes(photos.Image.new("RGB", (4, 4)), "PNG")
    )
    assert "damaged" in load(store)[1]
