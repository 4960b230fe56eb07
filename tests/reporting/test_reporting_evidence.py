"""Intervals and paired tests of reports of invented runs, and what they conclude."""

import json

import numpy as np
import pytest
from invented_runs import cells, method, only, predictions, report, right, write_grid, write_run
from scipy import stats

from reft_lightning.reporting import tables
from reft_lightning.reporting.comparisons import AVERAGE, ROWS_AND_SEEDS, ROWS_ONLY, Comparison, Method, Score
from reft_lightning.reporting.evidence import interval_of
from reft_lightning.reporting.pairs import pairs_of
from reft_lightning.reporting.runs import Run
from reft_lightning.reporting.scores import RowMean
from reft_lightning.reporting.statistics import over_seeds, resample_rows, seed_weights


def answers(rng, methods, seeds, rows, deviation):
    """Right and wrong answers of methods that are equally good: (methods, seeds, rows); seeds and rows are not."""
    ease = 0.6 + 0.3 * rng.normal(size=rows) + deviation * rng.normal(size=(methods, seeds, 1))
    return (rng.random((methods, seeds, rows)) < ease).astype(float)


# E of a probability that is drawn as in `answers` with a deviation of 0.08, and cut off at 0 and 1
TRUE = float(np.mean(stats.norm.sf((np.linspace(0, 1, 2001) - 0.6) / np.hypot(0.3, 0.08))))


def compared(scores):
    """The comparison of such methods, without the bootstrap, which row means do not need."""
    found = []
    for i, by_seed in enumerate(scores):
        score = Score(
            "boolq", "accuracy", dict(enumerate(by_seed.mean(1))), by_seed.shape[1], limits=(0.0, 1.0)
        )
        score.draws = score.row_draws = np.zeros(2)
        score.row_scores = dict(enumerate(by_seed))
        found.append(Method(f"m{i}", [], scores={("boolq", "accuracy"): score}))
    return Comparison("", {}, "test", found, {"boolq": "accuracy"})


def write_correlations(folder, name, said, gold, **measures):
    """Write a run whose only scores are correlations of predictions with gold numbers."""
    rows = [{"task": "stsb", "source": f"row {i}", "answer": f"{a:.4f}", "gold": str(g), "value": a}
            for i, (a, g) in enumerate(zip(said, gold, strict=True))]  # fmt: skip
    metrics = {f"test/stsb/{measure}": value for measure, value in measures.items()}
    write_run(
        folder, name, scores={"stsb": [0]}, rows=rows, monitor="val/pearson",
        tasks={"stsb": {"kind": "regression"}}, metrics=metrics,
    )  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    del results["metrics"]["test/stsb/accuracy"]
    (folder / "results.json").write_text(json.dumps(results))


