"""The plan of a study: the methods, their spaces, and one budget for all of them.

A file in ``conf/search`` (or any YAML file) has the keys of :class:`Plan`:

    base: [model=minilm, data=glue_stsb]     # overrides of reft-train that all methods share
    methods:
      loreft:
        overrides: [intervention=loreft]     # for this method
        space: {optimizer.lr: {log: [1e-4, 1e-2]}}   # see :mod:`.space`
    budget: {unit: trials, amount: 20}       # for each method; see :mod:`.budget`
    sampler: tpe                             # tpe | random | grid
    pruner: none                             # none | successive_halving
    seeds: [42, 43, 44]                      # the winner of each method is retrained and tested with each
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from ..config.compose import config_dir
from ..config.overrides import key_of
from ..suggest import check_choice, did_you_mean
from .budget import UNITS
from .space import Dimension, Value, override, parse_space

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "successive_halving")
# Keys that the search itself sets: a trial cannot build its test split, a winner reads it once.
RESERVED = ("sealed", "test", "resume")


@dataclass
class Budget:
    """What each method may spend."""

    unit: str = ""
    amount: Any = None


@dataclass
class Method:
    """One method: its overrides, and the space that is searched."""

    overrides: list[Any] = field(default_factory=list)
    space: Any = None


@dataclass
class Plan:
    """The contents of a search file; written to ``study.yaml`` in the study's folder."""

    name: str = ""
    base: list[Any] = field(default_factory=list)
    methods: dict[str, Method] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    sampler: str = "tpe"
    sampler_seed: int = 0
    startup_trials: int = 10  # random trials before TPE
    pruner: str = "none"
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44])

    def space(self, method: str) -> tuple[Dimension, ...]:
        """Return the parameters of a method."""
        return parse_space(self.methods[method].space)

    def trial_overrides(self, method: str, params: Mapping[str, Value]) -> list[str]:
        """Return the arguments of ``reft-train`` for one trial."""
        drawn = [override(name, value) for name, value in params.items()]
        return [*self.base, *self.methods[method].overrides, *drawn, "sealed=true"]

    def winner_overrides(self, method: str, params: Mapping[str, Value], seed: int) -> list[str]:
        """Return the arguments of ``reft-train`` for a winner's run, which reads the test split."""
        trial = [o for o in self.trial_overrides(method, params) if key_of(o) not in ("sealed", "seed")]
        return [*trial, f"seed={seed}", "test=true", "sealed=false"]

    def grid(self, method: str) -> dict[str, list[Value]]:
        """Return the grid values of each parameter of a method."""
        return {dimension.name: dimension.grid() for dimension in self.space(method)}

    def grid_size(self, method: str) -> int:
        """Return the number of combinations of a method's grid."""
        return math.prod(map(len, self.grid(method).values()))


@cache
def plan_keys() -> set[str]:
    """Return the arguments of the command that change the plan; all others are overrides of ``reft-train``."""
    own = {f.name for f in dataclasses.fields(Plan)} - {"name", "base", "budget"}
    return own | {f"budget.{f.name}" for f in dataclasses.fields(Budget)}


