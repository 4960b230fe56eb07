"""A search space: one Optuna distribution for each parameter.

In a file in ``conf/search`` a parameter is a key of the schema, or a group of YAML files, with one of

    intervention.rank: {choice: [1, 2, 4]}       # any values, including lists and null
    trainer.max_epochs: {int: [1, 9], step: 2}
    intervention.dropout: {float: [0, 0.2]}
    optimizer.lr: {log: [1e-4, 1e-2]}            # uniform in the logarithm

For a grid, float and log also need ``points: n``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from hydra.core.override_parser.types import Quote, QuotedString

from ..suggest import did_you_mean

# kind -> the additional key that it takes, and the minimum of that key
KINDS: dict[str, tuple[str, int] | None] = {
    "choice": None, "int": ("step", 1), "float": ("points", 2), "log": ("points", 2)
}  # fmt: skip
EDGE = 0.05  # fraction of a continuous range, at either end, that counts as its edge
DIGITS = 4  # significant digits of grid points

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Dimension:
    """One parameter of a space."""

    name: str  # key of the schema, or group
    kind: str  # one of :data:`KINDS`
    values: tuple[Value, ...]  # the choices, or the lowest and the highest value, both included
    extra: int | None = None  # ``step`` of an ``int``, ``points`` of a ``float`` or ``log``, or None

    @property
    def ends(self) -> tuple[Any, Any]:
        """Return the lowest value of a range, and the highest that can be reached from it in whole steps."""
        low, high = cast(tuple[Any, Any], self.values)
        return low, high - (high - low) % (self.extra or 1) if self.kind == "int" else high

    def suggest(self, trial: Any) -> Value:
        """Return the value of an Optuna trial."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, self.values)
        low, high = self.ends
        if self.kind == "int":
            return trial.suggest_int(self.name, low, high, step=self.extra or 1)
        return trial.suggest_float(self.name, low, high, log=self.kind == "log")

    def grid(self) -> list[Value]:
        """Return the grid values of this parameter; a continuous one needs ``points``."""
        if self.kind == "choice":
            return list(self.values)
        low, high = self.ends
        if self.kind == "int":
            return list(range(low, high + 1, self.extra or 1))
        if self.extra is None:
            raise ValueError(
                f"{self.name}: a grid needs the number of points of {self.kind}: write "
                f"{self.name}: {{{self.kind}: [{low}, {high}], points: 5}}"
            )
        parts = [i / (self.extra - 1) for i in range(self.extra)]
        exact = [low * (high / low) ** p if self.kind == "log" else low + (high - low) * p for p in parts]
        return [min(max(float(f"{value:.{DIGITS}g}"), low), high) for value in exact]

    def edge(self, value: Value) -> str:
        """Return ``lower`` or ``upper`` if a value is at that edge of the space; values beyond it were not tried.

        The edges of a choice are its lowest and its highest number, if there are more than two. A lower end of 0, or
        of the integer 1, is natural and not an edge.
        """
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in (value, *self.values)):
            return ""
        numbers = cast(tuple[float, ...], self.values if self.kind == "choice" else self.ends)
        low, high, at = min(numbers), max(numbers), cast(float, value)
        if low == high or (self.kind == "choice" and len(numbers) < 3):
            return ""
        part = math.log(at / low) / math.log(high / low) if self.kind == "log" else (at - low) / (high - low)
        margin = EDGE if self.kind in ("float", "log") else 0.0
        if part >= 1 - margin:
            return "upper"
        natural = low == 0 or (low == 1 and isinstance(low, int))
        return "lower" if part <= margin and not natural else ""


def parse_space(space: Any) -> tuple[Dimension, ...]:
    """Read a space from a YAML file."""
    if not isinstance(space, Mapping) or not space:
        raise ValueError(
            f"the space must name at least one parameter, such as optimizer.lr: {{log: [1e-4, 1e-2]}}; got {space!r}"
        )
    return tuple(parse_dimension(str(name), given) for name, given in space.items())


def parse_dimension(name: str, given: Any) -> Dimension:
    """Read one parameter of a space."""
    example = f"write {name}: {{choice: [...]}}, or int, float or log with [lowest, highest]"
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: {given!r} is not a distribution: {example}")
    kinds = [key for key in given if key in KINDS]
    if len(kinds) != 1:
        unknown = [str(key) for key in given if key not in KINDS]
        hint = did_you_mean(unknown[0], KINDS) if unknown and not kinds else ""
        raise ValueError(f"{name} must have one of {', '.join(KINDS)}; got {dict(given)!r}{hint}; {example}")
    (kind,) = kinds
    values, key, extra = given[kind], KINDS[kind], None
    for other in given.keys() - {kind}:
        if key is None or other != key[0]:
            allowed = "no other key" if key is None else f"only {key[0]} in addition"
            raise ValueError(f"{name}: {kind} takes {allowed}; got {other!r}")
        extra = given[other]
        if isinstance(extra, bool) or not isinstance(extra, int) or extra < key[1]:
            raise ValueError(f"{name}: {other} must be an integer, at least {key[1]}; got {extra!r}")
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name}: {kind} takes a list; got {values!r}; {example}")
    found = _choices(name, values) if kind == "choice" else _range(name, kind, values)
    return Dimension(name, kind, found, extra)


def _choices(name: str, values: Sequence[Any]) -> tuple[Value, ...]:
    if not values:
        raise ValueError(f"{name}: choice must list at least one value")
    # Optuna stores plain values only, so a list is stored in command-line syntax
    found = tuple(_written(v) if isinstance(v, list | tuple) else v for v in values)
    for value in found:
        if not isinstance(value, bool | int | float | str | None):
            raise ValueError(
                f"{name}: a choice must be a number, text, true, false, null or a list; got {value!r}"
            )
    if len(set(map(repr, found))) < len(found):
        raise ValueError(f"{name}: a choice is given twice in {list(found)}")
    return found


def _written(value: Any) -> str:
    """Return a list and its items in Hydra's grammar, whose quoted texts escape nothing except quotes."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return QuotedString(value, Quote.single).with_quotes() if isinstance(value, str) else json.dumps(value)


def _range(name: str, kind: str, values: Sequence[Any]) -> tuple[Any, Any]:
    number = int if kind == "int" else int | float
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, number) for v in values):
        what = "two integers" if kind == "int" else "two numbers"
        raise ValueError(f"{name}: {kind} takes {what}, [lowest, highest]; got {list(values)}")
    low, high = values if kind == "int" else map(float, values)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: the ends of {kind} must be finite; got {list(values)}")
    if kind == "log" and low <= 0:
        raise ValueError(
            f"{name}: the lowest value of log must be above 0; got {low:g}; write for example "
            f"{{log: [1e-6, {high:g}]}}, or {{float: [{low:g}, {high:g}]}}"
        )
    if low >= high:
        raise ValueError(
            f"{name}: the range {low:g} to {high:g} is empty: the lowest value must be below the highest"
        )
    return low, high


def override(name: str, value: Value) -> str:
    """Return a parameter's value as an argument of ``reft-train``."""
    if isinstance(value, bool):
        return f"{name}={str(value).lower()}"
    return f"{name}={'null' if value is None else value}"


def brief(params: Mapping[str, Value]) -> list[str]:
    """Return parameters in readable form, with four significant digits."""
    return [f"{name}={v:.4g}" if isinstance(v, float) else f"{name}={v}" for name, v in params.items()]
