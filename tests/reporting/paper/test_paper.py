"""``reft-report paper``: the printed numbers, runs, seeds, and notes on runs with other settings."""

import io
import json
import shutil

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from reft_lightning.config import compose as compose_module
from reft_lightning.config.compose import compose, config_dir
from reft_lightning.data.families.arithmetic import FAMILY as ARITHMETIC
from reft_lightning.data.families.commonsense import FAMILY as COMMONSENSE
from reft_lightning.data.families.glue import FAMILY as GLUE
from reft_lightning.reporting.paper import obtained, table
from reft_lightning.reporting.paper.obtained import WIN_RATE, compare, composed, read_runs
from reft_lightning.reporting.paper.published import AVERAGE, read_rows

SEVEN = "paper/commonsense_llama_7b_loreft"
MIXTURE = "data.mixture=/somewhere/commonsense_170k.json"
# What the paper prints for it, as fractions.
PRINTED = {
    "boolq": 0.693, "piqa": 0.844, "social_i_qa": 0.803, "hellaswag": 0.931, "winogrande": 0.842,
    "ARC-Easy": 0.832, "ARC-Challenge": 0.682, "openbookqa": 0.789,
}  # fmt: skip


def put_run(folder, *overrides, seed=42, shift=0.0, experiment=SEVEN, drop=(), **values):
    """Write a run folder as reft-train leaves it, its scores shifted from the paper's."""
    folder.mkdir(parents=True)
    config = compose([f"experiment={experiment}", MIXTURE, f"seed={seed}", *overrides])
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    metrics = {f"test/{t}/accuracy": v + shift for t, v in PRINTED.items() if t not in drop}
    results = {
        "status": "complete",
        "experiment": experiment,
        "seed": seed,
        "metrics": metrics,
        "finished": "1",
    }
    (folder / "results.json").write_text(json.dumps(results | values))
    return folder


def compared(folder, experiment=SEVEN):
    row = next(row for row in read_rows() if row.experiment == experiment)
    return row, compare(row, read_runs(folder))


def printed(folder, **options):
    text = io.StringIO()
    table.main({"folder": str(folder), **options}, Console(file=text, width=150))
    return text.getvalue()


def line(text, word):
    """The cells of the table line that contains a word."""
    return [cell.strip() for cell in next(x for x in text.splitlines() if word in x).split("│")[1:-1]]


class TestNumbers:
    def test_the_experiments_compose_with_the_papers_training_file(self):
        # test_conf.py composes the experiments
        one_each = {row.overrides: row for row in read_rows()}.values()
        assert [row.experiment for row in one_each if composed(row) is None] == []

    def test_a_row_of_table_1(self):
        row = next(row for row in read_rows() if row.experiment == SEVEN)
        assert (row.table, row.row, row.seeds) == (1, "LLaMA-7B LoReFT", 3)
        assert row.numbers["SIQA"] == (80.3, None, "social_i_qa", "accuracy")
        assert row.numbers["average"][:2] == (80.2, None)
        assert len(row.numbers) == 9
        assert row.overrides == ("data.mixture=PATH/commonsense_170k.json",)

    def test_averages_are_those_of_their_row(self):
        for row in read_rows():
            if AVERAGE in row.numbers:
                values = [number.value for name, number in row.numbers.items() if name != AVERAGE]
                # all are rounded
                assert np.mean(values) == pytest.approx(row.numbers[AVERAGE].value, abs=0.07)

    def test_the_tasks_are_those_that_the_families_log(self):
        tasks = {**COMMONSENSE.tasks, **ARITHMETIC.tasks}
        for row in read_rows():
            for name, (_, _, task, measure) in row.numbers.items():
                if task in GLUE.tasks:
                    assert measure == GLUE.tasks[task].measures[0]
                elif task != WIN_RATE and name != AVERAGE:
                    assert (task in tasks, measure) == (True, "accuracy")


