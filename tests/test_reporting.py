"""Reports of invented runs: what shares a table, what a table says, and what is left out and why."""

import csv
import json
import logging

import numpy as np
import pytest
from invented_runs import predictions, right, write_grid, write_run
from scipy import stats

from reft_lightning.reporting import tables
from reft_lightning.reporting.build import build_report
from reft_lightning.reporting.comparisons import AVERAGE, BASE
from reft_lightning.reporting.runs import ReportError, find_folders, read_runs

FEW = 400  # resamples, where no digit of theirs is looked at


def report(*folders, **options):
    return build_report(folders, resamples=options.pop("resamples", FEW), **options)


def only(folder, **options):
    """The one comparison that a folder's runs make."""
    (comparison,) = report(folder, **options).comparisons
    return comparison


def method(comparison, label):
    return next(method for method in comparison.methods if method.label == label)


def cells(table, label, column):
    row = next(row for row in table.rows if row[0].text == label)
    return row[list(table.columns).index(column)].text


class TestMethods:
    def test_seeds_of_one_configuration_are_one_method(self, tmp_path):
        comparison = only(write_grid(tmp_path))
        assert [(m.label, m.seeds) for m in comparison.methods] == [
            ("loreft", [42, 43, 44]),
            ("red", [42, 43, 44]),
        ]
        score = method(comparison, "loreft").scores["boolq", "accuracy"]
        values = [np.mean(right(0.75, seed=seed)) for seed in (42, 43, 44)]
        assert list(score.values.values()) == pytest.approx(values)
        assert score.mean == pytest.approx(np.mean(values))
        assert score.deviation == pytest.approx(np.std(values, ddof=1))
        assert score.interval[0] < score.mean < score.interval[1]
        assert score.rows == 60

    def test_methods_of_one_name_are_told_apart_by_what_differs(self, tmp_path):
        for rank, lr in ((4, 1e-3), (8, 1e-3), (8, 2e-3)):
            settings = {"intervention.rank": rank, "optimizer.lr": lr}
            write_run(tmp_path / f"{rank}_{lr}", settings=settings)
        write_run(tmp_path / "red", "red")
        labels = {m.label for m in only(tmp_path).methods}
        assert labels == {"loreft rank=4 lr=0.001", "loreft rank=8 lr=0.001", "loreft rank=8 lr=0.002", "red"}

    def test_places_logging_and_stages_make_no_other_method(self, tmp_path):
        write_run(tmp_path / "a", seed=1)
        free = {"data.path": "/elsewhere", "logger.wandb": True, "trainer.accelerator": "cpu", "sealed": True}
        write_run(tmp_path / "b", seed=2, settings=free)
        assert [m.seeds for m in only(tmp_path).methods] == [[1, 2]]

    def test_a_seed_that_ran_twice_counts_once_by_its_last_run(self, tmp_path):
        write_run(tmp_path / "late", scores={"boolq": [1] * 60}, finished="2026-01-02")
        write_run(tmp_path / "soon", scores={"boolq": [0] * 60}, finished="2026-01-01")
        comparison = only(tmp_path)
        assert comparison.methods[0].scores["boolq", "accuracy"].values == {42: 1.0}
        assert "loreft: seed 42 ran more than once; the last complete run counts" in comparison.notes

    def test_the_frozen_base_beside_the_runs_is_a_method_without_seeds(self, tmp_path):
        base = {"boolq": right(0.3)}
        write_run(tmp_path / "a", seed=42, base=base)
        write_run(tmp_path / "b", seed=43, base=base)
        comparison = only(tmp_path)
        frozen = method(comparison, BASE)
        assert (frozen.seeds, frozen.cost("trainable_parameters"), frozen.trains) == ([], 0.0, False)
        (pair,) = comparison.pairs
        assert sorted(pair.mcnemar) == [42, 43]  # against every seed
        assert comparison.notes == []

    def test_other_scores_of_the_frozen_base_are_said(self, tmp_path):
        write_run(tmp_path / "a", seed=42, base={"boolq": right(0.3)})
        write_run(tmp_path / "b", seed=43, base={"boolq": right(0.5)})
        assert any("the frozen base scored otherwise in" in note for note in only(tmp_path).notes)


