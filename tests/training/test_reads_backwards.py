"""A model whose tokens attend to later tokens is not trained to predict what it reads."""

import pytest
import short_runs

from reft_lightning.runs.experiment import SetupError

BOTH_WAYS = ["model.config.model_type=gemma3_text", "+model.config.use_bidirectional_attention=true"]


def test_training_is_refused_before_a_step(data, tmp_path):
    with pytest.raises((SetupError, ValueError), match="tokens of Gemma3ForCausalLM attend to later tokens"):
        short_runs.run(data, tmp_path / "run", *BOTH_WAYS)
    assert not list((tmp_path / "run").glob("**/*.ckpt"))
