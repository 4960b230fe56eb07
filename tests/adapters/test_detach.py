"""Whatever adapts a model, ``detach()`` leaves exactly the base, which can be adapted again."""

import warnings

import pytest
import tiny
import torch
from adapted_models import EVERY, adapted


def logits(model):
    batch = tiny.padded(tiny.rows(5, 7))
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize(("family", "method"), EVERY)
def test_a_detached_base_is_as_it_was_and_can_be_adapted_again(family, method):
    base = tiny.model(family).eval()
    before, names = logits(base), [name for name, _ in base.named_modules()]
    learned = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    for _ in range(2):
        model = adapted(family, method, base=base)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model.detach() is base
        assert torch.equal(logits(base), before)
        assert [name for name, _ in base.named_modules()] == names
        assert {name for name, p in base.named_parameters() if p.requires_grad} == learned
