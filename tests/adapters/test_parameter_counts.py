"""The paper's parameter counts (Wu et al. 2024, Tables 1-4, 13 and 17), from configurations alone."""

import pytest
import tiny
import torch
from adapted_models import LLAMA_7B
from transformers import LlamaConfig, RobertaConfig

import reft_lightning as rl

LLAMA_13B = LlamaConfig(
    vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
LLAMA3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
ROBERTA_BASE = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
ROBERTA_LARGE = RobertaConfig(
    vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, hidden_size=1024, num_hidden_layers=24,
    num_attention_heads=16, intermediate_size=4096,
)  # fmt: skip
COMMONSENSE = {"rank": 8, "positions": "f7+l7", "tied": "all"}
ULTRAFEEDBACK = {"layers": [3, 9, 18, 24], "positions": "f5+l5", "tied": "group"}

ROWS = {
    "LLaMA-7B and Llama-2 7B, LoReFT": (LLAMA_7B, "loreft", COMMONSENSE, 2_097_408, "0.0311"),
    "LLaMA-7B, DiReFT r=4, prefix and suffix apart": (
        LLAMA_7B, "direft", {"rank": 4, "positions": "f7+l7", "tied": "group"}, 2_097_408, "0.0311"),
    "LLaMA-13B, LoReFT": (LLAMA_13B, "loreft", COMMONSENSE, 3_277_120, "0.0252"),
    "Llama-3 8B, LoReFT": (LLAMA3_8B, "loreft", COMMONSENSE, 2_097_408, "0.0261"),
    "Llama-2 7B, Ultrafeedback": (LLAMA_7B, "loreft", {"rank": 4, **ULTRAFEEDBACK}, 262_176, "0.0039"),
    "Llama-2 7B, Ultrafeedback, half": (LLAMA_7B, "loreft", {"rank": 2, **ULTRAFEEDBACK}, 131_088, "0.0019"),
    "RoBERTa-base, GLUE": (ROBERTA_BASE, "loreft", {"rank": 1, "positions": "f3"}, 18_444, "0.0148"),
    "RoBERTa-large, GLUE": (ROBERTA_LARGE, "loreft", {"rank": 1, "positions": "f3"}, 49_176, "0.0138"),
    "ConsReFT, Table 17": (LLAMA_7B, "consreft", COMMONSENSE, 1_048_832, "0.0156"),
    "LobiReFT, Table 17": (LLAMA_7B, "lobireft", COMMONSENSE, 1_048_832, "0.0156"),
    "GOODY-2 demonstration": (LLAMA_7B, "loreft", {"rank": 4, "layers": [15], "positions": "l1"}, 32_772, "0.0005"),
    "memorisation, 7B": (LLAMA_7B, "consreft", {"rank": 1, "layers": [15], "positions": "l1"}, 4_097, "0.0001"),
    "memorisation, 13B": (LLAMA_13B, "consreft", {"rank": 1, "layers": [15], "positions": "l1"}, 5_121, "0.0000"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_counts_and_percents_are_the_papers(row):
    config, method, settings, count, percent = ROWS[row]
    found = rl.count_parameters(config, method, **settings)
    assert found.trainable == count
    assert f"{found.percent:.4f}" == percent


def test_counting_takes_no_random_numbers_from_what_is_attached_next():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for method in ("loreft", "direft", "consreft"):
        rl.count_parameters(tiny.model("llama").config, method, rank=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_papers_untied_formula_has_one_intervention_a_position():
    def trained(tied, positions="f7+l7"):
        return rl.count_parameters(LLAMA_7B, "loreft", rank=8, positions=positions, tied=tied).trainable

    assert trained("group") == 2 * trained("all")
    assert trained("position") == 14 * trained("all")
    # peers count a second, unused intervention for a prefix alone
    assert trained("group", "f7") == trained("all")


def test_settings_by_layer_count_by_layer():
    found = rl.count_parameters(LLAMA_7B, "loreft", layers={3: {"rank": 1}, 9: {"rank": 2}}, positions="l1")
    assert found.trainable == (2 * 4096 + 1) + 2 * (2 * 4096 + 1)


def test_an_unknown_task_is_answered_with_the_nearest():
    config = tiny.model("llama").config
    with pytest.raises(ValueError, match="'sequence_clasification'; did you mean 'sequence_classification'"):
        rl.count_parameters(config, "loreft", rank=2, task="sequence_clasification")
