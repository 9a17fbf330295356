import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from solver_worlds import gaussian

from solvers import metrics
from solvers.closed import Analytic, PairData, RandomSubspace
from solvers.errors import LeakError, SolverUsageError
from solvers.metrics import (
    average_precision,
    balanced_mean,
    bootstrap,
    chance_map,
    chance_micro,
    micro_average_precision,
    micro_bootstrap,
    paired_bootstrap,
    quantile_bootstrap,
    ranked,
    recall_at,
    refuse_leak,
    residual_ratio,
)
from solvers.projection import Projection, identity_hash


def _by_scores(scores, positives):
    """Rank references with these scores (one query) through one-dimensional embeddings."""
    ids = np.where(positives, 0, 1 + np.arange(len(scores)))
    return average_precision(np.ones((1, 1)), [0], np.asarray(scores, dtype=float)[:, None], ids)


def test_agrees_with_scikit_learn_without_ties():
    rng = np.random.default_rng(0)
    q, r = rng.standard_normal((30, 16)), rng.standard_normal((200, 16))
    q_ids, r_ids = rng.integers(12, size=30), rng.integers(12, size=200)
    ours = average_precision(q, q_ids, r, r_ids, block=7)
    scores = q.astype(np.float32) @ r.astype(np.float32).T
    for i in range(30):
        theirs = average_precision_score(r_ids == q_ids[i], scores[i])
        assert ours.ap[i] == pytest.approx(theirs, abs=1e-12)
    assert ours.ties == 0
    best = r_ids[scores.argmax(axis=1)]
    assert np.array_equal(ours.hit1, best == q_ids)
    assert ours.map == pytest.approx(ours.ap.mean())
    assert ours.acc == pytest.approx(ours.hit1.mean())


@pytest.mark.parametrize(
    ("scores", "positives", "ap", "rank", "ties"),
    [
        ([3, 2, 1], [1, 0, 0], 1.0, 1, 0),
        ([3, 2, 1], [0, 0, 1], 1 / 3, 3, 0),
        ([2, 2, 1], [1, 0, 0], 1 / 2, 2, 1),  # a tie counts against
        ([2, 2, 2, 2], [1, 0, 0, 0], 1 / 4, 4, 3),
        ([5, 4, 4, 1], [1, 1, 0, 0], (1 + 2 / 3) / 2, 1, 1),
        ([5, 4, 3, 2], [1, 0, 1, 0], (1 + 2 / 3) / 2, 1, 0),
        ([1, 1, 0], [1, 1, 0], 1.0, 1, 0),  # ties among positives cost nothing
        ([0, 0, 0], [1, 1, 0], (1 / 2 + 2 / 3) / 2, 2, 2),
    ],
)
def test_hand_counts(scores, positives, ap, rank, ties):
    result = _by_scores(scores, np.array(positives, dtype=bool))
    assert result.ap[0] == pytest.approx(ap)
    assert (int(result.rank[0]), result.ties) == (rank, ties)
    assert bool(result.hit1[0]) == (rank == 1)


def test_brute_force_on_many_small_integer_cases():
    rng = np.random.default_rng(1)
    for _ in range(200):
        scores, positives = rng.integers(4, size=8), rng.random(8) < 0.4
        if not positives.any():
            continue
        # Worst order: every negative before the positives of the same score.
        order = sorted(range(8), key=lambda i: (-scores[i], positives[i]))
        hits, total = 0, 0.0
        for place, i in enumerate(order, start=1):
            if positives[i]:
                hits += 1
                total += hits / place
        assert _by_scores(scores, positives).ap[0] == pytest.approx(total / positives.sum())


def test_equal_rows_tie_wherever_they_stand():
    rng = np.random.default_rng(2)
    refs = rng.standard_normal((301, 500)).astype(np.float32)
    refs[300] = refs[0]  # a copy under another name; products at the edge may round differently
    queries = refs[:1] + 0.1 * rng.standard_normal((3, 500)).astype(np.float32)
    result = average_precision(queries, [0, 0, 0], refs, np.arange(301))
    assert result.ties == 3
    assert not result.hit1.any()


