"""Scores: the interval, the counts, the mean loss."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from reft_lightning.evaluation import MeanLoss, RowScores, wilson_interval


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


def test_the_mean_loss_weighs_tokens_and_not_batches():
    metric = MeanLoss()
    metric.update(torch.tensor(1.0), 3)
    metric.update(torch.tensor(5.0), 1)
    assert metric.compute().item() == 2.0
