"""The table of benchmark families; each is one file that ends in `FAMILY = Family(...)`."""

import importlib

from ...suggest import did_you_mean
from ..family import Family
from ..labelled import ClassificationFamily
from .arithmetic import FAMILY as _ARITHMETIC
from .code import FAMILY as _CODE
from .commonsense import FAMILY as _COMMONSENSE
from .glue import FAMILY as _GLUE
from .gsm8k import FAMILY as _GSM8K
from .instruction import FAMILY as _INSTRUCTION
from .metamathqa import FAMILY as _METAMATHQA
from .reading import FAMILY as _READING
from .spans import FAMILY as _SPANS

AnyFamily = Family | ClassificationFamily

FAMILIES: dict[str, AnyFamily] = {
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


def get_family(name: str) -> AnyFamily:
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
        if not isinstance(family, AnyFamily):
            raise ValueError(f"{name} is not a Family, but {type(family).__name__}")
        return family
    raise ValueError(
        f"no benchmark family {name!r}{did_you_mean(name, FAMILIES)}; there are {', '.join(FAMILIES)}, custom, and "
        "one's own by its import path, my_module.FAMILY"
    )