class TestRuns:
    def test_seeds_give_mean_and_deviation(self, tmp_path):
        for seed, shift in ((42, 0.01), (43, 0.02), (44, 0.03)):
            put_run(tmp_path / str(seed), seed=seed, shift=shift)
        text = printed(tmp_path)
        assert line(text, "BoolQ") == ["LLaMA-7B LoReFT", "BoolQ", "69.3", "71.3 (1.00)", "+2.0", "3 of 3"]
        cells = line(text[text.index("OBQA") :], "average")
        assert cells[2:] == ["80.2", "82.2 (1.00)", "+2.0", "3 of 3"]
        assert " * " not in text

    def test_one_seed_has_no_deviation(self, tmp_path):
        put_run(tmp_path / "a")
        assert line(printed(tmp_path), "PIQA")[2:] == ["84.4", "84.4 (one seed)", "+0.0", "1 of 3"]

    def test_a_row_without_runs_says_so(self, tmp_path):
        text = printed(tmp_path)
        assert line(text, "LLaMA-7B DiReFT")[1:] == ["average", "79.0", "not run", "", "0 of 3"]
        assert text.count("not run") == len(read_rows())
        assert "0 runs in" in text

    def test_a_missing_task_is_said_and_there_is_no_average_without_it(self, tmp_path):
        put_run(tmp_path / "a", drop=("hellaswag",))
        text = printed(tmp_path, table="1")
        assert line(text, "HellaSwag")[3:] == ["missing", "", "0 of 3"]
        assert line(text[text.index("OBQA") :], "average")[3:] == ["missing", "", "0 of 3"]
        assert line(text, "BoolQ")[3] == "69.3 (one seed)"

    def test_changed_settings_are_a_line_of_their_own(self, tmp_path):
        put_run(tmp_path / "a")
        put_run(tmp_path / "b", "data.limit_test=100", "intervention.rank=4", seed=43, shift=0.2)
        _, groups = compared(tmp_path)
        assert [group.changed for group in groups] == [(), ("data.limit_test=100", "intervention.rank=4")]
        assert [list(group.scores) for group in groups] == [[42], [43]]
        text = printed(tmp_path)
        assert "LLaMA-7B LoReFT *" in text
        assert f"* {SEVEN} with data.limit_test=100, intervention.rank=4" in text

    def test_places_logging_and_the_seed_change_nothing(self, tmp_path):
        free = ["model.path=/models/x", "logger=wandb", "trainer.accelerator=cpu", "data.num_workers=2"]
        put_run(tmp_path / "a", *free, seed=7)
        _, groups = compared(tmp_path)
        assert [group.changed for group in groups] == [()]

    def test_another_training_file_is_a_change(self, tmp_path):
        put_run(tmp_path / "a", "data.mixture=/somewhere/commonsense_15k.json")
        put_run(tmp_path / "b", "data.mixture=null")
        _, groups = compared(tmp_path)
        assert {group.changed for group in groups} == {
            ("data.mixture=commonsense_15k.json",),
            ("data.mixture=null",),
        }

    def test_what_this_machine_changes_in_every_run_is_a_change(self, tmp_path, monkeypatch):
        conf = tmp_path / "conf"
        shutil.copytree(config_dir(), conf)
        (conf / "local").mkdir(exist_ok=True)
        (conf / "local" / "default.yaml").write_text(
            "# @package _global_\ndata:\n  limit_test: 100\n  path: /data\n"
        )
        monkeypatch.setattr(compose_module, "config_dir", lambda: conf)
        monkeypatch.setattr(obtained, "config_dir", lambda: conf)
        folder = put_run(tmp_path / "runs" / "a")
        assert OmegaConf.load(folder / "config.yaml").data.limit_test == 100
        _, groups = compared(tmp_path / "runs")
        assert [group.changed for group in groups] == [("data.limit_test=100",)]

    def test_what_a_run_recorded_about_its_data_is_noted(self, tmp_path):
        versions = {
            "split": {"train_rows": 169_120, "validation_rows": 1300},
            "train": {"mixture": {"rows": 170_420}},
            "test": {
                "boolq": {"rows": 3270, "overlap": 0, "note": "Without passages."},
                "piqa": {"rows": 1838, "overlap": 12},
            },
        }
        for seed in (42, 43):
            put_run(tmp_path / str(seed), seed=seed, data_versions=versions)
        _, (group,) = compared(tmp_path)
        assert group.notes == [
            "169120 train rows",
            "boolq, test: Without passages.",
            "piqa: 12 test rows of 1838 occur in the train rows",
        ]
        assert f"{SEVEN}: piqa: 12 test rows of 1838" in printed(tmp_path)

    def test_a_run_older_than_a_setting_has_its_default(self, tmp_path):
        folder = put_run(tmp_path / "a")
        kept = OmegaConf.load(folder / "config.yaml")
        del kept["decoding"]
        OmegaConf.save(kept, folder / "config.yaml")
        _, groups = compared(tmp_path)
        assert [group.changed for group in groups] == [()]

    def test_a_seed_that_ran_twice_counts_once_by_its_last_run(self, tmp_path):
        put_run(tmp_path / "b", shift=0.5, finished="2026-01-01")
        put_run(tmp_path / "a", shift=0.0, finished="2026-01-02")
        _, (group,) = compared(tmp_path)
        assert group.scores[42]["BoolQ"] == pytest.approx(69.3)
        assert group.notes == ["seed 42 ran more than once: the last complete run counts"]

    def test_an_unfinished_run_does_not_count(self, tmp_path):
        put_run(tmp_path / "a", status="stopped")
        _, (group,) = compared(tmp_path)
        assert group.scores == {}
        assert group.notes[0].startswith("seed 42 is stopped, not complete: ")
        assert line(printed(tmp_path), "BoolQ")[3:] == ["missing", "", "0 of 3"]

    def test_other_experiments_and_broken_files_are_left_out(self, tmp_path, caplog):
        put_run(tmp_path / "a", experiment=SEVEN)
        put_run(tmp_path / "b", experiment="paper/commonsense_llama_7b_direft")
        for name, content in (("c", '{"experiment": "quickstart"}'), ("d", '{"metrics": {}}'), ("e", "{")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "results.json").write_text(content)
        assert [folder.name for folder, _ in read_runs(tmp_path)] == ["a", "b"]
        assert "not JSON" in caplog.text
        _, groups = compared(tmp_path)
        assert sum(len(group.scores) for group in groups) == 1


