"""Reports of runs whose generated answers are all wrong show a measure that still distinguishes the methods."""

from invented_runs import FEW, predictions, right, write_run

from reft_lightning.reporting.build import build_report


def rows_of(options):
    rows = predictions("boolq", [0] * len(options))
    for row, option in zip(rows, options, strict=True):
        row["scores"]["option_accuracy"] = option
    return rows


def head_and_order(folder):
    (comparison,) = build_report([folder], resamples=FEW).comparisons
    return comparison.head, [method.label for method in comparison.methods], comparison.notes


def write_two(folder, accuracy=0.0):
    for method, rate in (("loreft", 0.8), ("red", 0.4)):
        options = right(rate)
        rows = rows_of(options)
        rows[0]["scores"]["accuracy"] = 60 * accuracy
        scored = {"test/boolq/accuracy": accuracy, "test/boolq/option_accuracy": sum(options) / 60}
        write_run(folder / method, method, scores={"boolq": [0] * 60}, rows=rows, metrics=scored)
    return folder


def test_the_accuracy_over_options_stands_where_every_generated_text_is_wrong(tmp_path):
    head, order, notes = head_and_order(write_two(tmp_path))
    assert head == ("boolq", "option_accuracy")
    assert order == ["loreft", "red"]
    assert "accuracy is 0 for every method: option_accuracy is shown" in notes


def test_generated_accuracy_stands_where_one_text_is_right(tmp_path):
    assert head_and_order(write_two(tmp_path, accuracy=1 / 60))[0] == ("boolq", "accuracy")


def test_free_texts_are_compared_by_their_loss(tmp_path):
    for method, loss in (("loreft", 2.5), ("red", 2.25)):
        write_run(tmp_path / method, method, scores={"custom": [0] * 60}, metrics={"test/loss": loss},
                  monitor="val/loss")  # fmt: skip
    head, order, notes = head_and_order(tmp_path)
    assert head == ("custom", "loss")
    assert order == ["red", "loreft"]
    assert not any("is shown" in note for note in notes)
