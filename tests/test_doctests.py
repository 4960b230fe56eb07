"""The examples in docstrings are run."""

import doctest
import importlib
from pathlib import Path

import pytest

import reft_lightning

PACKAGE = Path(reft_lightning.__file__).parent
MODULES = sorted(
    ".".join(("reft_lightning", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_show(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