class TestLevels:
    @pytest.mark.parametrize("seeds", [2, 3])
    def test_of_equal_methods_some_pair_differs_in_one_of_twenty_tables_at_most(self, seeds):
        rng = np.random.default_rng(1)
        false = 0
        for _ in range(80):
            pairs = pairs_of(compared(answers(rng, 6, seeds, 300, 0.05)), 1000, 0)
            assert len(pairs) == 15
            false += any(pair.differs for pair in pairs)
        assert false / 80 <= 0.08  # 0.05, with the noise of 80 tables

    @pytest.mark.parametrize("deviation", [0.0, 0.02, 0.05])
    def test_a_method_that_is_far_better_differs(self, deviation):
        scores = answers(np.random.default_rng(1), 6, 5, 300, deviation)
        scores[0] = np.maximum(scores[0], np.random.default_rng(2).random(scores[0].shape) < 0.9)
        pairs = [pair for pair in pairs_of(compared(scores), 1000, 0) if pair.first == "m0"]
        assert len(pairs) == 5
        assert all(pair.differs and pair.difference > 0 for pair in pairs)

    def test_one_method_that_scatters_does_not_hide_what_the_others_show(self):
        rng = np.random.default_rng(6)
        means = [[0.98, 0.99, 1.0], [0.59, 0.66, 1.0], [0.51, 0.56, 0.7], [0.54, 0.55, 0.64], [0.5, 0.55, 0.6],
                 [0.45, 0.5, 0.52], [0.3, 0.32, 0.4]]  # fmt: skip
        scores = (rng.random((7, 3, 100)) < np.array(means)[:, :, None]).astype(float)
        pairs = {(pair.first, pair.second): pair for pair in pairs_of(compared(scores), 1000, 0)}
        assert pairs["m0", "m6"].differs
        assert not pairs["m1", "m2"].differs

    @pytest.mark.parametrize("seeds", [2, 3, 5])
    def test_intervals_of_few_seeds_hold_the_mean_as_often_as_they_say(self, seeds):
        rng = np.random.default_rng(3)
        held, tables_ = 0, 200
        for _ in range(tables_):
            (scores,) = answers(rng, 1, seeds, 200, 0.08)
            score = Score("boolq", "accuracy", dict(enumerate(scores.mean(1))), 200, limits=(0.0, 1.0))
            draws = resample_rows([RowMean(line) for line in scores], 200, 300, rng)
            score.draws, score.row_draws = over_seeds(draws, seed_weights(seeds, 300, rng)), draws.mean(1)
            low, high = interval_of(score)
            held += low <= TRUE <= high
        assert 0.92 <= held / tables_ <= 0.995

    def test_pairs_count_rows_and_seeds_as_written_out(self):
        scores = answers(np.random.default_rng(4), 2, 4, 100, 0.05)
        scores[0] = np.maximum(scores[0], scores[1])
        (pair,) = pairs_of(compared(scores), 1000, 0)
        rows = (scores[0].mean(0) - scores[1].mean(0)).var(ddof=1) / 100
        variances = [by_seed.mean(1).var(ddof=1) for by_seed in scores]
        assert variances[0] != pytest.approx(variances[1])
        p, ends = [], []
        a, b = (max(variance, np.mean(variances)) / 4 for variance in variances)
        seeds = sum(variances) ** 2 / sum(variance**2 / 3 for variance in variances)  # of their mean
        for v in (rows, 0):
            error = np.sqrt(v + a + b)
            freedom = (v + a + b) ** 2 / (v**2 / 99 + (a + b) ** 2 / seeds)
            p.append(2 * stats.t.sf(pair.difference / error, freedom))
            ends.append(stats.t.interval(0.95, freedom, pair.difference, error))
        assert pair.p == pytest.approx(max(*p, pair.rows_p))
        assert pair.interval == pytest.approx((min(low for low, _ in ends), max(high for _, high in ends)))

    @pytest.mark.parametrize("seeds", [1, 2, 3, 5])
    @pytest.mark.parametrize("deviation", [0.0, 0.03])
    def test_intervals_of_differences_leave_out_0_where_p_is_below_005_and_only_there(self, seeds, deviation):
        rng = np.random.default_rng([seeds, 5])
        told = 0
        for shift in np.linspace(0, 0.5, 12):
            scores = answers(rng, 2, seeds, 40, deviation)
            scores[0] = np.maximum(scores[0], rng.random(scores[0].shape) < 2 * shift)
            (pair,) = pairs_of(compared(scores), 1000, 0)
            low, high = pair.interval
            assert low <= pair.difference <= high
            assert (pair.p < 0.05) == (low > 0 or high < 0)
            told += pair.p < 0.05
        assert 0 < told < 12

    def test_no_interval_is_narrower_than_students_over_the_seeds(self, tmp_path):
        for seed, rate in ((1, 0.5), (2, 0.55), (3, 0.6)):
            write_run(tmp_path / f"a{seed}", "loreft", seed, {"boolq": right(rate, 2000, seed)})
            write_run(tmp_path / f"b{seed}", "red", seed, {"boolq": right(1.1 - rate, 2000, seed)})
        comparison = only(tmp_path)
        for one in comparison.methods:
            score = one.scores["boolq", "accuracy"]
            error = score.deviation / np.sqrt(3)
            low, high = stats.t.interval(0.95, 2, score.mean, error)
            assert score.interval[0] <= low + 1e-12
            assert score.interval[1] >= high - 1e-12
        (pair,) = comparison.pairs  # of as large a spread both
        values = [list(one.scores["boolq", "accuracy"].values.values()) for one in comparison.methods]
        students = stats.ttest_ind(*values).confidence_interval()
        assert np.ptp(pair.interval) >= students.high - students.low - 1e-12

    def test_few_rows_that_differ_are_never_told_apart_by_t_alone(self):
        scores = np.zeros((2, 2, 60))
        scores[0, :, :5] = 1  # t gives 0.02, which five equal coin tosses do not support
        (pair,) = pairs_of(compared(scores), 1000, 0)
        assert pair.p == pair.rows_p == pytest.approx(2 / 2**5)

    def test_many_configurations_on_a_correlation_can_differ(self, tmp_path):
        rng = np.random.default_rng(0)
        gold = rng.normal(size=100)
        for i in range(16):
            said = gold + (0.1 if i == 0 else 5) * rng.normal(size=100)
            write_correlations(
                tmp_path / str(i), f"m{i:02d}", said, gold, pearson=stats.pearsonr(said, gold)[0]
            )
        comparison = only(tmp_path)
        assert comparison.methods[0].label == "m00"
        assert all(pair.differs for pair in comparison.pairs if pair.first == "m00")


