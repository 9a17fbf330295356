"""The stated false-alarm rate: exact on any distribution of scores, and broken without what makes it so."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest
from solver_worlds import gaussian

from solvers.analytic import Analytic
from solvers.closed import PairData, Pca, Plda
from solvers.errors import ProjectionFormatError, SolverUsageError
from solvers.projection import Projection
from solvers.verdict import (
    CANDIDATES,
    LEAD,
    Calibration,
    alike,
    exact_interval,
    pair_scores,
    standing,
    verdict_map,
)

DRAWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy": lambda rng, n: rng.standard_cauchy(n),
    "bounded": lambda rng, n: rng.beta(9, 2, n),
}


def calibration(n=200, seed=0, kinds=1, positives=0):
    rng = np.random.default_rng(seed)
    negatives = {f"kind {i}": rng.standard_normal(n) for i in range(kinds)}
    return Calibration(negatives, rng.standard_normal(positives) + 3, rng.random(positives) < 0.9, "these")


# --- the rate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("n", [20, 57, 200])
def test_the_false_alarm_rate_is_exact_whatever_the_scores(draw, n):
    """P(called) = floor(level (n + 1)) / (n + 1) over calibrations and new pictures."""
    rng = np.random.default_rng(n)
    times, each = 400, 50
    calls = {"match": 0, "doubtful": 0}
    for _ in range(times):
        made = Calibration({"k": draw(rng, n)})
        p = made.p(draw(rng, each))
        for decision in calls:
            calls[decision] += int((p <= made.levels[decision] * (1 + 1e-9)).sum())
    for decision, count in calls.items():
        stated = made.rates(decision).false_alarm
        level = made.levels[decision]
        assert stated == pytest.approx(int(level * (n + 1) + 1e-9) / (n + 1))
        # The pictures of one calibration share its bar: variance of the Beta, plus the binomial's.
        shared = beta(stated * (n + 1), (1 - stated) * (n + 1)).var()
        spread = np.sqrt((shared + stated * (1 - stated) / each) / times)
        assert abs(count / (times * each) - stated) < 4 * spread


def test_without_the_plus_one_the_rate_does_not_hold():
    """The opposite: 'no negative scored as high' is not 0 %, it is 1 / (n + 1)."""
    rng = np.random.default_rng(0)
    n, hits = 20, 0
    for _ in range(2000):
        negatives, new = rng.standard_normal(n), rng.standard_normal()
        hits += (negatives >= new).mean() <= 0.01
    assert binom(2000, 0.01).sf(hits - 1) < 1e-6
    assert hits / 2000 == pytest.approx(1 / (n + 1), abs=4 * np.sqrt(0.05 / 2000))


def test_the_largest_p_of_the_kinds_counts():
    made = Calibration({"low": np.linspace(0, 1, 100), "high": np.linspace(5, 6, 50)})
    assert made.p(3.0) == 1.0  # above every low one, below every high one
    assert made.p(9.0) == 1 / 51
    assert made.n == 50
    # Whatever the kind of a new picture, it is called no more often than stated.
    rng = np.random.default_rng(1)
    for shift in (0.0, 2.0):
        rates = []
        for _ in range(300):
            two = Calibration({"a": rng.standard_normal(120), "b": rng.standard_normal(120) + 2})
            rates.append((two.p(rng.standard_normal(40) + shift) <= 0.1).mean())
        assert np.mean(rates) < two.rates("doubtful").false_alarm + 4 * np.std(rates) / np.sqrt(300)
    assert np.mean(rates) > 0.08  # the worst kind reaches it


def test_the_interval_holds_the_true_rate_of_its_own_calibration():
    """Of uniform scores the true rate is known: one less the bar. 95 % of intervals hold it, exactly."""
    rng = np.random.default_rng(2)
    times, held = 2000, {"match": 0, "doubtful": 0}
    for _ in range(times):
        made = Calibration({"k": rng.random(300)})
        for decision in held:
            low, high = made.rates(decision).false_alarm_interval
            held[decision] += low <= 1 - made.bar(decision) <= high
    for count in held.values():
        assert binom(times, 0.95).cdf(count) > 1e-4
        assert binom(times, 0.95).sf(count - 1) > 1e-4


@pytest.mark.parametrize(("hits", "n"), [(0, 30), (30, 30), (1, 40), (17, 40), (199, 200)])
def test_detection_has_the_exact_binomial_interval(hits, n):
    exact = binomtest(hits, n).proportion_ci(method="exact")
    assert exact_interval(hits, n) == pytest.approx((exact.low, exact.high), abs=1e-12)


# --- decisions -----------------------------------------------------------------------------------


def test_a_score_must_lie_above_the_bar():
    made = calibration(kinds=2)
    for decision, lesser in (("match", "doubtful"), ("doubtful", "no origin here")):
        bar = made.bar(decision)
        assert made.decide(bar) == lesser  # ties count against the match
        assert made.decide(np.nextafter(bar, np.inf)) == decision
    assert made.decide(-np.inf) == "no origin here"
    assert made.decide(np.inf) == "match"
    assert made.p(np.nan) == 1.0
    assert made.decide(np.nan) == "no origin here"  # a broken picture matches nothing


def test_few_pictures_support_no_low_bar():
    assert calibration(20).levels["match"] == pytest.approx(1 / 21)
    assert calibration(99).levels["match"] == pytest.approx(0.01)
    assert calibration(2000).levels == {"match": 0.01, "doubtful": 0.1}
    assert calibration(20).decide(100.0) == "match"
    with pytest.raises(SolverUsageError, match="19 pictures; at least 20"):
        calibration(19)
    with pytest.raises(SolverUsageError, match="not finite"):
        Calibration({"k": np.append(np.zeros(30), np.nan)})
    with pytest.raises(SolverUsageError, match="2 positive scores and 1 marks"):
        Calibration({"k": np.zeros(30)}, np.zeros(2), np.zeros(1, bool))
    with pytest.raises(SolverUsageError, match="0 pictures"):
        Calibration({})


def test_detection_counts_what_ranks_first_and_passes():
    negatives = {"k": np.arange(100.0)}
    made = Calibration(negatives, [200, 200, 95, 50, 200], [True, False, True, True, True], "these")
    match, doubtful = made.rates("match"), made.rates("doubtful")
    assert match.detection == 2 / 5
    assert doubtful.detection == 3 / 5
    assert doubtful.detection_interval == exact_interval(3, 5)
    assert made.denied == 1 / 5  # the one that scores 50; the wrong one is told a match, and is a miss
    # What misses the last bar is told what that bar is worth.
    assert made.rates("no origin here") == doubtful
    bare = Calibration(negatives)
    assert bare.rates("match").detection is None
    assert bare.denied is None


def test_it_is_kept_as_plain_arrays(tmp_path):
    made = calibration(40, kinds=2, positives=25)
    made = dataclasses.replace(made, facts={"photos": 40})
    path = tmp_path / "v.safetensors"
    made.save(path)
    again = Calibration.load(path)
    assert list(again.negatives) == list(made.negatives)
    assert all(np.array_equal(again.negatives[k], made.negatives[k]) for k in made.negatives)
    assert np.array_equal(again.positives, made.positives)
    assert np.array_equal(again.found, made.found)
    assert (again.positives_of, again.facts) == ("these", {"photos": 40})
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ProjectionFormatError, match="checksum"):
        Calibration.load(path)
    Projection(np.eye(2), np.eye(2)).save(path)
    with pytest.raises(ProjectionFormatError, match=r"not a solvers\.verdict file"):
        Calibration.load(path)


# --- the score -----------------------------------------------------------------------------------


def test_the_score_measures_both_norms_under_the_reference_map():
    rows, g, _ = gaussian(32, 80, 1)
    W = Analytic(0.1, None).fit(PairData.from_gallery(rows)).projection()
    for given in (W, W.with_score("bias")):
        V = verdict_map(given)
        q, r = g[:5].astype(np.float64) - V.center, rows[:5].astype(np.float64) - V.center
        product = ((q @ V.query_map) * (r @ V.reference_map)).sum(axis=1)
        norms = [np.linalg.norm(x @ V.reference_map.astype(np.float64), axis=1) for x in (q, r)]
        assert pair_scores(V, g[:5], rows[:5]) == pytest.approx(product / norms[0] / norms[1], rel=1e-12)
    symmetric = Pca(8).fit(PairData.from_gallery(rows)).projection()
    assert verdict_map(symmetric) is symmetric
    assert verdict_map(symmetric.with_score("bias")).score == "cosine"
    learned = Plda(rank=12).fit(PairData.from_arrays(rows, g)).projection()
    assert verdict_map(learned).norm_map is not None


def test_a_score_does_not_depend_on_its_company():
    rows, g, _ = gaussian(48, 1500, 1)
    V = verdict_map(Analytic(0.1, 16).fit(PairData.from_gallery(rows[:200])).projection())
    together = pair_scores(V, g, rows)
    for i in (0, 700, 1499):
        # Float64 sums in another order: some eps of the terms.
        assert together[i] == pytest.approx(pair_scores(V, g[i : i + 1], rows[i : i + 1])[0], rel=1e-12)
    assert pair_scores(V, g[:0], rows[:0]).shape == (0,)


def test_standing_is_the_score_times_the_cube_root_of_its_lead():
    rng = np.random.default_rng(0)
    first, others = rng.random(50) + 2, rng.random((50, 60))
    rest = np.sort(others, axis=1)[:, ::-1][:, 2:22]
    expected = first * ((first - rest.mean(axis=1)) / rest.std(axis=1)) ** (1 / 3)
    near = {"rtol": 1e-12}  # sums of twenty terms
    np.testing.assert_allclose(standing(first, others), expected, **near)
    np.testing.assert_allclose(standing(first, rng.permuted(others, axis=1)), expected, **near)
    np.testing.assert_allclose(standing(first, np.insert(others, 7, np.nan, axis=1)), expected, **near)
    np.testing.assert_allclose(standing(first * 7, others * 7), expected * 7, **near)
    # Only the best count, and CANDIDATES hold them.
    best = -np.sort(-others, axis=1)[:, : CANDIDATES - 1]
    assert np.array_equal(standing(first, best), standing(first, others))


def test_the_score_decides_where_nothing_can_be_compared():
    first, others = np.array([0.9]), np.linspace(0, 0.5, 30)[None]
    alone = first * LEAD ** (1 / 3)
    assert standing(first, others[:, :6]) == pytest.approx(alone)  # four beyond the two
    assert standing(first, others[:, :7]) != pytest.approx(alone)
    assert standing(first, others[:, :0]) == pytest.approx(alone)
    assert standing(first, np.full((1, 30), np.nan)) == pytest.approx(alone)
    # Equal but for rounding: a lead of billions would be noise.
    assert standing(first, 0.3 + 1e-16 * others) == pytest.approx(alone)
    assert standing(first, 0.3 * (1 + 1e-14 * others)) == pytest.approx(alone)
    assert standing(first, np.zeros((1, 30))) == pytest.approx(alone)
    assert standing(-first, others[:, :0]) == 0
    assert standing(-first, others - 2) == 0
    assert standing(np.array([0.1]), others) == 0  # below those that it is compared with
    assert standing(np.array([np.nan]), others) == 0
    assert standing(np.zeros(0), np.zeros((0, 30))).shape == (0,)


def test_what_looks_like_the_first_one_is_no_company():
    turned = np.array([[np.cos(a), np.sin(a)] for a in (0.0, 0.1, 0.3, 0.4, np.pi)])
    assert alike(turned[0], turned).tolist() == [True, True, True, False, False]  # cos 0.3 = 0.955
    assert alike(turned[0], turned, 0.98).tolist() == [True, True, False, False, False]


def test_two_near_duplicates_do_not_take_a_lead_and_three_do():
    rng = np.random.default_rng(1)
    first, others = np.full(200, 1.0), 0.3 + 0.05 * rng.standard_normal((200, 40))
    alone = standing(first, others)
    for copies in (1, 2):
        crowded = standing(first, np.concatenate([np.full((200, copies), 0.98), others], axis=1))
        assert (crowded > 0.7 * alone).all()
    crowded = standing(first, np.concatenate([np.full((200, 3), 0.98), others], axis=1))
    assert (crowded < 0.7 * alone).all()


@pytest.mark.parametrize(("alike", "gains"), [(2.0, True), (0.0, False)])
def test_a_lead_finds_copies_where_strangers_have_many_likes(alike, gains):
    """A picture of a crowded kind scores high against all of that kind, above a weak copy of another.

    The opposite: where no kinds are, the score alone does as well.
    """
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((10, 200))

    def pictures(n):
        kind = np.arange(n) % 10
        return rng.standard_normal((n, 200)) + alike * (kind % 2)[:, None] * centres[kind]

    def weak(x):
        return x + 3 * rng.standard_normal(x.shape)

    gallery, strangers = pictures(300), pictures(300)
    V = verdict_map(Pca(None).fit(PairData.from_gallery(pictures(900).astype(np.float32))).projection())

    def parts(queries):
        ranked = -np.sort(-(V.queries(queries) @ V.references(gallery).T), axis=1)
        return ranked[:, 0], standing(ranked[:, 0], ranked[:, 1:])

    here, away = parts(weak(gallery)), {"clean": parts(strangers), "weak": parts(weak(strangers))}
    score, stands = (
        (Calibration({kind: found[i] for kind, found in away.items()}).p(here[i]) <= 0.1).mean()
        for i in (0, 1)
    )
    # 300 each: a share is known to some 3 %.
    assert stands > score + 0.3 if gains else abs(stands - score) < 0.1


def test_calibrating_on_the_fitted_rows_breaks_the_verdict():
    """300 rows, 800 dimensions: with a query's norm in s^-1/2 and fitted rows as negatives nothing is found.

    The norm of a new picture, or of a noisy copy, is another one than that of the rows that were fitted. The
    same pictures, half of them to fit and half to calibrate on, with both norms in a^2 / s: it works.
    """
    rows, _, _ = gaussian(800, 1300, 1, decay=2.0)
    n, new = 300, rows[300:]
    gallery = rows[:n]
    noise = np.random.default_rng(0).standard_normal((200, 800))
    copies = gallery[:200] + 0.2 * gallery.std(axis=0) * noise

    def passed(V, calibrated):
        references = V.references(gallery)

        def top(queries, own=None):
            scores = V.queries(queries) @ references.T
            if own is not None:
                scores[np.arange(len(own)), own] = -np.inf
            return scores.max(axis=1)

        made = Calibration({"as they are": top(gallery[calibrated], calibrated)})
        return [(made.p(top(x)) <= 0.1).mean() for x in (new, copies)], made.rates("doubtful")

    own = Analytic(0.1, None).fit(PairData.from_gallery(gallery)).projection()
    (alarms, detected), rates = passed(own, np.arange(n))
    assert alarms < rates.false_alarm_interval[0]
    assert detected < 0.1
    half = Analytic(0.1, None).fit(PairData.from_gallery(gallery[: n // 2])).projection()
    (alarms, detected), rates = passed(verdict_map(half), np.arange(n // 2, n))
    assert rates.false_alarm_interval[0] <= alarms <= rates.false_alarm_interval[1]
    assert detected > 0.8