class TestWhatSharesATable:
    @pytest.mark.parametrize(
        "other",
        [
            {"data": "two"},
            {"model": "another"},
            {"scores": {"piqa": right(0.5)}},
            {"split": "validation"},
            {"settings": {"data.limit_test": 60}},
            {"settings": {"model.revision": "v2"}},
        ],
        ids=["rows", "model", "task", "split", "limit", "revision"],
    )
    def test_runs_of_other_data_never_do(self, tmp_path, other):
        write_run(tmp_path / "a", "loreft")
        write_run(tmp_path / "b", "red", **other)
        found = report(tmp_path).comparisons
        assert len(found) == 2
        assert len({comparison.title for comparison in found}) == 2
        assert all(len(comparison.methods) == 1 for comparison in found)
        assert not any(comparison.pairs for comparison in found)

    def test_titles_say_what_differs(self, tmp_path):
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", settings={"data.limit_test": 60})
        titles = [comparison.title for comparison in report(tmp_path).comparisons]
        assert titles == [
            "tiny, boolq (test), evaluated rows all",
            "tiny, boolq (test), evaluated rows at most 60 a task",
        ]

    def test_data_that_only_a_fingerprint_tells_apart_are_numbered(self, tmp_path):
        write_run(tmp_path / "a", data="one")
        write_run(tmp_path / "b", data="two")
        titles = [comparison.title for comparison in report(tmp_path).comparisons]
        assert titles == ["tiny, boolq (test), data 1 of 2", "tiny, boolq (test), data 2 of 2"]

    def test_the_same_test_rows_after_splits_by_seed_do(self, tmp_path):
        for seed in (1, 2):
            folder = write_run(tmp_path / str(seed), seed=seed, settings={"data.split_seed": None})
            results = json.loads((folder / "results.json").read_text())
            results["data_versions"] |= {
                "split_seed": seed,
                "split": {"train_rows": 100, "train_fingerprint": seed},
            }
            (folder / "results.json").write_text(json.dumps(results))
        assert [m.seeds for m in only(tmp_path).methods] == [[1, 2]]

    def test_predictions_of_other_rows_are_an_error_that_names_both_runs(self, tmp_path):
        write_run(tmp_path / "a")
        rows = predictions("boolq", right(0.6))
        rows[7]["source"] = "boolq.json, row 7000"
        write_run(tmp_path / "b", "red", rows=rows)
        with pytest.raises(
            ReportError, match=r"a and .*b were evaluated on other rows of boolq: 2 are .* row 7"
        ):
            report(tmp_path)

    def test_other_gold_answers_are_an_error(self, tmp_path):
        write_run(tmp_path / "a")
        rows = predictions("boolq", right(0.6))
        rows[7]["gold"] = "no"
        write_run(tmp_path / "b", "red", rows=rows)
        with pytest.raises(
            ReportError, match=r"other gold answers of boolq, boolq\.json, row 7: 'yes' and 'no'"
        ):
            report(tmp_path)

    def test_the_order_of_rows_means_nothing(self, tmp_path):
        scores = right(0.6)
        write_run(tmp_path / "a", scores={"boolq": scores})
        write_run(tmp_path / "b", "red", scores={"boolq": scores}, rows=predictions("boolq", scores)[::-1])
        (pair,) = only(tmp_path).pairs
        assert pair.mcnemar == {42: 1.0}
        assert pair.interval == (0.0, 0.0)

    def test_the_split_can_be_chosen(self, tmp_path):
        write_run(tmp_path / "a", metrics={"val/boolq/accuracy": 0.25})
        write_run(tmp_path / "b", "red")
        made = report(tmp_path, split="validation")
        (comparison,) = made.comparisons
        assert comparison.split == "validation"
        assert comparison.methods[0].scores["boolq", "accuracy"].values == {42: 0.25}
        # there are no predictions of that split
        assert comparison.methods[0].scores["boolq", "accuracy"].interval is None
        assert [(item.folder.name, item.reason) for item in made.left] == [
            ("b", "no score on the validation split")
        ]


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
        assert (pair.test, pair.p) == ("sign flips", pytest.approx(theirs.pvalue, abs=0.02))
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
        assert "of one seed there is no deviation, and its interval is over rows alone" in comparison.notes

    def test_seeds_that_differ_widen_the_interval(self, tmp_path):
        same, other = tmp_path / "same", tmp_path / "other"
        for seed, rate in ((1, 0.3), (2, 0.5), (3, 0.7)):
            write_run(same / str(seed), seed=seed, scores={"boolq": right(0.5)})
            write_run(other / str(seed), seed=seed, scores={"boolq": right(rate)})
        widths = [
            np.ptp(only(f, resamples=4000).methods[0].scores["boolq", "accuracy"].interval)
            for f in (same, other)
        ]
        assert widths[1] > 1.3 * widths[0]

    def test_another_method_changes_nobodys_interval(self, tmp_path):
        write_grid(tmp_path / "two")
        before = {m.label: m.scores["boolq", "accuracy"].interval for m in only(tmp_path / "two").methods}
        write_run(tmp_path / "two" / "third", "direft")
        after = {m.label: m.scores["boolq", "accuracy"].interval for m in only(tmp_path / "two").methods}
        assert before.items() <= after.items()
        assert len(after) == 3

    def test_the_order_of_folders_changes_nothing(self, tmp_path):
        folders = sorted(write_grid(tmp_path).iterdir())
        one, two = (
            tables.markdown(tables.pair_table(report(*some).comparisons[0]))
            for some in (folders, folders[::-1])
        )
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
        assert pair.p_holm < 0.05
        assert pair.interval[0] < 0 < pair.interval[1]
        assert not pair.differs

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
            rows = [
                {
                    "task": "stsb",
                    "source": f"row {i}",
                    "answer": f"{a:.4f}",
                    "gold": str(g),
                    "error": abs(a - g),
                }
                for i, (a, g) in enumerate(zip(said, gold, strict=True))
            ]
            pearson, spearman = stats.pearsonr(said, gold)[0], stats.spearmanr(said, gold)[0]
            measures = {"pearson": pearson, "spearman": spearman, "combined_score": (pearson + spearman) / 2}
            metrics = {f"test/stsb/{measure}": value for measure, value in measures.items()}
            write_run(
                tmp_path / name, name, scores={"stsb": [0]}, rows=rows, metrics=metrics, monitor="val/pearson"
            )
            results = json.loads((tmp_path / name / "results.json").read_text())
            del results["metrics"]["test/stsb/accuracy"]
            (tmp_path / name / "results.json").write_text(json.dumps(results))
        comparison = only(tmp_path, resamples=4000)
        scores = comparison.methods[0].scores
        assert all(scores["stsb", m].interval for m in ("pearson", "spearman", "combined_score"))
        (pair,) = comparison.pairs
        assert (pair.test, pair.mcnemar, pair.measure) == ("paired bootstrap", {}, "pearson")
        assert pair.p < 0.01
        assert pair.interval[0] > 0

    def test_predictions_that_give_another_score_get_no_interval(self, tmp_path):
        write_run(tmp_path / "a", metrics={"test/boolq/accuracy": 0.99})
        comparison = only(tmp_path)
        assert comparison.methods[0].scores["boolq", "accuracy"].interval is None
        assert any("the predictions do not give accuracy of boolq" in note for note in comparison.notes)
        assert cells(tables.score_table(comparison), "loreft", "boolq accuracy") == "99.0"

    def test_a_loss_alone_is_compared_without_rows(self, tmp_path):
        for name, loss in (("loreft", 1.5), ("red", 1.7)):
            write_run(tmp_path / name, name, scores={}, metrics={"val/loss": loss}, monitor="val/loss")
        comparison = only(tmp_path)
        assert [m.label for m in comparison.methods] == ["loreft", "red"]  # the lower one first
        assert comparison.pairs == []
        assert cells(tables.score_table(comparison), "loreft", "loss") == "1.5000"

    def test_an_interval_without_width_is_no_certainty(self, tmp_path):
        write_run(tmp_path / "a", scores={"boolq": [0] * 60})
        assert any("has no width" in note for note in only(tmp_path).notes)


