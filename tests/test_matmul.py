"""Products of float32 matrices: the fast library only where it is exact, and only during a run."""

import pytest
import short_runs
import torch

from reft_lightning import matmul
from reft_lightning.composition import CompositionError

CPU = torch.device("cpu")


def test_the_error_of_float32_products_is_that_of_float32():
    assert 1e-8 < matmul.product_error("highest") < 1e-5
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("error", "precision"), [(1e-6, "medium"), (3e-3, "highest")])
def test_auto_takes_the_fast_library_where_it_is_exact(monkeypatch, error, precision):
    monkeypatch.setattr(matmul, "product_error", lambda precision: error)
    with matmul.matmul_precision("auto", CPU) as chosen:
        assert chosen == torch.get_float32_matmul_precision() == precision
    assert torch.get_float32_matmul_precision() == "highest"


def test_auto_leaves_a_gpu_as_it_is(monkeypatch):
    monkeypatch.setattr(matmul, "product_error", None)  # not called
    with matmul.matmul_precision("auto", torch.device("cuda")) as chosen:
        assert chosen == "highest"


def test_a_choice_is_taken_and_given_back_after_an_error():
    def failing():
        with matmul.matmul_precision("high", CPU) as chosen:
            assert chosen == torch.get_float32_matmul_precision() == "high"
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_records_what_it_used(tmp_path, monkeypatch):
    monkeypatch.setattr(matmul, "product_error", lambda precision: 1e-6)
    data = short_runs.write_rows(tmp_path / "data")
    short = ["trainer.max_steps=1", "test=false", "data.validation_size=0"]
    assert short_runs.run(data, tmp_path / "auto", *short)["matmul_precision"] == "medium"
    exact = short_runs.run(data, tmp_path / "exact", *short, "matmul_precision=highest")
    assert exact["matmul_precision"] == "highest"
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(CompositionError, match=r"matmul_precision must be one of auto, highest.*'highest'"):
        short_runs.config(tmp_path, "matmul_precision=hihgest")
