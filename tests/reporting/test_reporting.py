"""Reports of invented runs: which runs share a table, their costs, and what is left out and why."""

import json
import re
import shutil

import numpy as np
import pytest
from invented_runs import cells, method, only, predictions, report, right, write_grid, write_run

from reft_lightning.reporting import records, tables
from reft_lightning.reporting.comparisons import BASE
from reft_lightning.reporting.page import latex
from reft_lightning.reporting.runs import find_folders, read_runs


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

    def test_methods_that_differ_in_a_class_are_told_by_its_name(self, tmp_path):
        objective = "reft_lightning.training.objectives.DPO"
        dpo = {"objective._target_": objective, "intervention.init_from": "/runs/sft"}
        for i, settings in enumerate(({}, dpo)):
            write_run(tmp_path / str(i), scores={"boolq": right(0.5)}, settings=settings)
        comparison = only(tmp_path)
        assert {m.label for m in comparison.methods} == {
            "loreft init_from=null objective=SFT",
            "loreft init_from=/runs/sft objective=DPO",
        }
        began = "loreft init_from=/runs/sft objective=DPO started from a saved adapter, whose training is not"
        assert sum(began in note for note in comparison.notes) == 1

    def test_several_configurations_on_test_rows_are_a_choice_that_is_warned_of(self, tmp_path):
        for rank in (4, 8):
            run = {"intervention.rank": rank}
            write_run(tmp_path / f"test_{rank}", settings=run)
            write_run(tmp_path / f"val_{rank}", settings=run, split="validation")
        test, validation = report(tmp_path).comparisons
        (note,) = (n for n in test.notes if "loreft in 2 configurations, all scored on test rows" in n)
        assert "(split=validation)" in note  # as `reft-report` takes its arguments
        assert not any("configurations" in note for note in validation.notes)

    def test_places_logging_and_stages_make_no_other_method(self, tmp_path):
        write_run(tmp_path / "a", seed=1)
        free = {"data.path": "/elsewhere", "logger.wandb": True, "trainer.accelerator": "cpu", "sealed": True}
        write_run(tmp_path / "b", seed=2, settings=free)
        assert [m.seeds for m in only(tmp_path).methods] == [[1, 2]]

    @pytest.mark.parametrize(("name", "methods"), [("mixture.json", 1), ("other.json", 2)])
    def test_a_file_is_compared_by_its_name(self, tmp_path, name, methods):
        write_run(tmp_path / "a", seed=1, settings={"data.mixture": "/here/mixture.json"})
        write_run(tmp_path / "b", seed=2, settings={"data.mixture": f"/there/{name}"})
        assert len(only(tmp_path).methods) == methods

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
        assert not any("frozen base" in note for note in comparison.notes)

    def test_other_scores_of_the_frozen_base_are_said(self, tmp_path):
        write_run(tmp_path / "a", seed=42, base={"boolq": right(0.3)})
        write_run(tmp_path / "b", seed=43, base={"boolq": right(0.5)})
        assert any("the frozen base has other scores in" in note for note in only(tmp_path).notes)


