"""The card of a run's adapter says what was trained, on what, and with which results."""

import short_runs
import tiny

import reft_lightning as rl
from reft_lightning.adapters.saving import CARD_FILE


def test_the_card_of_a_run_says_what_was_trained_on_what_and_what_came_out(data, tmp_path):
    results = short_runs.run(data, tmp_path, "trainer.max_epochs=1", "evaluate_base=true")
    card = (tmp_path / "adapter" / CARD_FILE).read_text()
    assert r"$$ \Phi(h) = h + R^\top (W h + b - R h), \qquad R R^\top = I_r $$" in card
    assert "| positions | `f2+l2` |" in card
    assert "| layers | `[0, 1]` |" in card
    assert f"{results['trainable_parameters']:,} trained parameters" in card
    versions = results["data_versions"]
    train, test = (versions[split]["boolq"]["fingerprint"] for split in ("train", "test"))
    assert f"| train | boolq | 24 | `{train}` | local: boolq/train.json |" in card
    assert f"| test | boolq | 6 | `{test}` | local: boolq/test.json |" in card
    assert f"| validation, cut |  | 6 | `{versions['split']['validation_fingerprint']}` |" in card
    assert "| seed | 42 (rows: 42) |" in card
    assert f"| configuration | {results['config_hash']} |" in card
    for name in ("test/boolq/accuracy", "base/test/boolq/accuracy"):
        low, high = (100 * end for end in results["counts"][name]["interval"])
        assert f"| {name} | {100 * results['metrics'][name]:.1f} % | {low:.1f} to {high:.1f} | 6 |" in card
    assert "from transformers import LlamaForCausalLM" in card
    assert 'rl.ReftModel.from_pretrained(model, "this folder' in card
    assert str(tmp_path) not in card  # no folder of this machine


def test_a_card_of_an_adapter_that_no_run_trained_says_no_more_than_it_knows(tmp_path):
    rl.attach(tiny.model("llama"), "red").save_pretrained(tmp_path)
    card = (tmp_path / CARD_FILE).read_text()
    assert r"$$ \Phi(h) = s \odot h + b $$" in card
    assert "## Training" not in card