class TestDivergedRuns:
    @pytest.mark.parametrize("value", [float("nan"), None, float("inf")])
    def test_they_stand_last_and_win_nothing(self, tmp_path, value):
        write_grid(tmp_path, {"aaa": 0.9, "loreft": 0.75, "red": 0.5}, seeds=(42, 43))
        for path in tmp_path.glob("aaa_43/results.json"):
            results = json.loads(path.read_text())
            results["metrics"]["test/boolq/accuracy"] = value
            path.write_text(json.dumps(results))
        comparison = only(tmp_path)
        assert [m.label for m in comparison.methods] == ["loreft", "red", "aaa"]
        table = tables.score_table(comparison)
        assert cells(table, "aaa", "boolq accuracy") == "diverged"
        assert [row[2].best for row in table.rows] == [True, False, False]
        text = tables.verdict(comparison)
        assert text.startswith("loreft has")
        assert "the best of 2" in text
        assert text.endswith("aaa diverged.")
        assert any(note.startswith("aaa diverged with seeds 43: boolq accuracy") for note in comparison.notes)
        assert {(pair.first, pair.second) for pair in comparison.pairs} == {("loreft", "red")}
        assert "diverged" in [row[4].text for row in tables.measure_table(comparison).rows]

    def test_a_loss_that_is_no_number_is_not_the_lowest(self, tmp_path):
        for name, loss in (("aaa", float("nan")), ("bbb", float("-inf")), ("loreft", 1.5)):
            write_run(tmp_path / name, name, scores={}, metrics={"val/loss": loss}, monitor="val/loss")
        comparison = only(tmp_path)
        assert comparison.methods[0].label == "loreft"
        assert comparison.best(("all", "loss")) == 1.5

    def test_where_all_diverged_nobody_is_best(self, tmp_path):
        for name in ("loreft", "red"):
            write_run(tmp_path / name, name, metrics={"test/boolq/accuracy": float("nan")})
        comparison = only(tmp_path)
        assert tables.verdict(comparison) == "No method has a finite score: loreft, red diverged."
        assert not any(cell.best for row in tables.score_table(comparison).rows for cell in row)