class TestCosts:
    def test_means_over_seeds_and_the_adapters_bytes(self, tmp_path):
        write_run(tmp_path / "a", seed=1, train_seconds=10.0, adapter=2000)
        write_run(tmp_path / "b", seed=2, train_seconds=20.0, adapter=2000)
        table = tables.cost_table(only(tmp_path))
        found = {column: cells(table, "loreft", column) for column in table.columns}
        assert found == {
            "method": "loreft", "trained parameters": "4,000", "% of base": "4", "steps": "50", "tokens": "5,000",
            "training s": "15.0", "tokens/s": "500", "peak memory GiB": "1.00", "adapter": "2.0 kB",
        }  # fmt: skip

    def test_a_head_is_named_beside(self, tmp_path):
        write_run(tmp_path / "a", head_parameters=700)
        assert cells(tables.cost_table(only(tmp_path)), "loreft", "trained parameters") == "4,000 + head 700"

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            ({"steps": 50, "tokens": 5000}, []),
            ({"steps": 50, "tokens": 5040}, []),
            ({"steps": 50, "tokens": 5100}, ["unequal budget, tokens: loreft 5,000, red 5,100"]),
            ({"steps": 100, "tokens": 5000}, ["unequal budget, steps: loreft 50, red 100"]),
        ],
    )
    def test_budgets_that_differ_by_more_than_a_percent_are_said_everywhere(self, tmp_path, other, said):
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", "red", **other)
        comparison = only(tmp_path)
        assert comparison.unequal == said
        assert ("nequal budget" in tables.latex(comparison)) == bool(said)
        assert {record["unequal_budget"] for record in tables.records([comparison])} == {"; ".join(said)}

    def test_a_method_that_trains_nothing_has_no_budget(self, tmp_path):
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", "frozen", steps=0, tokens=0, train_seconds=0.0)
        assert only(tmp_path).unequal == []


