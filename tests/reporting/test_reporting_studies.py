"""Studies of reft-search in reports."""

import json
import shutil
import sys

import numpy as np
import pytest
from invented_runs import invented_trial, report, shown, write_run

from reft_lightning.reporting import plots, tables
from reft_lightning.reporting.build import Report
from reft_lightning.reporting.command import write
from reft_lightning.reporting.page import latex, markdown, page
from reft_lightning.reporting.studies import ENOUGH, Study, _importance, read_study
from reft_lightning.search import ledger
from reft_lightning.search.study import open_storage
from reft_lightning.search.study_files import JOB, JOURNAL


def write_winner(folder, method, seed, **job):
    write_run(folder, method, seed)
    (folder / JOB).write_text(json.dumps({"kind": "winner", "method": method, "seed": seed, **job}))


def lose_a_cost(study):
    """The last trial of red has spent no steps."""
    before, found, after = (study / JOURNAL).read_text().rpartition('"steps":50')
    assert found
    (study / JOURNAL).write_text(f'{before}"steps":0{after}')


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory):
    """A study as reft-search leaves it: two methods, six trials each, winners of two seeds."""
    optuna = pytest.importorskip("optuna", reason="studies take the extra 'search'")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = tmp_path_factory.mktemp("searched") / "study"
    folder.mkdir()
    storage = open_storage(folder, None)
    rng = np.random.default_rng(0)
    space = {
        "optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "intervention.rank": optuna.distributions.CategoricalDistribution([4, 8]),
    }
    for method in ("loreft", "red"):
        kept = optuna.create_study(storage=storage, study_name=f"one/{method}", direction="maximize")
        for number in range(6):
            params = {
                "optimizer.lr": float(10 ** rng.uniform(-4, -2)),
                "intervention.rank": (4, 8)[number % 2],
            }
            value = None if number == 3 else 1 - abs(np.log10(params["optimizer.lr"]) + 3)
            state = optuna.trial.TrialState.FAIL if number == 3 else optuna.trial.TrialState.COMPLETE
            found = {"state": state, "value": value, "params": params, "distributions": space}
            cost = {"cost": {"steps": 50, "tokens": 5000, "seconds": 10}}
            kept.add_trial(optuna.trial.create_trial(**found, user_attrs=cost))
        # one of the trials has a run folder, which must not appear in any table
        write_run(folder / "trials" / method / "6", method, seed=7)
        for seed in (42, 43):
            write_winner(folder / "winners" / method / f"seed_{seed}", method, seed)
    plan = "budget: {unit: trials, amount: 6}\nmonitor: val/accuracy\nstudy: one\n"
    (folder / "study.yaml").write_text(plan)
    summary = {"status": "complete", "methods": {"loreft": {}, "red": None}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def study(finished_study, tmp_path):
    return shutil.copytree(finished_study, tmp_path / "study")


class TestStudies:
    def test_winners_are_compared_and_trials_are_history(self, study, tmp_path):
        made = report(study)
        (comparison,) = made.comparisons
        assert [(m.label, m.seeds) for m in comparison.methods] == [("loreft", [42, 43]), ("red", [42, 43])]
        (kept,) = made.studies
        assert {method: len(trials) for method, trials in kept.trials.items()} == {"loreft": 6, "red": 6}
        assert kept.states("red") == "5 complete, 1 fail"
        assert kept.budget == "budget of each method: 6 trials; spent: equal"
        text = write(made, tmp_path / "out")
        assert "Study study" in text
        assert "val/accuracy" in text
        names = {path.name.split("_", 1)[1] for path in (tmp_path / "out" / "plots").glob("*.svg")}
        assert "study_search_history.svg" in names
        assert "study_parameter_importance.svg" not in names  # of six trials

    def test_the_best_trial_and_what_was_spent(self, study):
        kept = read_study(study)
        for method, trials in kept.trials.items():
            best = kept.best(method)
            assert best.value == max(trial.value for trial in trials if trial.value is not None)
        table = tables.study_table(kept)
        column = list(table.columns).index("best val/accuracy × 100")  # as the table of scores has them
        assert [row[column].text for row in table.rows] == [
            f"{100 * kept.best(method).value:.1f}" for method in kept.trials
        ]
        assert table.rows[0][list(table.columns).index("steps")].text == "300"

    def test_a_study_that_spent_unequally_is_said_to(self, study):
        (study / "study.yaml").write_text("budget: {unit: steps, amount: 300}\nstudy: one\n")
        lose_a_cost(study)
        made = report(study)
        assert "unequal: red has spent 250 steps" in made.studies[0].budget
        text = shown(made)
        assert text.count('<p class="warn" role="note">⚠ study study: budget of each method') == 1

    @pytest.mark.parametrize("summary", [None, '{"status": "running"}', "{", "[]"])
    def test_a_study_that_has_not_ended_is_running_and_not_unequal(self, study, summary):
        (study / "study.yaml").write_text("budget: {unit: steps, amount: 3000}\nstudy: one\n")
        lose_a_cost(study)
        (study / "summary.json").unlink()
        if summary is not None:
            (study / "summary.json").write_text(summary)
        made = report(study)
        (kept,) = made.studies
        assert kept.budget == "still running: spent loreft 300, red 250 of 3,000 steps for each method"
        assert (kept.running, kept.equal) == (True, True)
        text = shown(made)
        assert "unequal" not in text
        assert text.count('<p class="warn" role="note">⚠ study study: still running') == 1

    def test_a_winner_at_the_edge_of_its_space_is_said_to_lie_there(self, study):
        methods = {
            "loreft": {"best": {"number": 1, "edges": ["at the upper edge of optimizer.lr"]}},
            "red": {"best": {"number": 2, "edges": []}, "gave_up": "3 trials in a row cost no tokens"},
        }
        (study / "summary.json").write_text(json.dumps({"status": "complete", "methods": methods}))
        made = report(study)
        said = tables.study_table(made.studies[0]).notes
        assert said == [
            "loreft: the winner is at the upper edge of optimizer.lr; values beyond were not tried",
            "red: it ended before its budget: 3 trials in a row cost no tokens",
        ]
        assert said[0] in shown(made)
        assert all(note in markdown(made) for note in said)

    @pytest.mark.parametrize("whole", [True, False])
    def test_beside_the_scores_such_a_winner_has_a_mark_and_a_word_below(self, study, whole):
        for file in study.glob(f"winners/red/*/{JOB}"):
            edges = {"edges": ["at the upper edge of optimizer.lr"]}
            file.write_text(json.dumps(json.loads(file.read_text()) | edges))
        made = report(study if whole else study / "winners")
        (comparison,) = made.comparisons
        table = tables.score_table(comparison)
        assert [row[0].text for row in table.rows] == ["loreft", "red †"]
        said = tables.verdict(comparison)
        assert "the best settings of red are at an edge of the search space (†)" in said
        text = shown(made)
        for written in (text, markdown(made)):
            assert "red †" in written
            assert table.notes[0] in written
            assert said in written.replace("\\<", "<").replace("&lt;", "<")
        tex = latex(made.comparisons)
        assert r"red $\dagger$ &" in tex
        assert r"\par $\dagger$ the best settings" in tex

    def test_a_read_that_only_the_ledger_knows_is_shown(self, study):
        (run,) = (study / "winners" / "red").glob("seed_42")
        results = json.loads((run / "results.json").read_text())
        lines = [{"time": f"2025-0{i}", "method": "red", "seed": 42, "config_hash": results["config_hash"],
                  "model": "adapted", "folder": str(run)} for i in (1, 2)]  # fmt: skip
        (study / "test_reads.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        table = tables.read_table(report(study).reads)
        assert len(table.rows) == 5  # four winners, and the first read of a run that was restarted
        of_red = [row[7].text for row in table.rows if (row[1].text, row[2].text) == ("red", "42")]
        assert of_red == ["", "read again"]

    def test_search_and_report_count_the_same_reads(self, study):
        """A winner that was restarted, read again by reft-eval and by the same command elsewhere; a truncated line."""
        (run,) = (study / "winners" / "red").glob("seed_42")
        results = json.loads((run / "results.json").read_text())
        (read,) = results["test_reads"]
        later = read | {"time": "2026-02-02"}
        (run / "results.json").write_text(json.dumps(results | {"test_reads": [read, later]}))
        shutil.copytree(run, study.parent / "elsewhere")
        lines = [{"time": f"2025-0{i}", "method": "red", "seed": 42, "config_hash": results["config_hash"],
                  "model": "adapted", "folder": f"/moved{run}"} for i in (1, 2)]  # fmt: skip
        (study / "test_reads.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"time": "20'
        )
        of_red = [r for r in ledger.test_reads(study) if (r["method"], r["seed"]) == ("red", 42)]
        assert [(r["time"], r.get("again", False)) for r in of_red] == [
            ("2025-01", False), (read["time"], True), ("2026-02-02", True)
        ]  # fmt: skip
        for folders in ([study], [study, study.parent / "elsewhere"]):
            reads = [r for r in report(*folders).reads if r.folder.resolve() == run.resolve()]
            assert [r.time for r in reads] == [r["time"] for r in of_red]

    def test_winners_and_reads_have_the_names_and_folders_of_the_study(self, study):
        for file in study.glob(f"winners/red/*/{JOB}"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"method": "head"}))
        made = report(study)
        (comparison,) = made.comparisons
        assert {method.label for method in comparison.methods} == {"loreft", "head"}
        table = tables.read_table(made.reads, made.folders)
        names = {(row[1].text, row[2].text, row[-1].text) for row in table.rows}
        assert names == {
            (method, str(seed), f"study/winners/{folder}/seed_{seed}")
            for method, folder in (("loreft", "loreft"), ("head", "red")) for seed in (42, 43)
        }  # fmt: skip
        # two folders with the same name are shown with their full paths, and so are paths in neither of them
        twins = [made.folders[0], study.parent / "other" / "study"]
        for roots in (twins, [study.parent / "other"]):
            folder = study / "winners" / "red"
            assert tables.places([folder], roots) == [str(folder)]

    def test_a_study_without_winners_is_its_history(self, study):
        shutil.rmtree(study / "winners")
        made = report(study)
        assert made.comparisons == []
        assert "No run was scored." in shown(made)

    def test_without_optuna_the_winners_are_still_compared(self, study, monkeypatch):
        monkeypatch.setitem(sys.modules, "optuna", None)
        made = report(study)
        assert "pip install 'reft_lightning[search]'" in made.left[0].reason
        assert len(made.comparisons) == 1

    def test_a_journal_of_something_else_is_left_out(self, study):
        (study / JOURNAL).write_text("not\na\njournal\n")
        made = report(study)
        (left,) = made.left
        assert "is not an Optuna storage" in left.reason
        assert len(made.comparisons) == 1


