r"""An intervention is a module :math:`\Phi: R^d \to R^d` on single tokens.

It knows nothing about transformers, positions or layers. Subclassing registers it:

    class Gate(Intervention, name="gate"): ...

makes ``rl.attach(model, "gate")`` and ``reft-train intervention.method=gate`` work, with its constructor's
parameters as settings. Shapes: n tokens, d width, r rank.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..suggest import did_you_mean, import_object
from .rows import Found, Tokens

INTERVENTIONS: dict[str, type[Intervention]] = {}
"""Name -> class. Saved adapters store a method's name; only this table turns it into code."""

HALVES = (torch.bfloat16, torch.float16)
"""The 16-bit floating-point types."""


@contextmanager
def at_least_float32() -> Iterator[None]:
    """Create parameters inside the block in float32, even if a 16-bit default dtype was set to load the base model."""
    default = torch.get_default_dtype()
    try:
        if default in HALVES:
            torch.set_default_dtype(torch.float32)
        yield
    finally:
        torch.set_default_dtype(default)


class Intervention(nn.Module):
    r"""Edit single tokens: :math:`\Phi(h) = h + \text{scale} \cdot \text{edit}(h)`.

    A subclass defines :meth:`edit`, the difference :math:`\Phi(h) - h`, or, if that depends on more than single tokens,
    :meth:`edit_rows`; see :mod:`.rows`. Parameters are float32 and the edit is computed in float32 (float64 if the
    parameters are), then :math:`\Phi(h)` is cast to the dtype of h. Only parameters that a subclass itself creates in
    bfloat16 stay in bfloat16.

    Args:
        dim: width d of the representation.
        dropout: probability of dropping an entry during training.
        dropout_on: ``edit`` drops entries of the edit; ``output`` drops entries of the whole edited hidden
            state, as pyreft does.

    Raises:
        ValueError: if dropout lies outside [0, 1) or dropout_on is unknown.
    """

    rotations: ClassVar[tuple[str, ...]] = ()
    """Names of parameters whose scale has no effect (R's); the optimizer applies no weight decay to them."""
    reads_prompt: ClassVar[bool] = False
    """Whether edits depend on prompt tokens; positions must then select some."""
    closed_form: ClassVar[bool] = False
    """Whether an objective finds the parameters in one step, without training."""
    takes_source: ClassVar[str] = ""
    """The hidden state each token takes from another text: ``same`` (the token in its place), ``last``, or ``""``."""
    annealed: float = 1.0
    """Training progress from 0 to 1, for anything that changes gradually; 1 in evaluation."""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            raise ValueError(
                f"{cls.__name__} defines forward, which handles dtype, scale and dropout for all interventions: define "
                "edit(h), the difference Phi(h) - h, instead (pyreft's forward returns Phi(h))"
            )
        if name is None:
            return
        other = INTERVENTIONS.get(name, cls)
        # the same class again: a reloaded module, a cell run twice, a script that is also imported
        same = cls.__module__ in (other.__module__, "__main__") or other.__module__ == "__main__"
        if not same or cls.__qualname__ != other.__qualname__:
            mine, theirs = (f"{c.__module__}.{c.__qualname__}" for c in (cls, other))
            raise ValueError(f"the name {name!r} of {mine} is taken by {theirs}; choose another name")
        INTERVENTIONS[name] = cls

    def __init__(self, dim: int, *, dropout: float = 0.0, dropout_on: str = "edit") -> None:
        super().__init__()
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout!r}")
        if dropout_on not in ("edit", "output"):
            raise ValueError(f"dropout_on must be 'edit' or 'output'; got {dropout_on!r}")
        self.dim, self.dropout, self.dropout_on = dim, dropout, dropout_on

    def edit(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        """Return the difference Phi(h) - h at scale 1, without dropout."""
        if not self.sees_rows:
            raise NotImplementedError(f"{type(self).__name__} must define edit(h), the difference Phi(h) - h")
        found = self.edit_rows(h, Tokens.alone(h))
        return found.edit if isinstance(found, Found) else found

    def edit_rows(self, h: Tensor, tokens: Tokens) -> Tensor | Found:  # (n, d) -> (n, d)
        """Return the difference for tokens whose rows are known; a model calls it if a subclass overrides it."""
        return self.edit(h)

    def null(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        """Return the difference that removes from h the component the edit would add."""
        raise ValueError(f"{type(self).__name__} has no null(h): it cannot be nulled")

    @classmethod
    def defines(cls, name: str) -> bool:
        """Whether the class overrides a method: ``edit_rows``, ``penalty``, ``null``."""
        return getattr(cls, name) is not getattr(Intervention, name)

    @property
    def sees_rows(self) -> bool:
        """Whether the edit of a token depends on more than the token, or returns more than hidden states."""
        return self.defines("edit_rows")

    @property
    def edits_tokens(self) -> bool:
        """Whether ``edit`` gives the difference for each token from that token only, whatever else is returned."""
        return not self.sees_rows or self.defines("edit")

    def penalty(self) -> Tensor | None:
        """Return a scalar function of the parameters to add to the training loss, or None."""
        return None

    @property
    def directions(self) -> Tensor | None:  # (k, d)
        """Rows that span every edit; None if an edit can point in any direction."""
        return None

    def forward(
        self, h: Tensor, scale: float = 1.0, tokens: Tokens | None = None, *, nulled: bool = False
    ) -> Tensor:  # (n, d) -> (n, d)
        """Return Phi(h) in the dtype and on the device of h, wherever the parameters are.

        ``tokens.found`` receives the edit with its penalty and latents.
        """
        parameter = self._first_parameter()
        dtype = torch.float32 if parameter is None else torch.promote_types(parameter.dtype, torch.float32)
        x = h.to(h.device if parameter is None else parameter.device, dtype)
        with without_autocast(h.device.type):
            if nulled:
                return (x + self.null(x)).to(h)
            if tokens is None:
                edit = self.edit(x)
            else:
                found = self.edit_rows(x, tokens)
                tokens.found = found if isinstance(found, Found) else Found(found)
                edit = tokens.found.edit
            if self.dropout_on == "edit":
                edit = F.dropout(edit, self.dropout, self.training)
            edited = (x + (edit if scale == 1 else scale * edit)).to(h)
            if self.dropout_on == "edit":
                return edited
            # cast first, as pyreft does, to round the factor 1 / (1 - dropout) the same way
            return F.dropout(edited, self.dropout, self.training)

    def _first_parameter(self) -> nn.Parameter | None:
        # most interventions own one directly, which is faster to find
        for parameter in self._parameters.values():
            if parameter is not None:
                return parameter
        return next(self.parameters(), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Intervention:
        # .to(), .half() and .bfloat16() of a whole model end here: Phi moves to the device but keeps its dtypes.
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in HALVES else moved

        return super()._apply(keep, recurse)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def without_autocast(device: str) -> AbstractContextManager:
    """Switch autocast off if it is on: entering ``torch.autocast`` costs more than checking."""
    if device == "meta" or not torch.is_autocast_enabled(device):  # the meta device has none
        return nullcontext()
    return torch.autocast(device, enabled=False)


def registered(name: str) -> type[Intervention]:
    """Return the class registered under a name, without importing anything."""
    if name not in INTERVENTIONS:
        raise ValueError(
            f"unknown intervention {name!r}; known are {', '.join(sorted(INTERVENTIONS))}"
            f"{did_you_mean(name, INTERVENTIONS)} (for your own, first import the module that defines it)"
        )
    return INTERVENTIONS[name]


def intervention_class(method: str | type[Intervention]) -> type[Intervention]:
    """Return the class of a method: a class itself, a registered name, or ``package.module.Class`` to import.

    For names that the user writes; a name in a file that somebody else wrote goes through :func:`registered`.
    """
    if isinstance(method, str) and method not in INTERVENTIONS and "." in method:
        try:
            method = import_object(method)
        except ValueError as error:
            raise ValueError(f"cannot import the intervention {method!r}: {error}") from error
    if isinstance(method, str):
        return registered(method)
    if not (isinstance(method, type) and issubclass(method, Intervention)):
        raise ValueError(f"{method!r} is not a subclass of Intervention")
    return method


def method_name(cls: type[Intervention]) -> str:
    """Return the registered name of a class; an unnamed class is registered under its import path."""
    names = [name for name, known in INTERVENTIONS.items() if known is cls]
    if not names:
        names = [f"{cls.__module__}.{cls.__qualname__}"]
        INTERVENTIONS[names[0]] = cls
    return names[0]


@functools.cache
def settings_of(cls: type[Intervention]) -> Mapping[str, inspect.Parameter]:
    """Return the constructor's parameters other than ``dim``, including those ``**kwargs`` passes to base classes."""
    found: dict[str, inspect.Parameter] = {}
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = inspect.signature(base.__init__).parameters
        for name, p in parameters.items():
            if name not in ("self", "dim") and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                found.setdefault(name, p)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return MappingProxyType(found)  # cached, so read-only


def check_settings(cls: type[Intervention], settings: Mapping[str, Any]) -> None:
    """Reject settings that the class does not take, suggesting the closest, and missing ones."""
    allowed = settings_of(cls)
    for name in settings:
        if name not in allowed:
            raise ValueError(
                f"{cls.__name__} takes no setting {name!r}; it takes {', '.join(allowed)}{did_you_mean(name, allowed)}"
            )
    missing = [n for n, p in allowed.items() if p.default is p.empty and n not in settings]
    if missing:
        raise ValueError(f"{cls.__name__} needs the setting {', '.join(missing)}")
