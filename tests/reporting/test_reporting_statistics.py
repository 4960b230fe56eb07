"""The statistics of reports against scipy, and against resamples that were written out row by row."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torchmetrics.classification import BinaryF1Score

from reft_lightning.evaluation.classifier_metrics import matthews
from reft_lightning.reporting.scores import F1, Matthews, Mean, Pearson, RowMean, Spearman
from reft_lightning.reporting.statistics import (
    bootstrap_p,
    holm,
    mcnemar,
    over_seeds,
    percentile_interval,
    resample_rows,
    row_counts,
    satterthwaite,
    seed_weights,
    sign_flip_tests,
    t_interval,
    t_p,
    widest_t,
)

FEW = settings(max_examples=60, deadline=None)
ROWS = st.integers(4, 25)
# rounded: with ties, and without sums of squares that vanish in rounding
NUMBERS = st.floats(-5, 5).map(lambda x: round(x, 2))


def rng(seed=0):
    return np.random.default_rng(seed)


@st.composite
def weighted(draw, elements, columns=2):
    """Return columns of rows, and how often each row occurs in some resamples."""
    n = draw(ROWS)
    values = [np.array(draw(st.lists(elements, min_size=n, max_size=n)), float) for _ in range(columns)]
    weights = draw(hnp.arrays(np.int64, (3, n), elements=st.integers(0, 3)))
    weights[:, 0] += 1  # no empty resample
    return values, weights.astype(float)


def repeated(values, weights):
    """Write a resample out, each row as often as it was drawn."""
    return [np.repeat(column, weights.astype(int)) for column in values]


def constant(*columns):
    return any(np.ptp(column) == 0 for column in columns)


class TestMeasuresOfWeightedRows:
    @FEW
    @given(weighted(st.sampled_from([0.0, 1.0, 0.25]), columns=1))
    def test_a_mean_is_that_of_the_rows_written_out(self, given):
        (scores,), weights = given
        expected = [np.mean(*repeated([scores], w)) for w in weights]
        np.testing.assert_allclose(RowMean(scores).value(weights), expected, atol=1e-12)

    @FEW
    @given(weighted(NUMBERS))
    def test_pearson_is_scipys_of_the_rows_written_out(self, given):
        (said, gold), weights = given
        for value, w in zip(Pearson(said, gold).value(weights), weights, strict=True):
            x, y = repeated([said, gold], w)
            expected = 0.0 if constant(x, y) else stats.pearsonr(x, y).statistic
            assert value == pytest.approx(expected, abs=1e-6)

    @FEW
    @given(weighted(st.integers(0, 6).map(float)))
    def test_spearman_is_scipys_of_the_rows_written_out_ties_and_all(self, given):
        (said, gold), weights = given
        for value, w in zip(Spearman(said, gold).value(weights), weights, strict=True):
            x, y = repeated([said, gold], w)
            expected = 0.0 if constant(x, y) else stats.spearmanr(x, y).statistic
            assert value == pytest.approx(expected, abs=1e-9)

    @FEW
    @given(weighted(st.integers(0, 2)))
    def test_matthews_is_that_of_the_evaluation(self, given):
        (said, gold), weights = given
        said, gold = said.astype(int), gold.astype(int)
        for value, w in zip(Matthews(said, gold, 3).value(weights), weights, strict=True):
            confusion = torch.zeros(3, 3, dtype=torch.float64)
            for p, t, count in zip(said, gold, w, strict=True):
                confusion[t, p] += count
            assert value == pytest.approx(matthews(confusion), abs=1e-12)

    @FEW
    @given(weighted(st.integers(0, 1)))
    def test_f1_is_torchmetrics_of_the_rows_written_out(self, given):
        (said, gold), weights = given
        for value, w in zip(F1(said, gold).value(weights), weights, strict=True):
            x, y = (torch.tensor(column) for column in repeated([said, gold], w))
            assert value == pytest.approx(float(BinaryF1Score()(x, y.long())), abs=1e-6)

    def test_a_combination_is_the_mean_of_its_parts(self):
        x, y = rng().normal(size=(2, 30))
        weights = rng(1).integers(1, 4, size=(5, 30)).astype(float)
        parts = Pearson(x, y), Spearman(x, y)
        expected = (parts[0].value(weights) + parts[1].value(weights)) / 2
        np.testing.assert_allclose(Mean(parts).value(weights), expected)


class TestBootstrap:
    @given(st.integers(1, 300), st.integers(1, 700))
    @settings(max_examples=20, deadline=None)
    def test_every_resample_draws_as_many_rows_as_there_are(self, rows, resamples):
        parts = list(row_counts(rows, resamples, rng()))
        counts = np.concatenate([part for _, part in parts])
        assert counts.shape == (resamples, rows)
        assert (counts.sum(1) == rows).all()
        assert [p.start for p, _ in parts[1:]] == [p.stop for p, _ in parts[:-1]]

    def test_rows_are_drawn_evenly_and_with_replacement(self):
        counts = np.concatenate([part for _, part in row_counts(40, 20_000, rng())])
        np.testing.assert_allclose(counts.mean(0), 1, atol=0.04)
        np.testing.assert_allclose(counts.var(0), 1 - 1 / 40, atol=0.06)  # multinomial

    def test_of_one_seed_the_interval_is_scipys(self):
        scores = rng(3).normal(size=150)
        draws = resample_rows([RowMean(scores)], 150, 20_000, rng())[:, 0]
        low, high = percentile_interval(draws)
        theirs = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=rng(1))
        assert low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
        assert high == pytest.approx(theirs.confidence_interval.high, abs=0.01)
        assert draws.std() == pytest.approx(theirs.standard_error, rel=0.03)

    def test_the_interval_of_a_correlation_is_scipys(self):
        x = rng(0).normal(size=120)
        y = x + rng(1).normal(size=120)
        draws = resample_rows([Pearson(x, y), Spearman(x, y)], 120, 10_000, rng())

        def pearson(a, b, axis):
            return stats.pearsonr(a, b, axis=axis)[0]

        def spearman(a, b, axis):
            return pearson(stats.rankdata(a, axis=axis), stats.rankdata(b, axis=axis), axis)

        for k, statistic in enumerate((pearson, spearman)):
            theirs = stats.bootstrap(
                (x, y), statistic, paired=True, n_resamples=4000, method="percentile", rng=rng(2)
            ).confidence_interval
            assert percentile_interval(draws[:, k]) == pytest.approx((theirs.low, theirs.high), abs=0.015)

    def test_measures_of_one_call_see_the_same_resamples(self):
        scores = (rng().random(50) < 0.5).astype(float)
        draws = resample_rows([RowMean(scores), RowMean(1 - scores), RowMean(scores)], 50, 500, rng())
        np.testing.assert_allclose(draws[:, 0] + draws[:, 1], 1)
        np.testing.assert_array_equal(draws[:, 0], draws[:, 2])

    @given(st.integers(1, 6))
    @settings(max_examples=6, deadline=None)
    def test_seeds_weigh_one_together(self, seeds):
        weights = seed_weights(seeds, 4000, rng())
        np.testing.assert_allclose(weights.sum(1), 1)
        np.testing.assert_allclose(weights.mean(0), 1 / seeds, atol=0.03)

    @pytest.mark.parametrize("seeds", [2, 3, 5])
    def test_resampled_seeds_have_the_standard_error_of_the_mean(self, seeds):
        scores = rng(7).normal(size=seeds)
        means = seed_weights(seeds, 40_000, rng()) @ scores
        assert means.var() == pytest.approx(scores.var(ddof=1) / seeds, rel=0.03)

    @pytest.mark.parametrize("seeds", [1, 2, 5])
    def test_rows_and_seeds_vary_as_the_formula_says(self, seeds):
        scores = rng(5).random((seeds, 60)) + 0.5 * rng(6).random((seeds, 1))
        draws = resample_rows([RowMean(line) for line in scores], 60, 40_000, rng())
        both = over_seeds(draws, seed_weights(seeds, 40_000, rng(1)))

        # E[w w'] of multinomial counts over n, divided by n, their variance times `by`
        def second(n, by=1.0):
            return 1 / n**2 + by * (np.eye(n) - 1 / n) / n**2

        by = seeds / (seeds - 1) if seeds > 1 else 1
        moments = second(seeds, by), second(60)
        expected = np.einsum("st,nm,sn,tm->", *moments, scores, scores) - scores.mean() ** 2
        assert both.mean() == pytest.approx(scores.mean(), abs=3 * math.sqrt(expected / 40_000) + 1e-12)
        assert both.var() == pytest.approx(expected, rel=0.05)

    @given(st.integers(0, 10_000), st.floats(-0.4, 0.4))
    @settings(max_examples=25, deadline=None)
    def test_a_small_p_and_an_interval_without_zero_agree(self, seed, shift):
        draws = rng(seed).normal(shift, 0.15, size=2000)
        low, high = percentile_interval(draws)
        p = bootstrap_p(draws)
        assert 0 < p <= 1
        if p < 0.045:
            assert low > 0 or high < 0
        if p > 0.055:
            assert low < 0 < high


class TestPairedTests:
    def test_mcnemar_counts_the_rows_that_only_one_has_right(self):
        first, second = np.array([[1, 1, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0]], float)
        assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(2 * (1 + 6) / 2**6)
        assert mcnemar(first, first) == 1.0

    @pytest.mark.parametrize("shift", [0.0, 0.12, 0.3])
    def test_sign_flips_of_many_rows_are_near_scipys(self, shift):
        differences = rng(1).normal(shift, 1, size=200)
        (p,) = sign_flip_tests(differences[None], 20_000, rng())
        theirs = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng(2)
        )
        assert p == pytest.approx(theirs.pvalue, abs=0.015)
        assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)

    @pytest.mark.parametrize(
        ("line", "p"), [([1, 1, 1, 0, 0], 2 / 8), ([1 / 3, 1 / 3, -2 / 3], 1), ([1, 0], 1), ([0, 0], 1)]
    )
    def test_few_rows_that_differ_are_counted_exactly(self, line, p):
        assert sign_flip_tests(np.array([line]), 1000, rng()) == [pytest.approx(p)]

    def test_lines_are_tested_as_if_alone(self):
        lines = rng(4).normal(0.2, 1, size=(3, 80))
        together = sign_flip_tests(lines, 5000, rng())
        assert together == [sign_flip_tests(line[None], 5000, rng())[0] for line in lines]

    def test_under_the_null_small_values_are_rare(self):
        lines = rng(8).normal(size=(400, 40))
        values = np.array(sign_flip_tests(lines, 999, rng()))
        assert stats.kstest(values, "uniform").pvalue > 1e-3
        assert (values <= 0.05).mean() < 0.09


class TestStudent:
    @FEW
    @given(st.integers(0, 1000), st.integers(2, 6), st.integers(2, 6))
    def test_of_two_methods_over_seeds_alone_it_is_welchs_test(self, seed, m, n):
        a, b = rng(seed).normal(size=m), 1 + 2 * rng(seed + 1).normal(size=n)
        error, freedom = satterthwaite([(a.var(ddof=1) / m, m - 1), (b.var(ddof=1) / n, n - 1)])
        theirs = stats.ttest_ind(a, b, equal_var=False)
        difference = a.mean() - b.mean()
        assert freedom == pytest.approx(theirs.df)
        assert t_p(difference, error, freedom) == pytest.approx(theirs.pvalue)
        ends = theirs.confidence_interval()
        assert t_interval(difference, error, freedom) == pytest.approx((ends.low, ends.high))

    def test_what_has_no_spread_or_an_unknown_one(self):
        assert satterthwaite([(0.0, 3), (0.0, 4)]) == (0.0, math.inf)
        assert t_p(0.0, 0.0, math.inf) == 1.0
        assert t_interval(0.5, 0.0, math.inf) == (0.5, 0.5)
        error, freedom = satterthwaite([(0.1, 3), (math.inf, 1)])
        assert t_p(0.5, error, freedom) == 1.0
        assert t_interval(0.5, error, freedom) == (-math.inf, math.inf)

    @pytest.mark.parametrize("seeds", [2, 5])
    @pytest.mark.parametrize("ratio", [0, 0.1, 1])
    def test_the_wider_of_seeds_and_both_holds_the_mean_in_19_of_20_tables(self, seeds, ratio):
        """With `ratio` the variance of rows over that of seeds; rows are 750."""
        tables, draw = 1000, rng(seeds)
        scores = draw.normal(size=(tables, seeds))
        means = scores.mean(1) + math.sqrt(ratio) * draw.normal(size=tables)
        rows = ratio * draw.chisquare(749, size=tables) / 749
        held = narrower = 0
        for mean, v, of_seeds in zip(means, rows, scores.var(1, ddof=1) / seeds, strict=True):
            alone = satterthwaite([(of_seeds, seeds - 1.0)])
            p, (low, high) = widest_t(mean, [satterthwaite([(v, 749.0), (of_seeds, seeds - 1.0)]), alone])
            held += low <= 0 <= high
            narrower += high - low < np.ptp(t_interval(mean, *alone))
            assert (p < 0.05) == (not low <= 0 <= high)
        assert narrower == 0
        assert held / tables >= 0.94 - 0.015  # two standard errors

    def test_three_seeds_of_many_rows(self):
        scores = np.array([0.499, 0.478, 0.408])
        alone = satterthwaite([(scores.var(ddof=1) / 3, 2.0)])
        both = satterthwaite([(0.0009, 749.0), (scores.var(ddof=1) / 3, 2.0)])
        _, (low, high) = widest_t(scores.mean(), [both, alone])
        assert (low, high) == pytest.approx((0.343, 0.580), abs=1e-3)


class TestHolm:
    @FEW
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
    def test_it_is_the_closure_of_bonferroni(self, values):
        """A hypothesis is rejected if Bonferroni rejects every intersection with it (Marcus et al. 1976)."""
        indices = range(len(values))
        for i, adjusted in enumerate(holm(values)):
            subsets = (
                s for k in range(1, len(values) + 1) for s in itertools.combinations(indices, k) if i in s
            )
            expected = max(min(1.0, len(s) * min(values[j] for j in s)) for s in subsets)
            assert adjusted == pytest.approx(expected, abs=1e-12)

    @FEW
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
    def test_it_never_lowers_and_keeps_the_order(self, values):
        adjusted = holm(values)
        assert all(a >= v for a, v in zip(adjusted, values, strict=True))
        # never stricter than Bonferroni, never laxer than Benjamini and Hochberg
        assert all(a <= min(1, len(values) * v) + 1e-12 for a, v in zip(adjusted, values, strict=True))
        assert (np.array(adjusted) >= stats.false_discovery_control(values) - 1e-12).all()
        order = np.argsort(values, kind="stable")
        assert (np.diff(np.array(adjusted)[order]) >= 0).all()

    def test_no_tests_no_values(self):
        assert holm([]) == []
