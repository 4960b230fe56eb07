"""Win rates: draws, errors, names, length control, and a published number."""

import csv
import math

import numpy as np
import pytest

from reft_lightning.data.files import read_json_file
from reft_lightning.reporting.judging.win_rate import length_controlled, share_of_win, win_rate


def rate(*preferences, **settings):
    names = {"generator": "mine", "reference": "theirs", "judge": "someone"} | settings
    return win_rate([{"preference": p} for p in preferences], **names)


def simulated(n, theta, phi, seed=0):
    """Judgements by the regression's own model, with soft preferences."""
    difference = np.random.default_rng(seed).normal(300, 400, n)
    x = np.tanh(difference / difference.std())
    return 1 / (1 + np.exp(-(theta + phi * x))), difference


class TestWinRate:
    def test_a_draw_is_half_a_win_however_it_is_written(self):
        assert rate(2, 1, 0)["win_rate"] == rate(2, 1, 1.5)["win_rate"] == 50.0
        assert rate(2, 1, 0)["n_draws"] == 1

    def test_preferences_between_1_and_2_are_probabilities(self):
        found = rate(1.9, 1.2)
        assert found["win_rate"] == pytest.approx(55.0)
        assert (found["discrete_win_rate"], found["n_wins"], found["n_wins_reference"]) == (50.0, 1, 1)

    def test_rows_without_judgement_are_left_out_and_counted(self):
        found = rate(2, None, 1, math.nan)
        assert (found["win_rate"], found["n_total"], found["n_unjudged"]) == (50.0, 2, 2)

    def test_the_standard_error_is_that_of_a_mean(self):
        shares = [1.0, 0.0, 0.5, 1.0, 0.0]
        expected = 100 * np.std(shares, ddof=1) / math.sqrt(5)
        found = rate(2, 1, 0, 2, 1)
        assert found["standard_error"] == pytest.approx(expected)
        assert found["interval"] == pytest.approx(
            [max(50 - 1.959964 * expected, 0), min(50 + 1.959964 * expected, 100)]
        )

    def test_one_row_has_no_standard_error_and_the_names_stand_with_the_number(self):
        found = rate(2)
        assert (found["win_rate"], found["standard_error"]) == (100.0, None)
        assert (found["generator"], found["reference"], found["judge"]) == ("mine", "theirs", "someone")

    @pytest.mark.parametrize("preference", [3, -1, 0.5, "2", True])
    def test_other_preferences_are_refused(self, preference):
        with pytest.raises(ValueError, match="preference must be"):
            share_of_win(preference)

    def test_without_any_judgement_there_is_no_win_rate(self):
        with pytest.raises(ValueError, match="none of the 2 rows was judged"):
            rate(None, None)


class TestNames:
    @pytest.mark.parametrize("missing", ["generator", "reference", "judge"])
    def test_a_win_rate_without_them_is_refused(self, missing):
        with pytest.raises(ValueError, match="got none"):
            rate(2, **{missing: None})

    def test_rows_against_several_references_are_refused(self):
        rows = [{"preference": 2, "generator_1": name} for name in ("a", "b")]
        with pytest.raises(ValueError, match="generator_1 must be the same name in all rows; got a, b"):
            win_rate(rows, generator="mine", judge="someone")

    def test_a_name_that_contradicts_the_rows_is_refused(self):
        rows = [{"preference": 2, "generator_1": "a", "generator_2": "m", "annotator": "j"}]
        with pytest.raises(ValueError, match="got a, b"):
            win_rate(rows, reference="b")


