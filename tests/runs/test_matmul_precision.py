"""The precision of float32 products is the configured one."""

import pytest
import short_runs
import torch

from reft_lightning.config.compose import CompositionError


def test_a_run_uses_and_records_the_precision_that_it_names(data, tmp_path):
    short = ["trainer.max_steps=1", "test=false", "data.validation_size=0"]
    for precision in ("high", "highest"):
        results = short_runs.run(data, tmp_path / precision, *short, f"matmul_precision={precision}")
        assert results["matmul_precision"] == torch.get_float32_matmul_precision() == precision


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(CompositionError, match=r"matmul_precision must be one of highest.*'highest'"):
        short_runs.config(tmp_path, "matmul_precision=hihgest")
