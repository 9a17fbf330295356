import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from solver_worlds import gaussian

from solvers.closed import Analytic, PairData, RandomSubspace
from solvers.errors import LeakError, SolverUsageError
from solvers.metrics import (
    average_precision,
    bootstrap,
    chance_map,
    paired_bootstrap,
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