def searched(trials, names, value):
    """A study that drew every parameter between 0 and 1, and its trials."""
    optuna = pytest.importorskip("optuna", reason="studies take the extra 'search'")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rng = np.random.default_rng(0)
    kept = optuna.create_study(direction="maximize")
    for _ in range(trials):
        params = {name: float(rng.random()) for name in names}
        kept.add_trial(invented_trial(value(params, rng), **params))
    return kept, kept.trials


class TestImportance:
    def test_the_parameter_that_matters_has_the_larger_share(self):
        kept, trials = searched(ENOUGH, ["lr", "rank"], lambda params, rng: -abs(params["lr"] - 0.5))
        shares = _importance(kept, trials)
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["lr"] > 0.6

    @pytest.mark.parametrize(("trials", "names"), [(ENOUGH - 1, ["lr", "rank"]), (ENOUGH, ["lr"])])
    def test_few_trials_and_a_single_parameter_tell_nothing(self, trials, names):
        kept, found = searched(trials, names, lambda params, rng: rng.normal())
        assert _importance(kept, found) == {}

    def test_the_caption_says_that_shares_of_noise_add_up_too(self, tmp_path):
        trials = {"loreft": [invented_trial(0.5, lr=0.1, dropout=0.4)]}
        study = Study(tmp_path, trials=trials, importance={"loreft": {"lr": 0.7, "dropout": 0.3}})
        text = page(Report([tmp_path], [], [], [study]), {str(tmp_path): plots.study_plots(study)})
        assert f"methods with at least {ENOUGH} complete trials and two parameters" in text
        assert "even for noise" in text
