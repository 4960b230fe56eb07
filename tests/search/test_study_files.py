"""The scripts of the studies in experiments/, on which their verdicts rest."""

import gzip
import itertools
import json
import runpy
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def analysis(root):
    return runpy.run_path(str(root / "experiments/study_factors/analyse.py"))["analysis"]


def contrasts(levels):
    """Columns that sum to 0, so that a set of factors can be left out while larger ones stay."""
    return np.vstack([np.eye(levels - 1), -np.ones(levels - 1)])


def residual_of_regression(y, sets, seeds):
    """Least squares on contrasts of sets of axes, and of the seeds' axis: the residual's sum of squares."""
    columns = []
    for index in np.ndindex(y.shape):
        row = [1.0, *(contrasts(y.shape[-1])[index[-1]] if seeds else [])]
        for chosen in sets:
            parts = [contrasts(y.shape[axis])[index[axis]] for axis in chosen]
            row += [np.prod(values) for values in itertools.product(*parts)]
        columns.append(row)
    return np.linalg.lstsq(np.array(columns), y.reshape(-1), rcond=None)[1].sum()


def test_the_analysis_of_variance_is_that_of_nested_regressions(analysis):
    y = np.random.default_rng(0).normal(size=(3, 2, 4, 3)) + np.arange(4)[:, None]
    rows = {row["source"]: row for row in analysis(y, "abc")}
    assert sum(row["ss"] for row in rows.values()) == pytest.approx(((y - y.mean()) ** 2).sum())
    assert sum(row["df"] for row in rows.values()) == y.size - 1
    sets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    full = residual_of_regression(y, sets, True)
    assert rows["residual"]["ss"] == pytest.approx(full)
    for left_out in sets:
        without = residual_of_regression(y, [chosen for chosen in sets if chosen != left_out], True)
        assert rows[" x ".join("abc"[axis] for axis in left_out)]["ss"] == pytest.approx(without - full)
    assert rows["seed"]["ss"] == pytest.approx(residual_of_regression(y, sets, False) - full)


def test_a_factor_that_does_all_explains_all_and_noise_explains_nothing(analysis):
    rng = np.random.default_rng(1)
    only = np.arange(3.0)[:, None, None, None] + 1e-6 * rng.normal(size=(3, 3, 3, 3))
    assert analysis(only, "abc")[0]["omega2"] == pytest.approx(1, abs=1e-6)
    shares = [
        [row["omega2"] for row in analysis(rng.normal(size=(3, 3, 3, 3)), "abc")[:-2]] for _ in range(300)
    ]
    assert np.abs(np.mean(shares, axis=0)).max() < 0.01  # unbiased, unlike eta squared


def test_rows_of_the_generative_study_are_split_without_a_common_one(root, tmp_path, monkeypatch, capsys):
    source = tmp_path / "validation.jsonl.gz"
    rows = [
        {"id": str(i), "question": f"q{i}", "choices": [f"a{i}", f"b{i}"], "gold": i % 2} for i in range(10)
    ]
    with gzip.open(source, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(source), str(tmp_path / "out")])
    runpy.run_path(str(root / "experiments/study_methods/prepare.py"), run_name="__main__")
    train, test = (
        [json.loads(line) for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    assert (len(train), len(test)) == (7, 3)
    assert {row["question"] for row in train + test} == {row["question"] for row in rows}
    for row in train + test:
        number = int(row["question"][1:])
        assert row["answer"] == f"{'ab'[number % 2]}{number}"
    assert "3 rows in" in capsys.readouterr().out
