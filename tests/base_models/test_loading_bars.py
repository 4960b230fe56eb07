"""Bars of transformers are hidden where ours are, or where one of ours replaces them."""

from functools import partialmethod

import pytest
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from reft_lightning.base_models.loading_bars import bars_of_transformers


@pytest.mark.parametrize("kind", [tqdm, transformers_logging.tqdm])
def test_no_bar_of_transformers_or_of_tqdm_is_drawn_in_a_pipe(kind, capsys):
    with bars_of_transformers():
        assert list(kind(range(3), desc="hidden")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(kind(range(3), desc="drawn")) == [0, 1, 2]
    assert "drawn: 100%" in capsys.readouterr().err


def test_bars_that_the_user_turned_off_stay_off(monkeypatch, capsys):
    monkeypatch.setattr(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
    with bars_of_transformers():
        pass
    assert list(tqdm(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