class TestWhatSharesATable:
    @pytest.mark.parametrize(
        ("other", "titles"),
        [
            ({"data": "two"}, ["tiny, boolq (test), data 1 of 2", "tiny, boolq (test), data 2 of 2"]),
            ({"model": "another"}, ["another, boolq (test)", "tiny, boolq (test)"]),
            ({"scores": {"piqa": right(0.5)}}, ["tiny, boolq (test)", "tiny, piqa (test)"]),
            ({"split": "validation"}, ["tiny, boolq (test)", "tiny, boolq (validation)"]),
            ({"settings": {"data.limit_test": 60}}, ["tiny, boolq (test), evaluated rows all",
                                                     "tiny, boolq (test), evaluated rows at most 60 per task"]),
            ({"settings": {"model.revision": "v2"}}, ["tiny, boolq (test)",
                                                      "tiny, boolq (test), revision v2"]),
        ],
        ids=["rows", "model", "task", "split", "limit", "revision"],
    )  # fmt: skip
    def test_runs_of_other_data_never_do_and_titles_say_what_differs(self, tmp_path, other, titles):
        write_run(tmp_path / "a", "loreft")
        write_run(tmp_path / "b", "red", **other)
        found = report(tmp_path).comparisons
        assert [comparison.title for comparison in found] == titles
        assert all(len(comparison.methods) == 1 for comparison in found)
        assert not any(comparison.pairs for comparison in found)

    def test_the_same_test_rows_after_splits_by_seed_do(self, tmp_path):
        for seed in (1, 2):
            folder = write_run(tmp_path / str(seed), seed=seed, settings={"data.split_seed": None})
            results = json.loads((folder / "results.json").read_text())
            split = {"train_rows": 100, "train_fingerprint": seed}
            results["data_versions"] |= {"split_seed": seed, "split": split}
            (folder / "results.json").write_text(json.dumps(results))
        assert [m.seeds for m in only(tmp_path).methods] == [[1, 2]]

    @pytest.mark.parametrize(
        ("column", "value", "words"),
        [
            ("source", "boolq.json, row 7000", "its rows of boolq differ from those of .*: 2 are .* row 7"),
            (
                "gold",
                "no",
                r"gold answers of boolq differ from those of .*, for boolq\.json, row 7: 'no' and 'yes'",
            ),
        ],
    )
    def test_a_run_of_other_rows_is_left_out_and_the_others_stay(self, tmp_path, column, value, words):
        write_grid(tmp_path / "runs", seeds=(42, 43))
        write_run(tmp_path / "runs" / "elsewhere", data="two")
        rows = predictions("boolq", right(0.99))
        rows[7][column] = value
        write_run(tmp_path / "runs" / "a_first", "direft", rows=rows, metrics={"test/boolq/accuracy": 0.99})
        made = report(tmp_path / "runs")
        found = {tuple(m.label for m in c.methods): len(c.pairs) for c in made.comparisons}
        assert found == {("loreft", "red"): 1, ("loreft",): 0}
        (left,) = made.left
        assert left.folder.name == "a_first"
        assert re.search(words, left.reason)

    def test_of_two_runs_of_other_rows_the_one_that_finished_first_counts(self, tmp_path):
        rows = predictions("boolq", right(0.9))
        rows[7]["gold"] = "no"
        write_run(tmp_path / "a", "better", rows=rows, scores={"boolq": right(0.9)}, finished="2026-01-02")
        write_run(tmp_path / "b", "red", finished="2026-01-01")
        made = report(tmp_path)
        assert [m.label for m in made.comparisons[0].methods] == ["red"]
        assert [item.folder.name for item in made.left] == ["a"]

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

    def test_a_head_is_counted_apart_and_memory_that_is_not_known_is_no_number(self, tmp_path):
        write_run(tmp_path / "a", head_parameters=700, peak_memory_bytes=None)
        table = tables.cost_table(only(tmp_path))
        assert cells(table, "loreft", "trained parameters") == "4,000 + head 700"
        assert cells(table, "loreft", "peak memory GiB") == "-"

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
        assert ("nequal budget" in latex([comparison])) == bool(said)
        assert {record["unequal_budget"] for record in records.records([comparison])} == {"; ".join(said)}

    @pytest.mark.parametrize(("begin", "overlapped"), [("00:30", True), ("01:00", False), ("00:59", True)])
    def test_runs_at_the_same_time_are_said_to_slow_each_other_down(self, tmp_path, begin, overlapped):
        write_run(tmp_path / "a", started="2026-01-01T00:00:00+00:00", finished="2026-01-01T01:00:00+00:00")
        times = {"started": f"2026-01-01T{begin}:00+00:00", "finished": "2026-01-01T02:00:00+00:00"}
        write_run(tmp_path / "b", "red", **times)
        write_run(tmp_path / "c", "direft")  # without a begin
        comparison = only(tmp_path)
        assert comparison.overlapped == overlapped
        assert (
            sum("2 runs ran at the same time as another" in note for note in comparison.notes) == overlapped
        )

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

    def test_a_copied_folder_is_no_second_run_and_no_second_read(self, tmp_path):
        read = {"task": "boolq", "rows": 60, "time": "2026-01-01", "model": "adapted"}
        write_run(tmp_path / "a", test_reads=[read], run_dir=str(tmp_path / "a"))
        shutil.copytree(tmp_path / "a", tmp_path / "backup of a")
        made = report(tmp_path)
        assert [item.reason for item in made.left] == [
            f"it contains the same run as {tmp_path / 'a'}: one of them is a copy"
        ]
        assert not any("more than once" in note for note in made.comparisons[0].notes)
        assert len(made.reads) == 1
        # what reft-eval reads by the copy is one more
        results = json.loads((tmp_path / "backup of a" / "results.json").read_text())
        results["test_reads"].append(read | {"time": "2026-01-05"})
        (tmp_path / "backup of a" / "results.json").write_text(json.dumps(results))
        assert [row[7].text for row in tables.read_table(report(tmp_path).reads).rows] == ["", "read again"]

    def test_reads_of_runs_that_stopped_count(self, tmp_path):
        write_run(tmp_path / "a")
        read = {"task": "boolq", "rows": 60, "time": "2025-12-31", "model": "adapted"}
        stopped = write_run(tmp_path / "b", status="stopped", test_reads=[read])
        (stopped / "config.yaml").unlink()  # the hash still shows that it is the same configuration
        made = report(tmp_path)
        assert [row[7].text for row in tables.read_table(made.reads).rows] == ["", "read again"]

    def test_the_base_and_the_adapted_model_are_read_apart(self, tmp_path):
        read = {"task": "boolq", "rows": 60, "time": "2026-01-01"}
        write_run(tmp_path / "a", test_reads=[read | {"model": "base"}, read | {"model": "adapted"}])
        assert not tables.read_table(report(tmp_path).reads).notes