class TestLengthControl:
    def test_it_finds_the_preference_at_equal_length(self):
        w, difference = simulated(400, theta=-0.4, phi=1.5)
        found, _ = length_controlled(w, difference)
        assert found == pytest.approx(100 / (1 + math.exp(0.4)), abs=1e-3)
        assert 100 * w.mean() > found + 5  # longer outputs had raised the plain win rate

    def test_lengths_that_do_not_matter_change_nothing(self):
        rng = np.random.default_rng(1)
        difference = np.concatenate([x := rng.normal(0, 100, 500), x])
        w = np.repeat([1.0, 0.0], 500)
        assert length_controlled(w, difference)[0] == pytest.approx(50.0, abs=1e-6)

    def test_it_mirrors_when_the_two_models_change_places(self):
        w, difference = simulated(200, theta=0.7, phi=-1.0)
        there, error = length_controlled(w, difference)
        back, same_error = length_controlled(1 - w, -difference)
        assert there + back == pytest.approx(100.0)
        assert error == pytest.approx(same_error)

    def test_its_error_is_the_spread_over_repeated_judgements(self):
        p, difference = simulated(600, theta=-0.3, phi=1.0)
        rng = np.random.default_rng(2)
        drawn = [length_controlled((rng.random(600) < p).astype(float), difference) for _ in range(200)]
        rates, errors = np.asarray(drawn, dtype=float).T
        assert rates.mean() == pytest.approx(100 / (1 + math.exp(0.3)), abs=1.0)
        assert errors.mean() == pytest.approx(rates.std(ddof=1), rel=0.15)

    def test_a_model_that_wins_all_gets_100_and_no_overflow(self):
        found, _ = length_controlled(np.ones(50), np.arange(50.0))
        assert found == pytest.approx(100.0, abs=0.01)

    def test_equal_lengths_leave_the_win_rate(self):
        assert length_controlled(np.asarray([1.0, 0.0, 0.5]), np.zeros(3))[0] == 50.0

    def test_a_constant_difference_cannot_be_controlled(self):
        assert length_controlled(np.asarray([1.0, 0.0]), np.full(2, 7.0)) == (None, None)

    def test_it_is_computed_from_the_outputs_and_recorded_how(self):
        rows = [{"preference": 1 + i % 2, "output_1": "a" * 5, "output_2": "b" * (3 + i)} for i in range(8)]
        found = win_rate(rows, generator="m", reference="r", judge="j")
        assert "an intercept and tanh(length difference" in found["length_control"]
        assert (found["avg_length"], found["avg_length_reference"]) == (6.5, 5.0)
        # computed before scipy did the optimisation, by Newton's method
        assert found["length_controlled_win_rate"] == pytest.approx(44.543612486298855, abs=1e-6)
        assert found["length_controlled_standard_error"] == pytest.approx(20.371295714512666, abs=1e-6)

    def test_without_outputs_it_is_left_out(self):
        assert "length_controlled_win_rate" not in rate(2, 1)


@pytest.mark.shared
class TestPublished:
    """alpaca-7b in AlpacaEval 1: judged by GPT-4 against text_davinci_003 (tatsu-lab/alpaca_eval at cd543a149df8)."""

    @pytest.fixture
    def found(self, shared):
        path = shared / "data/instruct/alpaca_eval/alpaca-7b.alpaca_eval_gpt4.annotations.json.gz"
        return win_rate([row for row, _ in read_json_file(path)])

    @pytest.fixture
    def leaderboard(self, shared):
        path = shared / "data/instruct/alpaca_eval/alpaca_eval_gpt4_leaderboard.csv"
        with path.open(newline="", encoding="utf-8") as file:
            rows = {row["name"]: row for row in csv.DictReader(file)}
        assert len(rows) == 102
        return rows["Alpaca 7B"]

    def test_the_win_rate_is_the_leaderboards(self, found, leaderboard):
        assert found["win_rate"] == pytest.approx(26.459627329192543, abs=1e-12)
        assert found["win_rate"] == pytest.approx(float(leaderboard["win_rate"]), abs=1e-12)
        assert (found["n_wins"], found["n_draws"], found["n_total"]) == (205, 16, 805)
        assert found["reference"] == "text_davinci_003"
        assert round(found["avg_length"]) == int(leaderboard["avg_length"])

    def test_length_control_without_difficulty_comes_near_the_leaderboard(self, found, leaderboard):
        # theirs, 26.29, also has the difficulty of each instruction and a penalty
        assert found["length_controlled_win_rate"] == pytest.approx(25.67733995162965, abs=1e-6)
        assert (
            abs(found["length_controlled_win_rate"] - float(leaderboard["length_controlled_winrate"])) < 1.0
        )
