"""The card of a run's adapter says what was trained, on what, and with which results."""

import pytest
import short_runs
import tiny

import reft_lightning as rl
from reft_lightning.adapters.saving import CARD_FILE


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    results = short_runs.run(short_runs.write_rows(folder / "data"), folder / "run", "evaluate_base=true")
    return folder, results, (folder / "run" / "adapter" / CARD_FILE).read_text()


def test_the_card_has_formula_positions_layers_and_parameters(run):
    _, results, card = run
    assert r"$$ \Phi(h) = h + R^\top (W h + b - R h), \qquad R R^\top = I_r $$" in card
    assert "| positions | `f2+l2` |" in card
    assert "| layers | `[0, 1]` |" in card
    assert f"{results['trainable_parameters']:,} trained parameters" in card


def test_the_card_has_the_data_with_their_fingerprints(run):
    _, results, card = run
    train, test = (results["data_versions"][split]["boolq"] for split in ("train", "test"))
    assert f"| train | boolq | 24 | `{train['fingerprint']}` | local: boolq/train.json |" in card
    assert f"| test | boolq | 6 | `{test['fingerprint']}` | local: boolq/test.json |" in card
    assert (
        f"| validation, cut |  | 6 | `{results['data_versions']['split']['validation_fingerprint']}` |"
        in card
    )


def test_the_card_has_seed_versions_and_scores_with_intervals(run):
    _, results, card = run
    assert "| seed | 42 (rows: 42) |" in card
    assert f"| configuration | {results['config_hash']} |" in card
    for name in ("test/boolq/accuracy", "base/test/boolq/accuracy"):
        low, high = (100 * end for end in results["counts"][name]["interval"])
        assert f"| {name} | {100 * results['metrics'][name]:.1f} % | {low:.1f} to {high:.1f} | 6 |" in card


def test_the_card_says_how_to_load_and_names_no_folder_of_this_machine(run):
    folder, _, card = run
    assert "from transformers import LlamaForCausalLM" in card
    assert 'rl.ReftModel.from_pretrained(model, "this folder' in card
    assert str(folder) not in card


def test_a_card_of_an_adapter_that_no_run_trained_says_no_more_than_it_knows(tmp_path):
    rl.attach(tiny.model("llama"), "red").save_pretrained(tmp_path)
    card = (tmp_path / CARD_FILE).read_text()
    assert r"$$ \Phi(h) = s \odot h + b $$" in card
    assert "## Training" not in card
