"""Benchmark families, tokens and batches.

`FAMILIES` is the table of names; a family is one file that ends in `FAMILY = Family(...)`.
"""

import importlib

from reft_lightning.data.arithmetic import FAMILY as _ARITHMETIC
from reft_lightning.data.base import Example, Family, Judgement, Task, nearest
from reft_lightning.data.code import FAMILY as _CODE
from reft_lightning.data.commonsense import FAMILY as _COMMONSENSE
from reft_lightning.data.glue import FAMILY as _GLUE
from reft_lightning.data.gsm8k import FAMILY as _GSM8K
from reft_lightning.data.instruction import FAMILY as _INSTRUCTION
from reft_lightning.data.labelled import ClassificationFamily
from reft_lightning.data.metamathqa import FAMILY as _METAMATHQA
from reft_lightning.data.reading import FAMILY as _READING
from reft_lightning.data.spans import FAMILY as _SPANS

FAMILIES: dict[str, Family | ClassificationFamily] = {
    family.name: family
    for family in (
        _COMMONSENSE,
        _ARITHMETIC,
        _GSM8K,
        _INSTRUCTION,
        _GLUE,
        _CODE,
        _READING,
        _SPANS,
        _METAMATHQA,
    )
}


def get_family(name: str) -> Family | ClassificationFamily:
    """Return a family by name, or one's own by its import path, `my_module.FAMILY`.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            family = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import the benchmark family {name!r}: {error}") from error
        if not isinstance(family, Family | ClassificationFamily):
            raise ValueError(f"{name} is no Family, but {type(family).__name__}")
        return family
    raise ValueError(
        f"no benchmark family {name!r}{nearest(name, FAMILIES)}; there are {', '.join(FAMILIES)}, custom, and one's "
        "own by its import path, my_module.FAMILY"
    )


__all__ = ["FAMILIES", "ClassificationFamily", "Example", "Family", "Judgement", "Task", "get_family"]
