"""Products of float32 matrices: the fast library only where it is exact, and only during a run."""

import pytest
import short_runs
import torch

from reft_lightning.config.compose import CompositionError
from reft_lightning.speed import matmul_precision

CPU = torch.device("cpu")


def test_the_error_of_float32_products_is_that_of_float32():
    assert 1e-8 < matmul_precision.product_error("highest") < 1e-5
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("error", "gain", "precision"), [(1e-6, 2.2, "medium"), (1e-6, 1.1, "highest"), (3e-3, 4.0, "highest")]
)
def test_auto_takes_the_other_library_where_it_is_exact_and_faster(monkeypatch, error, gain, precision):
    monkeypatch.setattr(matmul_precision, "product_error", lambda precision: error)
    monkeypatch.setattr(matmul_precision, "product_gain", lambda precision: gain)
    with matmul_precision.matmul_precision("auto", CPU) as chosen:
        assert chosen == torch.get_float32_matmul_precision() == precision
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_gain_is_a_ratio_of_times(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 12.0] * matmul_precision.REPEATS)  # highest takes 4, medium 2
    monkeypatch.setattr(matmul_precision.time, "perf_counter", lambda: next(clock))
    assert matmul_precision.product_gain("medium") == 2.0
    assert torch.get_float32_matmul_precision() == "highest"


def test_auto_leaves_a_gpu_as_it_is(monkeypatch):
    monkeypatch.setattr(matmul_precision, "product_error", None)  # not called
    with matmul_precision.matmul_precision("auto", torch.device("cuda")) as chosen:
        assert chosen == "highest"


def test_a_choice_is_taken_and_given_back_after_an_error():
    def failing():
        with matmul_precision.matmul_precision("high", CPU) as chosen:
            assert chosen == torch.get_float32_matmul_precision() == "high"
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_records_what_it_used(tmp_path, monkeypatch):
    monkeypatch.setattr(matmul_precision, "product_gain", lambda precision: 2.0)
    monkeypatch.setattr(matmul_precision, "product_error", lambda precision: 1e-6)
    data = short_runs.write_rows(tmp_path / "data")
    short = ["trainer.max_steps=1", "test=false", "data.validation_size=0"]
    auto = short_runs.run(data, tmp_path / "auto", *short, "matmul_precision=auto")
    assert auto["matmul_precision"] == "medium"
    assert short_runs.run(data, tmp_path / "exact", *short)["matmul_precision"] == "highest"
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(CompositionError, match=r"matmul_precision must be one of auto, highest.*'highest'"):
        short_runs.config(tmp_path, "matmul_precision=hihgest")
