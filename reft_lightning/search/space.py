"""A search space: where the values of each parameter come from, and what trial k draws.

In a file of ``conf/search`` a parameter is a key of the schema, or a group of YAML files, and one of

    intervention.rank: {choice: [1, 2, 4]}       # any values, also lists and null
    trainer.max_epochs: {int: [1, 9], step: 2}
    intervention.dropout: {float: [0, 0.2]}
    optimizer.lr: {log: [1e-4, 1e-2]}            # uniform in the logarithm

with ``points: n`` beside float and log for a grid. What a trial draws depends on the study's seed, the method, the
trial's number, and, with TPE, on the trials before it; on nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..suggest import did_you_mean

KINDS = ("choice", "int", "float", "log")
EXTRA = {"choice": (), "int": ("step",), "float": ("points",), "log": ("points",)}
SAMPLERS = ("tpe", "random", "grid")
EDGE = 0.05  # part of a continuous range, at either end, that counts as its edge
DIGITS = 4  # significant ones of a drawn number: it is read, typed and compared by people

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Dimension:
    """One parameter of a space.

    Args:
        name: key of the schema, or group.
        kind: one of :data:`KINDS`.
        values: the choices, or lowest and highest value, both included.
        step: between the values of an ``int``.
        points: of a ``float`` or ``log`` in a grid, or None.
    """

    name: str
    kind: str
    values: tuple[Value, ...]
    step: int = 1
    points: int | None = None

    @property
    def corners(self) -> tuple[Value, ...]:
        """Every choice, or the two ends: the values that are tried before the first trial."""
        return self.values

    def grid(self) -> list[Value]:
        """Return the values of this dimension in a grid.

        Raises:
            ValueError: for a continuous one without ``points``.
        """
        if self.kind == "choice":
            return list(self.values)
        low, high = self.values
        if self.kind == "int":
            return list(range(low, high + 1, self.step))
        if self.points is None:
            raise ValueError(
                f"{self.name}: a grid needs to know how many values of a {self.kind} to try: write "
                f"{self.name}: {{{self.kind}: [{low}, {high}], points: 5}}"
            )
        parts = [i / (self.points - 1) for i in range(self.points)]
        if self.kind == "log":
            return [self.rounded(low * (high / low) ** part) for part in parts]
        return [self.rounded(low + (high - low) * part) for part in parts]

    def distribution(self) -> Any:
        """Return Optuna's distribution."""
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.values)
        low, high = self.values
        if self.kind == "int":
            return distributions.IntDistribution(low, high, step=self.step)
        return distributions.FloatDistribution(low, high, log=self.kind == "log")

    def rounded(self, value: Value) -> Value:
        """Return a drawn number with few digits, within the range; any other value as it is."""
        if self.kind not in ("float", "log"):
            return value
        low, high = self.values
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)

    def edge(self, value: Value) -> str:
        """Return ``lower`` or ``upper`` where a value lies at that edge of the space, beyond which nothing was tried.

        Of a choice the edges are its lowest and its highest number, if there are more than two. Below 0, and below
        the integer 1, there is nothing to try.
        """
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in (value, *self.values)):
            return ""
        low, high = min(self.values), max(self.values)
        if self.kind == "choice" and len(self.values) < 3:
            return ""
        if self.kind == "int":
            high -= (high - low) % self.step
        part = (value - low) / (high - low) if high > low else 0.5
        if self.kind == "log":
            part = math.log(value / low) / math.log(high / low)
        margin = EDGE if self.kind in ("float", "log") else 0.0
        if part >= 1 - margin:
            return "upper"
        natural = low == 0 or (low == 1 and isinstance(low, int))
        return "lower" if part <= margin and not natural else ""

    def to_dict(self) -> dict[str, Any]:
        """Return what :func:`parse_dimension` reads."""
        found: dict[str, Any] = {self.kind: list(self.values)}
        if self.step != 1:
            found["step"] = self.step
        return found if self.points is None else found | {"points": self.points}


def parse_space(space: Any) -> tuple[Dimension, ...]:
    """Read a space from a YAML file.

    Raises:
        ValueError: for what is no distribution, or an empty one.
    """
    if not isinstance(space, Mapping) or not space:
        raise ValueError(
            f"the space must name at least one parameter, such as optimizer.lr: {{log: [1e-4, 1e-2]}}; got {space!r}"
        )
    return tuple(parse_dimension(str(name), given) for name, given in space.items())