class TestReads:
    def test_every_read_is_listed_by_time_and_a_second_one_is_marked(self, tmp_path):
        reads = [
            {"task": "boolq", "rows": 60, "time": f"2026-01-0{day}", "model": "adapted"} for day in (1, 3)
        ]
        write_run(tmp_path / "a", test_reads=reads)
        write_run(tmp_path / "b", seed=43, test_reads=[reads[0] | {"time": "2026-01-02"}])
        table = tables.read_table(report(tmp_path).reads)
        assert [(row[0].text, row[2].text, row[7].text) for row in table.rows] == [
            ("2026-01-01", "42", ""), ("2026-01-02", "43", ""), ("2026-01-03", "42", "read again"),
        ]  # fmt: skip
        assert table.notes[0].startswith("1 of 3 reads repeat one")

    def test_reads_of_runs_that_stopped_count(self, tmp_path):
        write_run(tmp_path / "a")
        read = {"task": "boolq", "rows": 60, "time": "2025-12-31", "model": "adapted"}
        stopped = write_run(tmp_path / "b", status="stopped", test_reads=[read])
        (stopped / "config.yaml").unlink()  # the hash still tells that it is the same configuration
        made = report(tmp_path)
        assert [row[7].text for row in tables.read_table(made.reads).rows] == ["", "read again"]

    def test_the_base_and_the_adapted_model_are_read_apart(self, tmp_path):
        read = {"task": "boolq", "rows": 60, "time": "2026-01-01"}
        write_run(tmp_path / "a", test_reads=[read | {"model": "base"}, read | {"model": "adapted"}])
        assert not tables.read_table(report(tmp_path).reads).notes


