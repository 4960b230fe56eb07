"""The losses of small runs are those of `tests/golden/curves.txt`, to the last digit on the same build of torch."""

import runpy

import pytest
from conftest import ROOT

curves = runpy.run_path(str(ROOT / "tests" / "golden" / "make_curves.py"))
BUILD, GOLDEN = curves["read"]()


@pytest.mark.parametrize("name", curves["RUNS"])
def test_a_loss_curve_is_the_golden_one(name, tmp_path):
    found = curves["losses"](tmp_path, *curves["RUNS"][name])
    if curves["build"]() == BUILD:
        assert found == GOLDEN[name]
    else:  # other matrix products round differently
        assert found == pytest.approx(GOLDEN[name], rel=2e-3)