class TestWinRates:
    ROW = "paper/instruction_llama2_7b_loreft"

    def put(self, folder, judge="alpaca_eval_gpt4", rate=85.1, n_total=805, n_unjudged=0, name="x"):
        if not folder.exists():
            folder.mkdir(parents=True)
            config = compose([f"experiment={self.ROW}"])
            (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
            results = {
                "status": "complete",
                "experiment": self.ROW,
                "seed": 42,
                "metrics": {"test/loss": 1.0},
            }
            (folder / "results.json").write_text(json.dumps(results))
            (folder / "outputs").mkdir()
        result = {"judge": judge, "reference": "text_davinci_003", "win_rate": rate}
        result |= {"n_total": n_total, "n_unjudged": n_unjudged}
        (folder / "outputs" / f"reft_alpaca_eval.vs_{name}.win_rate.json").write_text(json.dumps(result))

    def group(self, folder):
        _, (group,) = compared(folder, self.ROW)
        return group

    def test_the_papers_judge_gives_the_papers_number(self, tmp_path):
        self.put(tmp_path / "a")
        assert (self.group(tmp_path).scores, self.group(tmp_path).notes) == ({42: {"Win-rate": 85.1}}, [])

    def test_another_judges_number_is_not_compared(self, tmp_path):
        self.put(tmp_path / "a", "length", 99.0)
        group = self.group(tmp_path)
        assert group.scores == {42: {}}
        assert group.notes == [
            "length against text_davinci_003 gives 99.00: not the paper's judge and reference"
        ]

    @pytest.mark.parametrize(("n_total", "n_unjudged"), [(3, 0), (3, 800), (3, 802), (796, 9), (806, 0)])
    def test_a_win_rate_over_other_pairs_is_not_compared(self, tmp_path, n_total, n_unjudged):
        self.put(tmp_path / "a", n_total=n_total, n_unjudged=n_unjudged)
        group = self.group(tmp_path)
        assert group.scores == {42: {}}
        assert group.notes == [
            f"alpaca_eval_gpt4 against text_davinci_003 gives 85.10 on {n_total} judged pairs, not "
            "AlpacaEval's 805"
        ]

    def test_a_few_unjudged_pairs_are_noted(self, tmp_path):
        self.put(tmp_path / "a", n_total=797, n_unjudged=8)
        group = self.group(tmp_path)
        assert group.scores == {42: {"Win-rate": 85.1}}
        assert group.notes == [
            "alpaca_eval_gpt4 against text_davinci_003 gives 85.10 with 8 of 805 pairs unjudged"
        ]

    def test_several_files_are_noted_and_the_last_counts(self, tmp_path):
        self.put(tmp_path / "a", rate=80.0, name="a")
        self.put(tmp_path / "a", rate=81.0, name="b")
        group = self.group(tmp_path)
        assert group.scores == {42: {"Win-rate": 81.0}}
        assert group.notes == [
            "2 files contain its win rate, the last one counts: reft_alpaca_eval.vs_a.win_rate.json (80.00), "
            "reft_alpaca_eval.vs_b.win_rate.json (81.00)"
        ]


class TestArguments:
    def test_one_table_alone(self, tmp_path):
        text = printed(tmp_path, table="2")
        assert "Table 2" in text
        assert "Table 1:" not in text

    def test_an_unknown_table_lists_the_known_ones(self, tmp_path):
        with pytest.raises(ValueError, match=r"table must be one of 1, 2.*; got '5'"):
            table.main({"folder": str(tmp_path), "table": "5"})

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"nowhere: no such folder"):
            table.main({"folder": str(tmp_path / "nowhere")})


def test_colons_in_a_name_are_no_emoji(tmp_path, capsys):
    folder = tmp_path / "f1:100:x"
    folder.mkdir()
    table.main({"folder": str(folder)})
    assert f"0 runs in {folder} belong" in capsys.readouterr().out