def parse_dimension(name: str, given: Any) -> Dimension:
    """Read one parameter.

    Raises:
        ValueError: for an unknown kind, no choices, an empty range, a logarithm of zero or less.
    """
    example = f"write {name}: {{choice: [...]}}, or int, float or log with [lowest, highest]"
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: {given!r} is no distribution: {example}")
    kinds = [key for key in given if key in KINDS]
    if len(kinds) != 1:
        unknown = [str(key) for key in given if key not in KINDS]
        hint = did_you_mean(unknown[0], KINDS) if unknown and not kinds else ""
        raise ValueError(f"{name}: one of {', '.join(KINDS)} is needed; got {dict(given)!r}{hint}; {example}")
    (kind,) = kinds
    for key in given:
        if key != kind and key not in EXTRA[kind]:
            allowed = ", ".join(EXTRA[kind]) or "nothing"
            raise ValueError(
                f"{name}: {kind} takes {allowed} beside its values; got {key!r}{did_you_mean(str(key), EXTRA[kind])}"
            )
    values = given[kind]
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name}: {kind} takes a list; got {values!r}; {example}")
    if kind == "choice":
        return Dimension(name, kind, _choices(name, values))
    low, high = _range(name, kind, values)
    return Dimension(
        name, kind, (low, high), _count(name, given, "step", 1) or 1, _count(name, given, "points", 2)
    )


def _choices(name: str, values: Sequence[Any]) -> tuple[Value, ...]:
    if not values:
        raise ValueError(f"{name}: choice has no values: there is nothing to draw from")
    # Optuna keeps plain values; a list is written as it stands on a command line
    found = tuple(json.dumps(v) if isinstance(v, list | tuple) else v for v in values)
    for value in found:
        if not isinstance(value, bool | int | float | str | None):
            raise ValueError(
                f"{name}: a choice must be a number, text, true, false, null or a list; got {value!r}"
            )
    if len(set(map(repr, found))) < len(found):
        raise ValueError(f"{name}: a choice stands twice in {list(found)}")
    return found


def _range(name: str, kind: str, values: Sequence[Any]) -> tuple[Any, Any]:
    number = int if kind == "int" else int | float
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, number) for v in values):
        what = "two integers" if kind == "int" else "two numbers"
        raise ValueError(f"{name}: {kind} takes {what}, [lowest, highest]; got {list(values)}")
    low, high = values if kind == "int" else (float(values[0]), float(values[1]))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: the ends of {kind} must be finite; got {list(values)}")
    if kind == "log" and low <= 0:
        raise ValueError(
            f"{name}: log of {low:g} does not exist: the lowest value must be above 0; write for example "
            f"{{log: [1e-6, {high:g}]}}, or {{float: [{low:g}, {high:g}]}}"
        )
    if low >= high:
        raise ValueError(
            f"{name}: the range {low:g} to {high:g} is empty: the lowest value must be below the highest"
        )
    return low, high


def _count(name: str, given: Mapping[str, Any], key: str, least: int) -> int | None:
    value = given.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name}: {key} must be an integer, {least} or more; got {value!r}")
    return value


def override(name: str, value: Value) -> str:
    """Return a parameter's value as an argument of ``reft-train``."""
    if isinstance(value, bool):
        return f"{name}={str(value).lower()}"
    return f"{name}={'null' if value is None else value}"


def grid(space: Sequence[Dimension], seed: int) -> list[dict[str, Value]]:
    """Return every combination once, shuffled by the seed: a part of a grid is spread over the whole."""
    combinations = list(itertools.product(*(dimension.grid() for dimension in space)))
    random.Random(seed).shuffle(combinations)
    names = [dimension.name for dimension in space]
    return [dict(zip(names, values, strict=True)) for values in combinations]


def trial_seed(seed: int, method: str, number: int) -> int:
    """Return the seed of one trial's draw, from the study's."""
    return int.from_bytes(hashlib.sha256(f"{seed} {method} {number}".encode()).digest()[:4], "big")


def draw(
    space: Sequence[Dimension],
    sampler: str,
    seed: int,
    method: str,
    number: int,
    history: Sequence[Any] = (),
    maximize: bool = True,
    startup: int = 10,
) -> dict[str, Value] | None:
    """Return the parameters of a trial: the same ones for the same arguments, in any process.

    Args:
        space: of the method.
        sampler: ``tpe``, ``random`` or ``grid``.
        seed: of the study.
        method: its name.
        number: of the trial, from 0.
        history: Optuna's trials before it (TPE); those that still run count as bad, so that parallel workers do
            not draw the same.
        maximize: whether a higher score is better.
        startup: trials that TPE draws at random first.

    Returns:
        the parameters, or None behind the end of a grid.
    """
    if sampler == "grid":
        combinations = grid(space, seed)
        return combinations[number] if number < len(combinations) else None
    optuna = quiet_optuna()
    own = trial_seed(seed, method, number)
    if sampler == "random":
        chosen: Any = optuna.samplers.RandomSampler(seed=own)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", optuna.exceptions.ExperimentalWarning
            )  # constant_liar, in Optuna 4
            chosen = optuna.samplers.TPESampler(seed=own, n_startup_trials=startup, constant_liar=True)
    # a study in memory: the draw leaves no trace, so that it can be repeated
    study = optuna.create_study(sampler=chosen, direction="maximize" if maximize else "minimize")
    if sampler == "tpe":
        study.add_trials(history)
    drawn = study.ask({dimension.name: dimension.distribution() for dimension in space}).params
    return {dimension.name: dimension.rounded(drawn[dimension.name]) for dimension in space}


def quiet_optuna() -> Any:
    """Return Optuna, which announces every study in memory otherwise.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError('reft-search needs Optuna: pip install "reft_lightning[search]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
