"""The tables of reports of invented runs, in every format, and the verdict in words."""

import csv
import json
import re
from dataclasses import replace

from invented_runs import only, report, write_grid, write_run

from reft_lightning.reporting import records, tables
from reft_lightning.reporting.page import latex, markdown


class TestTables:
    def test_the_best_is_bold_in_markdown_and_latex(self, tmp_path):
        made = report(write_grid(tmp_path))
        (comparison,) = made.comparisons
        lines = markdown(made).splitlines()
        assert next(line for line in lines if line.startswith("| loreft")).count("**") == 2
        assert next(line for line in lines if line.startswith("| red")).count("**") == 0
        text = latex([comparison])
        assert text.count(r"\textbf") == 1
        for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{table}"):
            assert text.count(rule) == 3  # scores, costs, pairs
        shapes = re.findall(r"\\begin\{tabular\}\{(l\w*)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
        for shape, body in shapes:
            rows = [line for line in body.splitlines() if line.endswith(r"\\")]
            assert {line.count("&") for line in rows} == {len(shape) - 1}

    def test_latex_holds_costs_significance_and_notes(self, tmp_path):
        comparison = only(write_grid(tmp_path))
        text = latex([comparison])
        for part in (
            "peak memory GiB",
            "1.00",
            "p (Holm)",
            "rows and seeds",
            "it differs from red",
            "than 10 seeds",
        ):
            assert part in text, part
        (pair,) = comparison.pairs
        assert f"loreft $-$ red & boolq & accuracy & +{100 * pair.difference:.1f}" in text
        low, high = pair.interval
        comparison.pairs = [replace(pair, difference=-pair.difference, interval=(-high, -low))]
        assert f"& $-${100 * pair.difference:.1f} & [$-$" in latex([comparison])

    def test_names_are_escaped(self, tmp_path):
        write_run(tmp_path / "a", "my_module.A|B & <b>50%</b>")
        made = report(tmp_path)
        (comparison,) = made.comparisons
        assert "my_module.A\\|B & \\<b>50%\\</b>" in markdown(made)
        assert r"my\_module.A|B \& \textless{}b\textgreater{}50\%" in latex([comparison])

    def test_the_csv_has_one_line_for_each_method_task_and_measure(self, tmp_path):
        comparison = only(write_grid(tmp_path / "runs"))
        records.write_csv(tmp_path / "x.csv", records.records([comparison]), records.CSV_COLUMNS)
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
        assert "it differs from far (p < 0.05 after Holm, over rows and seeds)" in text
        assert "these runs do not distinguish it from near" in text
        table = tables.pair_table(comparison)
        assert {"95 % interval, unadjusted", "differs by p (Holm)"} <= set(table.columns)
        assert any("Methods that do not differ are not thereby equal" in note for note in table.notes)
        assert any(note.startswith("fewer than 10 seeds (") and "near 3" in note for note in comparison.notes)

    def test_of_one_seed_the_verdict_speaks_of_rows_alone(self, tmp_path):
        comparison = only(write_grid(tmp_path, {"loreft": 0.9, "far": 0.2}, seeds=(42,)))
        text = tables.verdict(comparison)
        assert "on these rows it differs from far" in text
        assert "over rows only: nothing is known about other seeds" in text
        assert any("nothing is known about other seeds" in note for note in comparison.notes)

    def test_a_method_without_a_test_is_named(self, tmp_path):
        write_grid(tmp_path, {"loreft": 0.9, "far": 0.2, "lost": 0.5}, seeds=(42, 43))
        for path in tmp_path.glob("lost_*/predictions/reft_test.jsonl"):
            path.unlink()
        text = tables.verdict(only(tmp_path))
        assert "it cannot be tested against lost: their predictions" in text

    def test_correlations_are_no_percentages(self, tmp_path):
        write_run(tmp_path / "a", metrics={"test/boolq/matthews": 0.5}, monitor="val/matthews")
        comparison = only(tmp_path)
        assert tables.score_table(comparison).title.startswith("Scores × 100: mean")

    def test_equal_methods_share_the_first_place(self, tmp_path):
        write_run(tmp_path / "a", "loreft")
        write_run(tmp_path / "b", "red")
        assert ", as have red" in tables.verdict(only(tmp_path))