class TestFolders:
    def test_what_cannot_be_used_is_named_with_the_reason(self, tmp_path):
        write_run(tmp_path / "good")
        write_run(tmp_path / "stopped", status="stopped", error="MemoryError: x")
        write_run(tmp_path / "running", status="running")
        write_run(tmp_path / "lacking", model=None)
        for name, file, text in (("json", "results.json", "{"), ("list", "results.json", "[]"),
                                 ("yaml", "config.yaml", "a: [")):  # fmt: skip
            (write_run(tmp_path / name) / file).write_text(text)
        (write_run(tmp_path / "bare") / "results.json").unlink()
        (tmp_path / "hydra" / ".hydra").mkdir(parents=True)
        made = report(tmp_path)
        assert [run.folder.name for run in made.runs] == ["good"]
        reasons = {item.folder.name: item.reason for item in made.left}
        assert reasons["stopped"] == "its status is 'stopped', not 'complete' (MemoryError: x)"
        assert reasons["running"] == "its status is 'running', not 'complete'"
        assert reasons["lacking"] == "results.json lacks model"
        assert reasons["json"].startswith("results.json cannot be read")
        assert reasons["list"] == "results.json holds no object"
        assert reasons["yaml"].startswith("config.yaml cannot be read")
        assert reasons["bare"] == reasons["hydra"] == "no results.json: the run ended before it began"

    def test_broken_predictions_are_an_error_with_the_line(self, tmp_path):
        folder = write_run(tmp_path / "a")
        with open(folder / "predictions" / "reft_test.jsonl", "a") as file:
            file.write("{}\n")
        with pytest.raises(ReportError, match=r"reft_test\.jsonl, line 61 is no row"):
            report(tmp_path)

    def test_nothing_usable_says_what_a_run_folder_is(self, tmp_path):
        write_run(tmp_path / "stopped", status="stopped")
        with pytest.raises(
            ReportError, match=r"(?s)nothing to report.*stopped.*a run folder is what reft-train writes"
        ):
            report(tmp_path)
        with pytest.raises(ReportError, match="nowhere: no such folder; a run folder is"):
            report(tmp_path / "nowhere")

    def test_a_multirun_a_run_and_the_same_run_twice(self, tmp_path):
        write_grid(tmp_path / "multirun_1")
        write_run(tmp_path / "alone", "direft")
        (tmp_path / "multirun_1" / "loreft_42" / "evaluations" / "x").mkdir(parents=True)
        (tmp_path / "multirun_1" / "loreft_42" / "evaluations" / "x" / "results.json").write_text("{}")
        alone = tmp_path / "alone"
        runs, _, left = find_folders([tmp_path / "multirun_1", alone, alone, tmp_path])
        assert len(runs) == 7
        assert left == []

    def test_runs_older_than_a_setting_have_its_default(self, tmp_path):
        write_run(tmp_path / "a", seed=1)
        folder = write_run(tmp_path / "b", seed=2)
        text = (folder / "config.yaml").read_text()
        assert "option_likelihood: true\n" in text
        (folder / "config.yaml").write_text(
            text.replace("option_likelihood: true\n", "").replace("  eps: 1.0e-08\n", "")
        )
        assert [m.seeds for m in only(tmp_path).methods] == [[1, 2]]

    def test_reading_is_quiet(self, tmp_path, caplog):
        write_grid(tmp_path)
        with caplog.at_level(logging.INFO):
            read_runs(find_folders([tmp_path])[0])
        assert caplog.text == ""


class TestTables:
    def test_the_best_is_bold_in_markdown_and_latex(self, tmp_path):
        comparison = only(write_grid(tmp_path))
        lines = tables.markdown(tables.score_table(comparison)).splitlines()
        assert next(line for line in lines if line.startswith("| loreft")).count("**") == 2
        assert next(line for line in lines if line.startswith("| red")).count("**") == 0
        text = tables.latex(comparison)
        assert text.count(r"\textbf") == 1
        assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert {line.count("&") for line in rows} == {2}

    def test_names_are_escaped(self, tmp_path):
        write_run(tmp_path / "a", "my_module.A|B & <b>50%</b>")
        comparison = only(tmp_path)
        assert "my_module.A\\|B & \\<b>50%\\</b>" in tables.markdown(tables.score_table(comparison))
        assert r"my\_module.A|B \& \textless{}b\textgreater{}50\%" in tables.latex(comparison)

    def test_the_csv_has_one_line_for_each_method_task_and_measure(self, tmp_path):
        comparison = only(write_grid(tmp_path / "runs"))
        tables.write_csv(tmp_path / "x.csv", tables.records([comparison]), tables.CSV_COLUMNS)
        with open(tmp_path / "x.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        assert [(line["method"], line["task"], line["measure"]) for line in lines] == [
            ("loreft", "boolq", "accuracy"), ("red", "boolq", "accuracy"),
        ]  # fmt: skip
        score = comparison.methods[0].scores["boolq", "accuracy"]
        assert float(lines[0]["mean"]) == score.mean
        assert (float(lines[0]["low"]), float(lines[0]["high"])) == score.interval
        assert json.loads(lines[0]["by_seed"]) == {str(seed): value for seed, value in score.values.items()}

    def test_the_verdict_names_who_differs_and_who_cannot_be_told(self, tmp_path):
        comparison = only(write_grid(tmp_path, {"loreft": 0.8, "near": 0.79, "far": 0.2}), resamples=2000)
        text = tables.verdict(comparison)
        assert "the best of 3" in text
        assert "it differs from far (p < 0.05 after Holm, interval without 0)" in text
        assert "it cannot be told from near" in text

    def test_equal_methods_share_the_first_place(self, tmp_path):
        write_run(tmp_path / "a", "loreft")
        write_run(tmp_path / "b", "red")
        assert ", as have red" in tables.verdict(only(tmp_path))