def _world(seed, n_queries=40, n_references=300, m=24):
    """Queries near their positives, several references of some identities, and copies of rows."""
    rng = np.random.default_rng(seed)
    refs = rng.standard_normal((n_references, m)).astype(np.float32)
    ids = rng.integers(n_references // 2, size=n_references)
    refs[n_references // 2 + 1 :: 7] = refs[::7][: len(refs[n_references // 2 + 1 :: 7])]
    own = rng.integers(n_references, size=n_queries)
    queries = (refs[own] + rng.standard_normal((n_queries, m))).astype(np.float32)
    return queries, ids[own], refs, ids


def _in_blocks(refs, sizes):
    edges = np.cumsum([0, *itertools.islice(itertools.cycle(sizes), len(refs))])
    return (refs[a:b] for a, b in itertools.pairwise(edges) if a < len(refs))


@pytest.mark.parametrize(("sizes", "block"), [((1,), 64), ((7, 1, 40), 13), ((299,), 1), ((1000,), 13)])
def test_a_ranking_does_not_depend_on_how_references_and_queries_come(sizes, block):
    queries, q_ids, refs, ids = _world(7)
    whole = average_precision(queries, q_ids, refs, ids, top=5)
    parts = ranked(queries, q_ids, ids, _in_blocks(refs, sizes), lambda at: refs[at], block=block, top=5)
    assert whole.ties > 0, "the copies are there to tie"
    for name in ("ap", "rank", "hit1", "tied", "queries", "margin"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    for one, other in ((whole.positives, parts.positives), (whole.negatives, parts.negatives)):
        for name in vars(one):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_lists_are_those_of_brute_force_in_float64():
    queries, q_ids, refs, ids = _world(8)
    found = average_precision(queries, q_ids, refs, ids, top=6)
    scores = queries.astype(float) @ refs.astype(float).T
    for i, (s, own) in enumerate(zip(scores, q_ids[:, None] == ids, strict=True)):
        others = np.flatnonzero(~own)
        best = others[np.argsort(-s[others], kind="stable")][:6]
        assert found.negatives.score[i] == pytest.approx(s[best], abs=1e-12)
        assert found.margin[i] == pytest.approx(s[own].max() - s[best[0]], abs=1e-12)
        mine = found.positives.of == i
        assert set(found.positives.position[mine].tolist()) == set(np.flatnonzero(own).tolist())
        for position, rank in zip(found.positives.position[mine], found.positives.rank[mine], strict=True):
            # Copies have equal scores up to the order of a sum; those count against.
            above = np.count_nonzero(s[others] >= s[position] - 1e-12)
            assert rank == above + 1 + np.count_nonzero(s[own] > s[position] + 1e-12) or (
                np.count_nonzero(np.abs(s[own] - s[position]) <= 1e-12) > 1
            )
        for k in (1, 5, 100):
            assert recall_at(found, k)[i] == (np.count_nonzero(s[others] >= s[own].max() - 1e-12) < k)


def test_scores_nearer_than_float32_are_ordered_in_float64():
    """Rows that differ in their last bits, among many: float32 products put them in any order."""
    rng = np.random.default_rng(14)
    base = rng.standard_normal(400)
    refs = (base + 1e-7 * rng.standard_normal((500, 400))).astype(np.float32)
    queries = (base + rng.standard_normal((20, 400))).astype(np.float32)
    q_ids = np.arange(20)
    found = average_precision(queries, q_ids, refs, np.arange(500), top=3)
    scores = (refs[None].astype(float) * queries[:, None].astype(float)).sum(axis=2)
    lost = 0
    for i, s in enumerate(scores):
        others = np.delete(np.arange(500), i)
        best = others[np.lexsort((others, -s[others]))][:3]
        assert np.array_equal(found.negatives.position[i], best)
        assert found.rank[i] == 1 + np.count_nonzero(s[others] >= s[i])
        single = refs @ queries[i]
        lost += not np.array_equal(others[np.argsort(-single[others], kind="stable")][:3], best)
    assert lost > 10, "float32 alone would have lost the order"


def test_a_subset_is_the_ranking_of_those_queries_alone():
    queries, q_ids, refs, ids = _world(9)
    chosen = np.arange(len(queries)) % 3 == 1
    cut = average_precision(queries, q_ids, refs, ids, top=4).subset(chosen)
    alone = average_precision(queries[chosen], q_ids[chosen], refs, ids, top=4)
    for name in ("ap", "rank", "tied", "margin", "ties"):
        assert np.array_equal(getattr(cut, name), getattr(alone, name)), name
    assert np.array_equal(cut.positives.of, alone.positives.of)
    assert micro_average_precision(cut, top=4) == micro_average_precision(alone, top=4)


def test_blocks_that_do_not_fit_the_identities_are_refused():
    refs = np.eye(4, dtype=np.float32)
    for blocks in ([refs], [refs[:2]], [refs, refs]):
        with pytest.raises(SolverUsageError, match=r"3 identities|5 identities"):
            ranked(refs[:1], [0], range(5 if len(blocks) == 1 else 3), blocks, lambda at: refs[at % 4])


def test_queries_without_positive_are_left_out_and_counted():
    refs = np.eye(3)
    result = average_precision(np.eye(3), ["a", "x", "c"], refs, ["a", "b", "c"])
    assert result.n_without == 1
    assert result.queries.tolist() == [0, 2]
    assert result.ap.tolist() == [1.0, 1.0]
    assert result.n_references == 3


def test_wrong_input_is_refused():
    with pytest.raises(SolverUsageError, match="not finite"):
        average_precision(np.array([[np.nan]]), [0], np.ones((2, 1)), [0, 1])
    with pytest.raises(SolverUsageError, match="identities"):
        average_precision(np.ones((1, 1)), [0, 1], np.ones((2, 1)), [0, 1])
    with pytest.raises(SolverUsageError, match="kind"):
        average_precision(np.ones((1, 1)), [0], np.ones((2, 1)), ["0", "1"])
    with pytest.raises(SolverUsageError, match="columns"):
        average_precision(np.ones((1, 1)), [0], np.ones((2, 2)), [0, 1])


@pytest.mark.parametrize(
    ("scores", "positives", "top", "expected"),
    [
        # One list over both queries: + - + - by score.
        ([[4, 1], [3, 2]], [[1, 0], [0, 1]], 2, (1 + 2 / 3) / 2),
        # Each query's first is right; a score of one query stands above all of the other's.
        ([[4, 3], [2, 1]], [[1, 0], [1, 0]], 2, (1 + 2 / 3) / 2),
        ([[4, 3], [2, 1]], [[1, 0], [1, 0]], 1, 1.0),
        # Beyond the list a positive is not found.
        ([[4, 3], [2, 1]], [[0, 1], [1, 0]], 1, (1 / 2) / 2),
        # Equal scores stand in the worst order, also between queries.
        ([[2, 1], [2, 2]], [[1, 0], [0, 1]], 1, (1 / 2) / 2),
        ([[2, 2], [1, 0]], [[1, 0], [1, 0]], 2, (1 / 2 + 2 / 3) / 2),
    ],
)
def test_micro_average_precision_by_hand(scores, positives, top, expected):
    # A reference for each cell: what a query scores with another's is far below.
    n, m = np.shape(scores)
    refs = np.full((n * m, n), -9.0)
    refs[np.arange(n * m), np.repeat(np.arange(n), m)] = np.ravel(scores)
    ids = np.where(np.ravel(positives), np.repeat(np.arange(n), m), 99)
    ranking = average_precision(np.eye(n), np.arange(n), refs, ids, top=2)
    assert micro_average_precision(ranking, top=top) == pytest.approx(expected)


def test_micro_average_precision_over_all_pairs_is_scikit_learns():
    queries, q_ids, refs, ids = _world(10, n_references=60)
    refs += np.random.default_rng(0).standard_normal(refs.shape).astype(np.float32)  # no copies, no ties
    ranking = average_precision(queries, q_ids, refs, ids, top=60)
    scores = queries.astype(float) @ refs.astype(float).T
    theirs = average_precision_score((q_ids[:, None] == ids).ravel(), scores.ravel())
    assert micro_average_precision(ranking, top=60) == pytest.approx(theirs, abs=1e-12)
    with pytest.raises(SolverUsageError, match="top=61"):
        micro_average_precision(ranking, top=61)


def test_micro_average_precision_falls_when_scores_mean_another_thing_for_each_query():
    """One threshold serves all: the opposite of mAP, which a shift of a query's scores leaves alone."""
    queries, q_ids, refs, ids = _world(11)
    shifts = 40 * np.arange(len(queries))[:, None] * (np.arange(len(queries)) % 2)[:, None]
    wide = np.hstack([queries, shifts]).astype(np.float32)
    refs = np.hstack([refs, np.ones((len(refs), 1), np.float32)])
    plain = average_precision(np.hstack([queries, 0 * shifts]), q_ids, refs, ids, top=10)
    moved = average_precision(wide, q_ids, refs, ids, top=10)
    assert moved.map == pytest.approx(plain.map, abs=1e-3)  # float32 products of larger numbers
    assert micro_average_precision(moved) < 0.8 * micro_average_precision(plain)


def test_chance_of_micro_average_precision_is_the_mean_of_random_scores():
    rng = np.random.default_rng(12)
    found = []
    for _ in range(300):
        refs, queries = rng.standard_normal((30, 12)), rng.standard_normal((20, 12))
        ranking = average_precision(queries, rng.integers(30, size=20), refs, np.arange(30), top=5)
        found.append(micro_average_precision(ranking, top=5))
    error = np.std(found) / np.sqrt(len(found))
    assert chance_micro(20, 30, top=5) == pytest.approx(np.mean(found), abs=4 * error)
    assert chance_micro(1, 7, top=1) == pytest.approx(1 / 7)


def test_a_balanced_mean_weighs_strata_and_a_plain_one_queries():
    values, strata = np.array([1.0, 1, 1, 0]), np.array(["a", "a", "a", "b"])
    assert balanced_mean(values, strata) == 0.5
    assert balanced_mean(values) == 0.75
    groups = np.arange(4)
    one = bootstrap(values, groups, strata=np.zeros(4))
    assert one == bootstrap(values, groups)
    # The stratum of one is in some samples alone, in others not at all.
    assert bootstrap(values, groups, strata=strata) != one


def test_the_interval_of_a_balanced_mean_has_its_level():
    """Strata of very different sizes share groups; 95 % of intervals hold the truth."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        photo = rng.standard_normal(60)
        groups = np.concatenate([np.arange(60), np.arange(0, 60, 4)])
        strata = np.repeat([0, 1], [60, 15])
        values = photo[groups] + 0.5 * rng.standard_normal(75) + strata
        low, high = bootstrap(values, groups, strata=strata, repeats=300, seed=seed)
        held += low <= 0.5 <= high
    # Of 100 at 0.95: below 88 in one of 300 runs; the percentile interval is a little narrow.
    assert held >= 86


def test_intervals_of_micro_average_precision_and_quantiles_resample_groups():
    queries, q_ids, refs, ids = _world(13, n_queries=120)
    ranking = average_precision(queries, q_ids, refs, ids, top=10)
    alone, photos = np.arange(120), np.arange(120) // 30
    value = micro_average_precision(ranking)
    narrow, wide = micro_bootstrap(ranking, alone), micro_bootstrap(ranking, photos)
    for low, high in (narrow, wide):
        assert low <= value <= high
    assert micro_bootstrap(ranking, alone, seed=3) == micro_bootstrap(ranking, alone, seed=3)
    # All queries of one photo: nothing to resample.
    assert micro_bootstrap(ranking, np.zeros(120)) == pytest.approx((value, value))
    copies = np.repeat(np.random.default_rng(0).standard_normal(30), 8)
    spans = {
        name: quantile_bootstrap(copies, groups, [0.5])[0]
        for name, groups in (("photos", np.repeat(np.arange(30), 8)), ("queries", np.arange(240)))
    }
    width = {name: high - low for name, (low, high) in spans.items()}
    assert width["photos"] > 1.5 * width["queries"]
    assert spans["photos"][0] <= np.median(copies) <= spans["photos"][1]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (6, 2), (6, 5), (6, 6)])
def test_chance_is_the_mean_over_all_orders(n, k):
    total = []
    for places in itertools.combinations(range(1, n + 1), k):
        total.append(np.mean([i / place for i, place in enumerate(places, start=1)]))
    assert chance_map(n, k) == pytest.approx(np.mean(total))


def test_random_embeddings_score_about_chance():
    rng = np.random.default_rng(4)
    result = average_precision(
        rng.standard_normal((400, 8)), np.arange(400), rng.standard_normal((400, 8)), np.arange(400)
    )
    low, high = bootstrap(result.ap, np.arange(400))
    assert low < chance_map(400) < high


def test_bootstrap_resamples_groups_not_values():
    rng = np.random.default_rng(5)
    per_group = rng.standard_normal(40)
    values, groups = np.repeat(per_group, 25), np.repeat(np.arange(40), 25)
    low, high = bootstrap(values, groups)
    # Copies add nothing: the width is that of 40 values (1.96 / sqrt(40) each way, within bootstrap noise).
    assert high - low == pytest.approx(2 * 1.96 * per_group.std() / np.sqrt(40), rel=0.2)
    naive_low, naive_high = bootstrap(values, np.arange(1000))
    assert naive_high - naive_low < 0.4 * (high - low)
    assert bootstrap(values, groups, seed=1) == bootstrap(values, groups, seed=1)
    assert bootstrap(values, groups, level=0.5)[0] > low


def test_shuffled_pairs_show_no_gain_and_real_ones_do():
    o, g, y = gaussian(64, 150, 1, extra=100)
    data = PairData.from_gallery(o)
    ids = np.arange(len(o))
    good = Analytic(0.3, None).fit(data).projection()
    plain = RandomSubspace(24).fit(data).projection()

    def ap(p, labels):
        return average_precision(p.queries(g), labels, p.references(o), ids).ap

    assert paired_bootstrap(ap(good, y), ap(plain, y), y)[0] > 0
    shuffled = np.roll(y, 1)  # a permutation without fixed points: one true pair left would be a gain
    low, _ = paired_bootstrap(ap(good, shuffled), ap(plain, shuffled), shuffled)
    assert low <= 0


def test_residual_ratio_is_the_definition():
    rng = np.random.default_rng(6)
    o, g = rng.standard_normal((2, 50, 16))
    center = rng.standard_normal(16).astype(np.float32)
    W, V = rng.standard_normal((2, 16, 5)).astype(np.float32)
    mu = center.astype(float)
    one = Projection(W, W, center=center)
    expected = np.linalg.norm((g - o) @ W) / np.linalg.norm((o - mu) @ W)
    assert residual_ratio(one, o, g) == pytest.approx(expected, rel=1e-12)
    two = Projection(W, V, center=center)
    expected = np.linalg.norm((g - mu) @ W - (o - mu) @ V) / np.linalg.norm((o - mu) @ V)
    assert residual_ratio(two, o, g) == pytest.approx(expected, rel=1e-12)
    assert residual_ratio(one, o, o) == 0.0


def test_reporting_on_identities_used_for_choosing_is_refused():
    W = np.eye(4, 2)
    p = Projection(W, W).using(["ann", "bob"])
    refuse_leak(p, ["cid", "dan"])
    for identities in (["cid", "bob"], identity_hash(["ann"])):
        with pytest.raises(LeakError, match="1 of the"):
            refuse_leak(p, identities)
    refuse_leak(Projection(W, W), ["ann"])


def test_resamples_that_are_kept_are_those_of_the_seed(monkeypatch):
    rng = np.random.default_rng(0)
    values, groups, strata = rng.standard_normal(300), rng.integers(60, size=300), np.arange(300) % 3

    def intervals(seed):
        return [
            *bootstrap(values, groups, strata=strata, repeats=120, seed=seed),
            *quantile_bootstrap(values, groups, [0.5], repeats=120, seed=seed)[0],
        ]

    kept = intervals(1)
    assert intervals(1) == kept
    monkeypatch.setattr(metrics, "_KEPT", 0)
    # Products of 120 rows or of 50 at a time: sums of 60 numbers may be added in another order.
    assert intervals(1) == pytest.approx(kept, rel=60 * np.finfo(float).eps)
    assert intervals(2) != pytest.approx(kept, rel=1e-3)