def search_file(name: str) -> Path:
    """Return the file with that name, in ``conf/search`` or the user's own."""
    folder = config_dir() / "search"
    for path in (folder / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    raise ValueError(
        f"search={name}: no such search{did_you_mean(name, known)}\n"
        f"search must be one of {', '.join(known)}, or your own YAML file"
    )


def read_plan(name: str, arguments: Sequence[str] = ()) -> Plan:
    """Read a search file, from ``conf/search`` or the user's own, and the arguments of the command.

    Arguments in :func:`plan_keys` change the plan, all others are overrides for all runs.
    """
    path = search_file(name)
    own = [text for text in arguments if key_of(text) in plan_keys()]
    try:
        # OmegaConf reads 1e-4 as a number and rejects duplicate keys; YAML does neither
        values = cast(DictConfig, OmegaConf.load(path))
        for text in own:
            if key_of(text) == "methods":
                values.methods = _select(values.methods, text, path)
            else:
                values = cast(DictConfig, OmegaConf.merge(values, _argument(text)))
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    overrides = [text for text in arguments if text not in own]
    return parse_plan(Path(name).stem if name.endswith(".yaml") else name, values, overrides, str(path))


def change_plan(plan: Plan, arguments: Sequence[str]) -> Plan:
    """Return a plan changed by arguments of the command."""
    where = " ".join(arguments)
    for text in arguments:
        if key_of(text) not in plan_keys():
            raise ValueError(f"{text}: the study has started, so its runs cannot change")
    values = OmegaConf.merge(dataclasses.asdict(plan), *map(_argument, arguments))
    return parse_plan(plan.name, values, where=where)


def _argument(text: str) -> DictConfig:
    """Parse an argument of the command like a search file: 1e6 is a number, and dots separate keys."""
    return OmegaConf.from_dotlist([f"seeds=[{text[6:].strip('[]')}]" if text.startswith("seeds=") else text])


def _select(methods: Any, text: str, path: Path) -> dict[str, Any]:
    names = [name.strip() for name in text.partition("=")[2].strip("[]").split(",")]
    for name in names:
        if name not in methods:
            raise ValueError(
                f"{text}: {path} has no method {name!r}{did_you_mean(name, methods)}; its methods are "
                f"{', '.join(methods)}"
            )
    return {name: methods[name] for name in names}


def parse_plan(name: str, values: Any, overrides: Sequence[str] = (), where: str = "the plan") -> Plan:
    """Check the values of a search file; an error names the value, what is allowed, and the closest name."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Plan), values, {"name": name})
        plan = cast(Plan, OmegaConf.to_container(merged, structured_config_mode=SCMode.INSTANTIATE))
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {_explain(error)}") from error
    _check_values(plan, where)
    _check_list(plan.base, f"{where}: base")
    typed = {key_of(text) for text in _check_list(list(overrides), "the arguments")}
    plan.base = [*(o for o in plan.base if key_of(o) not in typed), *overrides]
    for method in plan.methods:
        _check_method(plan, method, typed, f"{where}: method {method}")
    if plan.sampler == "grid" and plan.budget.unit == "trials":
        sizes = {method: plan.grid_size(method) for method in plan.methods}
        if min(sizes.values()) < plan.budget.amount:
            listed = ", ".join(f"{method} {size}" for method, size in sizes.items())
            raise ValueError(
                f"{where}: the grids have {listed} combinations, but the budget is {plan.budget.amount} trials each, "
                f"so methods would spend different budgets; set budget.amount to at most {min(sizes.values())}, or "
                "change the sampler"
            )
    return plan


def _explain(error: OmegaConfBaseException) -> str:
    """Return OmegaConf's error, with the known keys and the closest of them."""
    first, kind = str(error).splitlines()[0], error.object_type
    if error.key is None or "not in" not in first or not dataclasses.is_dataclass(kind):
        return f"{error.full_key}: {first}" if error.full_key else first
    known = [f.name for f in dataclasses.fields(kind)]
    found = f"unknown key {error.full_key!r}{did_you_mean(str(error.key), known)}; the keys are {', '.join(known)}"
    if kind is Method and any(f.name == error.key for f in dataclasses.fields(Plan)):
        found += f"; methods with different {error.key} cannot be compared: set it once, for all methods"
    return found


def _check_values(plan: Plan, where: str) -> None:
    budget = plan.budget
    check_choice(f"{where}: budget.unit", budget.unit, UNITS)
    check_choice(f"{where}: sampler", plan.sampler, SAMPLERS)
    check_choice(f"{where}: pruner", plan.pruner, PRUNERS)
    amount = budget.amount
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf:
        raise ValueError(f"{where}: budget.amount must be a number above 0; got {amount!r}")
    if amount == int(amount):
        budget.amount = int(amount)
    elif budget.unit == "trials":
        raise ValueError(
            f"{where}: budget.amount must be an integer, as budget.unit is trials; got {amount!r}"
        )
    for key, count in (("sampler_seed", plan.sampler_seed), ("startup_trials", plan.startup_trials)):
        if count < 0:
            raise ValueError(f"{where}: {key} must be at least 0; got {count}")
    if len(set(plan.seeds)) < len(plan.seeds):
        raise ValueError(f"{where}: seeds must be distinct, as each trains the winner once; got {plan.seeds}")
    if not plan.methods:
        raise ValueError(f"{where}: methods must name at least one method, with its overrides and its space")


def _check_list(given: list[Any], where: str) -> list[str]:
    if any(not isinstance(text, str) or "=" not in text for text in given):
        raise ValueError(f"{where} must be a list of key=value; got {given!r}")
    return given


def _check_method(plan: Plan, method: str, typed: set[str], here: str) -> None:
    if not re.fullmatch(r"[\w.-]+", method):
        raise ValueError(
            f"{here}: a name may contain only letters, digits, '.', '-' and '_', as it names a folder"
        )
    own = {key_of(o) for o in _check_list(plan.methods[method].overrides, f"{here}: overrides")}
    try:
        searched = {dimension.name for dimension in plan.space(method)}
        if plan.sampler == "grid":
            plan.grid(method)
    except ValueError as error:
        raise ValueError(f"{here}: {error}") from error
    for key in (*map(key_of, plan.base), *own, *searched):
        if key in RESERVED:
            raise ValueError(
                f"{here}: {key} cannot be set in a search: trials are sealed, and the winner's test split is read once"
            )
        if key.startswith("hydra"):
            raise ValueError(
                f"{here}: {key}: Hydra's settings have no effect, as a search starts its runs itself"
            )
    for key in searched & (own | typed):
        raise ValueError(f"{here}: {key} is both set and searched: leave one out")
    if "seed" in searched:
        raise ValueError(f"{here}: seed cannot be searched: a good seed says nothing about the next run")
