"""The table of benchmark families: every file in this folder that defines `FAMILY = Family(...)`."""

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
    """Return a family by name, or a custom one by its import path, such as `my_module.FAMILY`.

    Raises:
        ValueError: if there is none; suggests the closest name.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    if "." in name:
        try:
            family = import_object(name)
        except ValueError as error:
            raise ValueError(f"cannot import the benchmark family {name!r}: {error}") from error
        if not isinstance(family, AnyFamily):
            raise ValueError(f"{name} must be a Family; got {type(family).__name__}")
        return family
    raise ValueError(
        f"unknown benchmark family {name!r}{did_you_mean(name, FAMILIES)}; choose one of {', '.join(FAMILIES)}, "
        "custom, vision, or the import path of your own, such as my_module.FAMILY"
    )
