"""Scores of rows: intervals, counts, the mean loss, pass@k."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from reft_lightning.evaluation import MeanLoss, RowScores, pass_at_k, wilson_interval
from reft_lightning.evaluation.row_metrics import interval_of_means


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_scipys(counts):
    correct, total = counts
    expected = binomtest(correct, total).proportion_ci(0.95, "wilson")
    low, high = wilson_interval(correct, total)
    assert low == pytest.approx(expected.low, abs=1e-7)
    assert high == pytest.approx(expected.high, abs=1e-7)
    assert 0 <= low <= correct / total <= high <= 1


def test_the_interval_of_no_rows_is_no_number():
    assert all(math.isnan(end) for end in wilson_interval(0, 0))


def test_row_scores_sum_over_batches_and_count_rows_without_an_answer():
    metric = RowScores()
    metric.update([1.0, 0.0, 0.0], missing=1)
    metric.update([1.0])
    count = metric.count()
    assert {name: count[name] for name in ("correct", "total", "missing")} == {
        "correct": 2, "total": 4, "missing": 1
    }  # fmt: skip
    assert count["interval"] == pytest.approx(wilson_interval(2, 4))
    metric.reset()
    metric.update([])
    assert metric.count()["total"] == 0


def test_row_scores_take_batches_inside_and_outside_inference_mode():
    metric = RowScores()
    with torch.inference_mode():
        metric.update([1.0])
    metric.update([0.0])
    assert metric.compute().tolist() == [1, 1, 2, 0]


def test_graded_scores_get_the_normal_interval():
    scores = [0.5, 0.25, 1.0, 0.0, 0.5]
    metric = RowScores()
    metric.update(scores)
    count = metric.count()
    mean, error = statistics.mean(scores), statistics.stdev(scores) / math.sqrt(5)
    assert count["correct"] == 2.25
    assert count["interval"] == pytest.approx([mean - 1.959964 * error, mean + 1.959964 * error])


def test_the_sum_of_graded_scores_is_not_rounded():
    metric = RowScores()
    metric.update([2 / 3, 1 / 7, 1.0])
    assert metric.count()["correct"] / 3 == pytest.approx((2 / 3 + 1 / 7 + 1) / 3, abs=1e-6)


def test_the_mean_loss_weighs_tokens_and_not_batches():
    metric = MeanLoss()
    metric.update(torch.tensor(1.0), 3)
    metric.update(torch.tensor(5.0), 1)
    assert metric.compute().item() == 2.0


class TestPassAtK:
    @pytest.mark.parametrize("samples", range(1, 7))
    def test_it_is_the_share_of_subsets_that_hold_a_passing_sample(self, samples):
        for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            subsets = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(samples, passed, k) == pytest.approx(share, abs=1e-12)

    def test_for_k_1_it_is_the_share_of_passing_samples(self):
        assert pass_at_k(200, 37, 1) == pytest.approx(37 / 200)

    def test_large_numbers_are_no_trouble(self):
        assert pass_at_k(100_000, 1, 1000) == pytest.approx(0.01)
        assert pass_at_k(10, 10, 10) == 1.0
        assert pass_at_k(200, 0, 100) == 0.0

    @pytest.mark.parametrize(("samples", "passed", "k"), [(9, 1, 10), (9, 1, 0), (9, 10, 1), (9, -1, 1)])
    def test_numbers_out_of_range_are_refused(self, samples, passed, k):
        with pytest.raises(ValueError, match="got"):
            pass_at_k(samples, passed, k)


def test_the_interval_of_a_mean_of_tasks_shrinks_with_the_root_of_their_number():
    one = (0.3, 0.7)
    low, high = interval_of_means([0.5] * 4, [one] * 4)
    assert (low, high) == pytest.approx((0.4, 0.6))
    # not symmetric if the tasks' intervals are not; for a single task, its own interval
    assert interval_of_means([0.1], [(0.05, 0.3)]) == pytest.approx((0.05, 0.3))
    rows = 50  # close to the normal interval of the mean of two proportions, near one half
    ends = interval_of_means([0.4, 0.6], [wilson_interval(20, rows), wilson_interval(30, rows)])
    half = 1.96 * math.sqrt(2 * 0.24 / rows) / 2
    assert ends == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)
