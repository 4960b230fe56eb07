"""Which checkpoint a run restores, how it reports the choice, and what its table and its curves show."""

import csv
import io
import itertools
import json
import logging
import re
from pathlib import Path

import pytest
import short_runs
from rich.console import Console

from reft_lightning.config import compose
from reft_lightning.data.example import Example, exact_match
from reft_lightning.data.families.custom import with_rouge_l
from reft_lightning.runs import checks, experiment
from reft_lightning.runs.arguments import family_of
from reft_lightning.runs.console import print_table

EPOCHS, STEPS = 4, 5  # 20 train rows, 4 a step
FALLING = ("optimizer.lr=1e-2", "scheduler=constant")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions with free-text replies, and choices that are not part of the prompt."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 26), ("test", 4)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "reply", "choices"])
            for i in range(count):
                writer.writerow(
                    [f"what is {name} {i}?", f"it is the {i}th of them", f"it is the {i}th of them,no"]
                )
    return folder


def arguments(rows, *overrides):
    return [
        "model=tiny_random", "data=custom", f"data.path={rows}", "data.prompt=question", "data.target=reply",
        "data.validation_size=6", "data.batch_size=4", "decoding.max_new_tokens=2", "intervention.rank=2",
        "intervention.positions=f2+l2", "trainer.accelerator=cpu", f"trainer.max_epochs={EPOCHS}",
        "trainer.enable_progress_bar=false", *overrides,
    ]  # fmt: skip


def run(rows, folder, *overrides):
    return experiment.run(compose.compose(arguments(rows, *overrides)), Path(folder))


def monitor_of(rows, *overrides):
    config = compose.compose(arguments(rows, *overrides))
    return checks.monitor_of(config, family_of(config))


def shown(results):
    out = io.StringIO()
    print_table(results, Console(file=out, width=200))
    return out.getvalue()


@pytest.fixture(scope="module")
def tied(rows, tmp_path_factory):
    """A run whose accuracy is 0 in every validation, while its loss falls."""
    folder = tmp_path_factory.mktemp("tied")
    return folder, run(rows, folder, *FALLING)


def test_equal_scores_do_not_let_the_first_epoch_win(tied):
    folder, results = tied
    losses, scores = (short_runs.logged(folder, f"val/{name}") for name in ("loss", "accuracy"))
    assert results["monitor"] == "val/accuracy"
    assert set(scores.values()) == {0.0}
    best = min(losses, key=losses.__getitem__)
    assert best > min(losses)  # the trap would not show otherwise
    assert results["metrics"]["val/loss"] == pytest.approx(losses[best], rel=1e-5)
    assert results["best_step"] == short_runs.checkpoint(folder, "best")["global_step"] > STEPS


def test_the_results_and_the_table_say_why_a_checkpoint_counts(tied):
    _, results = tied
    assert results["chosen_by"].startswith(
        "tie in val/accuracy at 0.0000 (4 of 4 validations), broken by val/loss"
    )
    said = f"checkpoint of step {results['best_step']} of {EPOCHS * STEPS}: {results['chosen_by']}"
    assert said in shown(results)


def test_the_validation_of_the_checkpoint_that_counts_is_no_point_of_the_curve(tied):
    folder, _ = tied
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        written = [row["val/loss"] for row in csv.DictReader(file) if row["val/loss"]]
    assert len(written) == EPOCHS


