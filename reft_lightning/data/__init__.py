"""Benchmark families, tokens and batches.

`FAMILIES` is the table of names; a family is one file that ends in `FAMILY = Family(...)`.
"""

from reft_lightning.data.base import Example, Family, Task, nearest
from reft_lightning.data.commonsense import FAMILY as _COMMONSENSE

FAMILIES: dict[str, Family] = {family.name: family for family in (_COMMONSENSE,)}


def get_family(name: str) -> Family:
    """Return a family by name.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"no benchmark family {name!r}{nearest(name, FAMILIES)}; there are {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


__all__ = ["FAMILIES", "Example", "Family", "Task", "get_family"]