class TestFolders:
    def test_what_cannot_be_used_is_named_with_the_reason(self, tmp_path):
        write_run(tmp_path / "good", started="yesterday")  # edited by hand
        edited = write_run(tmp_path / "edited") / "results.json"
        edited.write_text(edited.read_text().replace('"seed": 42', '"seed": "x"'))
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
        assert reasons["lacking"] == "results.json has no model"
        assert reasons["edited"] == "results.json: seed must be an integer"
        assert "results.json is damaged or not JSON" in reasons["json"]
        assert "it should contain keys and values, but contains a list" in reasons["list"]
        assert "config.yaml is damaged or not YAML" in reasons["yaml"]
        assert reasons["bare"] == reasons["hydra"] == "no results.json: the run ended before training started"

    def test_broken_predictions_leave_their_run_out_and_name_the_line(self, tmp_path):
        for name in ("loreft", "red"):
            folder = write_run(tmp_path / name, name)
        with open(folder / "predictions" / "reft_test.jsonl", "a") as file:
            file.write("{}\n")
        made = report(tmp_path)
        assert [run.method for run in made.runs] == ["loreft"]
        assert re.search(r"reft_test\.jsonl, line 61 is not a prediction", made.left[0].reason)
        with pytest.raises(ValueError, match=r"(?s)nothing to report.*line 61 is not a prediction"):
            report(folder)

    @pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\x1e"])
    def test_a_text_may_hold_any_end_of_line(self, tmp_path, end):
        folder = write_run(tmp_path / "a")
        rows = predictions("boolq", right(0.6))
        rows[3]["prompt"] = f"one{end}two"
        path = folder / "predictions" / "reft_test.jsonl"
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        assert only(tmp_path).methods[0].scores["boolq", "accuracy"].rows == 60

    def test_ten_parts_of_a_curve_stand_in_their_order(self, tmp_path):
        folder = write_run(tmp_path / "a")
        for part in range(2, 11):
            (folder / f"csv_{part}").mkdir()
            (folder / f"csv_{part}" / "metrics.csv").write_text(f"step,train/loss\n9,{part}\n")
        ((run,), _, _) = read_runs([folder])
        assert dict(run.curve("train/loss"))[9] == 10  # the last part knows best

    def test_a_run_gives_its_scores_by_task_and_measure_as_notebook_03_reads_them(self, tmp_path):
        folder = write_run(tmp_path / "a", scores={"boolq": [1.0, 0.0]}, base={"boolq": [0.0, 0.0]})
        ((run,), _, _) = read_runs([folder])
        assert run.scores("test")["boolq"]["accuracy"] == 0.5
        assert run.scores("test", base=True)["boolq"]["accuracy"] == 0
        assert run.scores("validation") == {}

    def test_nothing_usable_says_what_a_run_folder_is(self, tmp_path):
        write_run(tmp_path / "stopped", status="stopped")
        with pytest.raises(
            ValueError, match=r"(?s)nothing to report.*stopped.*a run folder is what reft-train writes"
        ):
            report(tmp_path)
        with pytest.raises(ValueError, match="nowhere: no such folder; a run folder is"):
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
            text.replace("option_likelihood: true\n", "").replace("  head_lr: null\n", "")
        )
        assert [m.seeds for m in only(tmp_path).methods] == [[1, 2]]