def test_free_texts_are_chosen_and_tabled_by_their_loss(rows, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        results = run(rows, tmp_path, *FALLING, "data.template=alpaca", "trainer.max_epochs=2")
    assert results["monitor"] == "val/loss"
    assert results["chosen_by"].startswith("lowest val/loss of 2 validations")
    assert f"using the checkpoint of step {results['best_step']} of 10: lowest val/loss" in caplog.text
    (line,) = (line for line in shown(results).splitlines() if "custom" in line)
    assert f"{results['metrics']['test/loss']:.4f}" in line


def test_free_texts_are_measured_by_rouge_l_of_each_row(rows, tmp_path):
    results = run(rows, tmp_path, *FALLING, "data.template=alpaca", "trainer.max_epochs=1")
    lines = (tmp_path / "predictions" / "reft_test.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    expected = [lcs_f1(row["generated"], row["gold"]) for row in predictions]
    assert [row["scores"]["rouge_l"] for row in predictions] == pytest.approx(expected)
    assert results["metrics"]["test/custom/rouge_l"] == pytest.approx(sum(expected) / len(expected))
    assert "ROUGE-L" in shown(results)


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("a b c d", "A c, d!", 6 / 7),
        ("", "a", 0),
        ("d c b a", "a b c d", 1 / 4),
        ("Äh, öde 3", "äh öde 3", 1),
        ("20 °C in 2024", "20 C in 2024", 1),
        ("© Acme™ → ★ ▶ 5", "acme 5", 1),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(text, gold, expected):
    score = with_rouge_l(exact_match(str.strip))
    assert score([text], Example("t", "p", gold, gold)).scores["rouge_l"] == pytest.approx(expected)
    assert lcs_f1(text, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("我喜欢蓝色的房子", "我喜欢红色的房子。", 7 / 8),
        ("GPT模型", "gpt 模式", 2 * 2 / (3 + 3)),
        ("อากาศดี", "อากาศ", 2 * 5 / (6 + 5)),  # the last has a vowel sign
        ("नमस्ते दुनिया", "नमस्ते भारत", 2 * 1 / (2 + 2)),
        ("😀 👍", "👍", 2 * 1 / (2 + 1)),
        ("👍🏽", "👍🏿", 0),
        ("❤️ hi", "❤️", 2 * 1 / (2 + 1)),
        ("\ufe0f ✋\ufe0f", "✋\ufe0f", 1),  # a selector of nothing is no word
        ("🇩🇪🇫🇷", "🇫🇷 🇩🇪", 2 * 1 / (2 + 2)),
        ("👨‍👩‍👧 a", "👨‍👩‍👦 a", 2 * 1 / (2 + 2)),
        ("1️⃣2️⃣", "1️⃣ 3️⃣", 2 * 1 / (2 + 2)),
        ("un cafe\u0301", "un caf\u00e9", 1),
        ("\u0438\u0306", "\u0439", 1),
    ],
)
def test_rouge_l_compares_characters_where_words_have_no_blanks(text, gold, expected):
    score = with_rouge_l(exact_match(str.strip))
    assert score([text], Example("t", "p", gold, gold)).scores["rouge_l"] == pytest.approx(expected)


def lcs_f1(text: str, gold: str) -> float:
    """Return ROUGE-L by a table of lengths, independent of the library's code."""
    found, wanted = (re.findall(r"\w+", t.lower()) for t in (text, gold))
    lengths = [[0] * (len(wanted) + 1) for _ in range(len(found) + 1)]
    for i, j in itertools.product(range(len(found)), range(len(wanted))):
        same = found[i] == wanted[j]
        lengths[i + 1][j + 1] = lengths[i][j] + 1 if same else max(lengths[i][j + 1], lengths[i + 1][j])
    return 2 * lengths[-1][-1] / max(len(found) + len(wanted), 1)


@pytest.mark.parametrize(
    ("overrides", "monitor"),
    [
        ([], ("val/accuracy", "max")),
        (["data.template=chat"], ("val/loss", "min")),
        (["data.template=alpaca"], ("val/loss", "min")),
        (["data.template=chat", "data.options=choices"], ("val/option_accuracy", "max")),
        (["data.template=chat", "data.options=choices", "option_likelihood=false"], ("val/loss", "min")),
        (["data.template=chat", "data.target='so {reply}'", "data.answer=reply"], ("val/accuracy", "max")),
        (["data.template=chat", "checkpoint.monitor=val/accuracy"], ("val/accuracy", "max")),
    ],
)
def test_the_measure_that_chooses_fits_the_texts(rows, overrides, monitor):
    assert monitor_of(rows, *overrides) == monitor


def test_the_table_shows_the_loss_next_to_scores_that_are_all_0():
    results = {
        "model": "m", "method": "loreft", "run_dir": "r", "trainable_parameters": 1, "percent": 0.1, "monitor":
        "val/accuracy", "metrics": {"val/custom/accuracy": 0.0, "val/loss": 3.25},
        "counts": {"val/custom/accuracy": {"correct": 0, "total": 9, "missing": 0, "interval": [0.0, 0.3]}},
    }  # fmt: skip
    assert "3.2500" in shown(results)
    results["counts"]["val/custom/accuracy"]["correct"] = 3
    assert "3.2500" not in shown(results)