class TestEvidence:
    def test_sign_flips_average_over_seeds_and_mcnemar_goes_seed_by_seed(self, tmp_path):
        rates = {"loreft": 0.6, "red": 0.5}
        comparison = only(write_grid(tmp_path, rates), resamples=4000)
        (pair,) = comparison.pairs
        first, second = (
            np.array([right(rate, seed=seed) for seed in (42, 43, 44)]) for rate in rates.values()
        )
        assert pair.difference == pytest.approx(first.mean() - second.mean())
        theirs = stats.permutation_test(
            (first.mean(0), second.mean(0)), lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0),
        )  # fmt: skip
        assert (pair.rows_test, pair.rows_p) == ("sign flips", pytest.approx(theirs.pvalue, abs=0.02))
        for i, seed in enumerate((42, 43, 44)):
            b, c = ((first[i] > second[i]).sum(), (first[i] < second[i]).sum())
            assert pair.mcnemar[seed] == pytest.approx(stats.binomtest(b, b + c).pvalue)

    def test_of_one_seed_the_interval_is_scipys(self, tmp_path):
        scores = right(0.7)
        write_run(tmp_path / "a", scores={"boolq": scores})
        comparison = only(tmp_path, resamples=20_000)
        theirs = stats.bootstrap(
            (scores,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
        ).confidence_interval
        score = comparison.methods[0].scores["boolq", "accuracy"]
        assert score.interval == pytest.approx((theirs.low, theirs.high), abs=0.018)  # a row is 0.0167
        assert score.deviation is None

    def test_another_method_changes_nobodys_interval(self, tmp_path):
        write_grid(tmp_path / "two")
        before = {m.label: m.scores["boolq", "accuracy"].interval for m in only(tmp_path / "two").methods}
        write_run(tmp_path / "two" / "third", "direft")
        after = {m.label: m.scores["boolq", "accuracy"].interval for m in only(tmp_path / "two").methods}
        assert before.items() <= after.items()
        assert len(after) == 3

    def test_the_order_of_folders_changes_nothing(self, tmp_path):
        folders = sorted(write_grid(tmp_path).iterdir())
        one, two = (tables.pair_table(report(*some).comparisons[0]) for some in (folders, folders[::-1]))
        assert one == two

    def test_p_values_are_adjusted_over_all_pairs(self, tmp_path):
        comparison = only(write_grid(tmp_path, {"a": 0.5, "b": 0.55, "c": 0.7}))
        assert len(comparison.pairs) == 3
        assert all(pair.p_holm >= pair.p for pair in comparison.pairs)
        smallest = min(comparison.pairs, key=lambda pair: pair.p)
        assert smallest.p_holm == pytest.approx(min(1, 3 * smallest.p))

    def test_many_pairs_can_still_differ(self, tmp_path):
        rates = {f"m{i:02d}": 0.5 for i in range(14)} | {"better": 0.95}
        comparison = only(write_grid(tmp_path, rates, seeds=(1,)), resamples=100)
        assert len(comparison.pairs) == 105
        assert all(pair.differs for pair in comparison.pairs if pair.first == "better")

    def test_rows_that_differ_do_not_suffice_where_seeds_do_not(self, tmp_path):
        for seed, rate in ((1, 0.5), (2, 0.95)):
            write_run(tmp_path / f"a{seed}", "loreft", seed, {"boolq": right(rate)})
            write_run(tmp_path / f"b{seed}", "red", seed, {"boolq": right(0.55)})
        (pair,) = only(tmp_path, resamples=4000).pairs
        assert pair.rows_p < 0.05
        assert pair.interval[0] < 0 < pair.interval[1]
        assert not pair.differs
        assert pair.counted == ROWS_AND_SEEDS

    def test_tasks_are_averaged_with_equal_weight(self, tmp_path):
        for name, rate in (("loreft", 0.8), ("red", 0.4)):
            for seed in (1, 2):
                scores = {"boolq": right(rate, 60, seed), "piqa": right(rate, 20, seed + 5)}
                write_run(tmp_path / f"{name}{seed}", name, seed, scores)
        comparison = only(tmp_path, resamples=4000)
        assert comparison.head == (AVERAGE, "accuracy")
        score = method(comparison, "loreft").scores[comparison.head]
        parts = [method(comparison, "loreft").scores[task, "accuracy"].mean for task in ("boolq", "piqa")]
        assert score.mean == pytest.approx(np.mean(parts))
        assert score.interval[0] < score.mean < score.interval[1]
        assert [pair.task for pair in comparison.pairs] == ["boolq", "piqa", AVERAGE]

    def test_measures_that_are_no_mean_are_recomputed_in_every_resample(self, tmp_path):
        rng = np.random.default_rng(0)
        gold = rng.normal(size=80)
        for name, noise in (("loreft", 0.5), ("red", 2.0)):
            said = gold + noise * rng.normal(size=80)
            pearson, spearman = stats.pearsonr(said, gold)[0], stats.spearmanr(said, gold)[0]
            measures = {"pearson": pearson, "spearman": spearman, "combined_score": (pearson + spearman) / 2}
            write_correlations(tmp_path / name, name, said, gold, **measures)
        comparison = only(tmp_path, resamples=4000)
        scores = comparison.methods[0].scores
        assert all(scores["stsb", m].interval for m in ("pearson", "spearman", "combined_score"))
        (pair,) = comparison.pairs
        assert (pair.rows_test, pair.mcnemar, pair.measure) == ("paired bootstrap", {}, "pearson")
        assert pair.counted == ROWS_ONLY
        assert pair.p < 0.01
        assert pair.interval[0] > 0

    def test_predictions_that_give_another_score_get_no_interval(self, tmp_path):
        write_run(tmp_path / "a", metrics={"test/boolq/accuracy": 0.99})
        comparison = only(tmp_path)
        assert comparison.methods[0].scores["boolq", "accuracy"].interval is None
        assert any("the predictions do not reproduce accuracy of boolq" in note for note in comparison.notes)
        assert cells(tables.score_table(comparison), "loreft", "boolq accuracy") == "99.0"

    def test_a_loss_alone_is_compared_without_rows(self, tmp_path):
        for name, loss in (("loreft", 1.5), ("red", 1.7)):
            write_run(tmp_path / name, name, scores={}, metrics={"val/loss": loss}, monitor="val/loss")
        comparison = only(tmp_path)
        assert [m.label for m in comparison.methods] == ["loreft", "red"]  # the lower one first
        assert comparison.pairs == []
        assert cells(tables.score_table(comparison), "loreft", "loss") == "1.5000"

    def test_a_loss_with_rows_is_a_mean_over_tokens_and_a_text_is_drawn_whole(self, tmp_path):
        rng = np.random.default_rng(5)
        losses, tokens = rng.gamma(4, 0.5, (40, 3)), rng.integers(1, 30, (40, 3))
        for name, more in (("loreft", 0.0), ("red", 0.3)):
            rows = [
                {"task": "custom", "source": f"row {i}", "prompt": "", "target_tokens": int(n),
                 "scores": {"loss": float(loss) + more}}
                for i in range(40) for loss, n in zip(losses[i], tokens[i], strict=True)
            ]  # fmt: skip
            value = float((losses * tokens).sum() / tokens.sum()) + more
            write_run(tmp_path / name, name, scores={}, rows=rows, metrics={"test/loss": value})
        comparison = only(tmp_path)
        score = method(comparison, "loreft").scores["all", "loss"]
        drawn = rng.integers(0, 40, (20_000, 40))
        means = (losses * tokens).sum(1)[drawn].sum(1) / tokens.sum(1)[drawn].sum(1)
        assert score.rows == 40
        assert score.interval == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=0.02)
        (pair,) = comparison.pairs
        assert pair.difference == pytest.approx(-0.3)  # in every resample: the same rows and tokens
        assert pair.interval == pytest.approx((-0.3, -0.3))

    @pytest.mark.parametrize("seeds", [(42,), (42, 43)])
    def test_where_every_row_is_wrong_or_right_the_interval_is_wilsons(self, tmp_path, seeds):
        for seed in seeds:
            write_run(tmp_path / f"a{seed}", "loreft", seed, {"boolq": [0] * 60})
            write_run(tmp_path / f"b{seed}", "red", seed, {"boolq": [1] * 60})
        comparison = only(tmp_path)
        for label, value in (("loreft", 0.0), ("red", 1.0)):
            theirs = stats.binomtest(int(60 * value), 60).proportion_ci(method="wilson")
            score = method(comparison, label).scores["boolq", "accuracy"]
            assert score.interval == pytest.approx((theirs.low, theirs.high), abs=1e-9)
        assert not any("has zero width" in note for note in comparison.notes)

    def test_so_it_is_on_average_over_tasks(self, tmp_path):
        write_run(tmp_path / "a", scores={"boolq": [0] * 60, "piqa": [1] * 60})
        comparison = only(tmp_path)
        score = comparison.methods[0].scores[comparison.head]
        high = stats.binomtest(0, 60).proportion_ci(method="wilson").high
        assert score.interval == pytest.approx((0.5 - high / 2, 0.5 + high / 2), abs=1e-6)

    def test_an_interval_without_width_is_no_certainty(self, tmp_path):
        rows = predictions("boolq", [0.25] * 60, "rouge")
        write_run(tmp_path / "a", rows=rows, metrics={"test/boolq/rouge": 0.25}, monitor="val/rouge")
        assert any("has zero width" in note for note in only(tmp_path).notes)


def test_rows_that_no_text_is_made_of_may_have_any_scores(tmp_path):
    (tmp_path / "predictions").mkdir()
    row = {
        "task": "mine",
        "source": "row 1",
        "scores": {"loss": 1.0},
    }  # a measure of that name, without tokens
    (tmp_path / "predictions" / "reft_test.jsonl").write_text(json.dumps(row) + "\n")
    assert Run(tmp_path, {}, {"metrics": {}}).rows("test", "mine") == {("row 1", 0): row}
