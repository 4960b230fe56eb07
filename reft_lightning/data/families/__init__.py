"""The table of benchmark families: every file of this folder that ends in `FAMILY = Family(...)`."""

import importlib
import pkgutil

from ...suggest import did_you_mean, import_object
from ..family import Family
from ..labelled import ClassificationFamily

AnyFamily = Family | ClassificationFamily


def _families() -> dict[str, AnyFamily]:
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    families = (module.FAMILY for module in modules if hasattr(module, "FAMILY"))
    return {family.name: family for family in families}


FAMILIES = _families()


def get_family(name: str) -> AnyFamily:
    """Return a family by name, or one's own by its import path, `my_module.FAMILY`.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    if "." in name:
        try:
            family = import_object(name)
        except ValueError as error:
            raise ValueError(f"cannot import the benchmark family {name!r}: {error}") from error
        if not isinstance(family, AnyFamily):
            raise ValueError(f"{name} is not a Family, but {type(family).__name__}")
        return family
    raise ValueError(
        f"no benchmark family {name!r}{did_you_mean(name, FAMILIES)}; there are {', '.join(FAMILIES)}, custom, vision, "
        "and one's own by its import path, my_module.FAMILY"
    )
