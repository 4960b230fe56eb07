"""Replaced attributes are restored, however the block ends."""

import pytest

from reft_lightning.base_models.patching import replaced


class Thing:
    name = "class"


class Interrupted(Thing):
    def __setattr__(self, name, value):
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [None, ValueError])
def test_an_object_has_its_own_attribute_again_or_its_class_has(error):
    own, inherited = Thing(), Thing()
    own.name = "own"
    try:
        with replaced([(own, "name", "new"), (inherited, "name", "new")]):
            assert own.name == inherited.name == "new"
            if error:
                raise error
    except ValueError:
        pass
    assert (own.name, inherited.name) == ("own", "class")
    assert "name" not in vars(inherited)


def test_an_interruption_while_attributes_are_set_stays_that_interruption():
    first = Thing()
    with pytest.raises(KeyboardInterrupt), replaced([(first, "name", "new"), (Interrupted(), "name", "new")]):
        raise AssertionError("not reached")
    assert "name" not in vars(first)
