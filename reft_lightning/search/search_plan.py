"""What a study does: the methods, their spaces, and one budget for all of them.

A file of ``conf/search`` (or any YAML file) holds

    base: [model=minilm, data=glue_stsb]     # overrides of reft-train that all methods share
    methods:
      loreft:
        overrides: [intervention=loreft]     # of this method
        space: {optimizer.lr: {log: [1e-4, 1e-2]}}   # see :mod:`reft_lightning.search.command.space`
    budget: {unit: trials, amount: 20}       # of each method; see :mod:`reft_lightning.search.command.budget`
    sampler: tpe                             # tpe | random | grid
    pruner: none                             # none | successive_halving
    seeds: [42, 43, 44]                      # with which the winner of each method is trained again, and tested

``sampler_seed`` (0), ``startup_trials`` (10, those that TPE draws at random) and ``pruning`` (``min_validations: 1``,
``reduction_factor: 3``) may stand beside. Every argument of ``reft-search`` that is none of these is an override of
``reft-train`` for all runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config.compose import config_dir
from ..suggest import did_you_mean
from .space import SAMPLERS, Dimension, Value, override, parse_space

UNITS = ("trials", "steps", "tokens", "seconds", "flops")
PRUNERS = ("none", "successive_halving")
KEYS = (
    "base",
    "methods",
    "budget",
    "sampler",
    "sampler_seed",
    "startup_trials",
    "pruner",
    "pruning",
    "seeds",
)
PRUNING = {"min_validations": 1, "reduction_factor": 3}
# Arguments of the command that change the plan, beside the overrides of reft-train.
ARGUMENTS = (
    "budget.unit",
    "budget.amount",
    "sampler",
    "sampler_seed",
    "startup_trials",
    "pruner",
    "seeds",
    "methods",
)
# What a search decides itself: a trial's test split cannot be built, a winner's is read once.
RESERVED = ("sealed", "test", "resume")
METHOD = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Method:
    """One method of a study: its overrides, and the space that is searched."""

    name: str
    overrides: tuple[str, ...]
    space: tuple[Dimension, ...]


@dataclass(frozen=True)
class Plan:
    """What a study does; written to ``study.yaml`` in its folder."""

    name: str
    base: tuple[str, ...]
    methods: dict[str, Method]
    unit: str
    amount: float
    sampler: str = "tpe"
    sampler_seed: int = 0
    startup_trials: int = 10
    pruner: str = "none"
    pruning: dict[str, int] = field(default_factory=lambda: dict(PRUNING))
    seeds: tuple[int, ...] = (42, 43, 44)

    def trial_overrides(self, method: str, params: Mapping[str, Value]) -> list[str]:
        """Return the arguments of ``reft-train`` for one trial."""
        own = self.methods[method]
        drawn = [override(name, value) for name, value in params.items()]
        return [*self.base, *own.overrides, *drawn, "sealed=true"]

    def winner_overrides(self, method: str, params: Mapping[str, Value], seed: int) -> list[str]:
        """Return the arguments of ``reft-train`` for a winner's run, which reads the test split."""
        trial = [o for o in self.trial_overrides(method, params) if key_of(o) not in ("sealed", "seed")]
        return [*trial, f"seed={seed}", "test=true", "sealed=false"]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a search file holds it."""
        methods = {
            m.name: {"overrides": list(m.overrides), "space": {d.name: d.to_dict() for d in m.space}}
            for m in self.methods.values()
        }
        return {
            "base": list(self.base), "methods": methods, "budget": {"unit": self.unit, "amount": self.amount},
            "sampler": self.sampler, "sampler_seed": self.sampler_seed, "startup_trials": self.startup_trials,
            "pruner": self.pruner, "pruning": dict(self.pruning), "seeds": list(self.seeds),
        }  # fmt: skip


def key_of(text: str) -> str:
    """Return the key of an override."""
    return text.partition("=")[0].lstrip("+~")


def search_file(name: str) -> Path:
    """Return the file of ``conf/search``, or of one's own, that a name means.

    Raises:
        ValueError: if there is none.
    """
    folder = config_dir() / "search"
    for path in (folder / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    raise ValueError(
        f"search={name}: no such search{did_you_mean(name, known)}\n"
        f"search is one of {', '.join(known)}, or a YAML file of your own"
    )


def read_plan(name: str, arguments: Sequence[str] = ()) -> Plan:
    """Read a search file and the arguments of the command.

    Args:
        name: of ``conf/search``, or the path of a YAML file.
        arguments: ``key=value``; those of :data:`ARGUMENTS` change the plan, others are overrides for all runs.

    Raises:
        ValueError: for whatever cannot be a plan; the message names the file, the method and the parameter.
    """
    path = search_file(name)
    try:
        # OmegaConf reads 1e-4 as a number and refuses a key that stands twice; YAML alone does neither
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a search file has the keys {', '.join(KEYS)}")
    own = {key_of(text): text.partition("=")[2] for text in arguments if key_of(text) in ARGUMENTS}
    overrides = [text for text in arguments if key_of(text) not in ARGUMENTS]
    _apply(values, own, path)
    return parse_plan(Path(name).stem if name.endswith(".yaml") else name, values, overrides, str(path))


def read_argument(key: str, text: str) -> dict[str, Any]:
    """Read an argument of the command as search files are read: 1e6 is a number, and dots part keys."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={text}"]))


def _apply(values: dict[str, Any], own: Mapping[str, str], path: Path) -> None:
    """Write the command's own arguments over those of the file."""
    for key, text in own.items():
        given = read_argument(key, text)
        if key == "methods":
            values["methods"] = _selected(values.get("methods") or {}, text, path)
        elif key == "seeds":
            values["seeds"] = [
                int(s) if s.strip().isdecimal() else s for s in text.strip("[]").split(",") if s
            ]
        elif key.startswith("budget."):
            values["budget"] = {**(values.get("budget") or {}), **given["budget"]}
        else:
            values |= given


def _selected(methods: Mapping[str, Any], text: str, path: Path) -> dict[str, Any]:
    names = [name.strip() for name in text.strip("[]").split(",")]
    for name in names:
        if name not in methods:
            raise ValueError(
                f"methods={text}: {path} has no method {name!r}{did_you_mean(name, methods)}; it has "
                f"{', '.join(methods)}"
            )
    return {name: methods[name] for name in names}


def parse_plan(
    name: str, values: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "the plan"
) -> Plan:
    """Check the values of a search file.

    Raises:
        ValueError: naming the value, what is allowed, and the nearest name.
    """
    _check_keys(values, KEYS, where)
    budget = values.get("budget") or {}
    _check_keys(budget, ("unit", "amount"), f"{where}: budget")
    unit, amount = budget.get("unit"), budget.get("amount")
    _one_of(unit, UNITS, f"{where}: budget.unit")
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf:
        raise ValueError(f"{where}: budget.amount must be a number above 0; got {amount!r}")
    if unit == "trials" and amount != int(amount):
        raise ValueError(f"{where}: budget.amount counts trials; got {amount!r}")
    sampler, pruner = values.get("sampler", "tpe"), values.get("pruner", "none")
    _one_of(sampler, SAMPLERS, f"{where}: sampler")
    _one_of(pruner, PRUNERS, f"{where}: pruner")
    pruning = {**PRUNING, **(values.get("pruning") or {})}
    _check_keys(pruning, PRUNING, f"{where}: pruning")
    counts = {k: values.get(k, d) for k, d in (("sampler_seed", 0), ("startup_trials", 10))}
    for key, count, least in (
        *((k, v, 0) for k, v in counts.items()),
        ("pruning.min_validations", pruning["min_validations"], 1),
        ("pruning.reduction_factor", pruning["reduction_factor"], 2),
    ):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{where}: {key} must be an integer, {least} or more; got {count!r}")
    seeds = values.get("seeds", [42, 43, 44])
    if not isinstance(seeds, list) or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        raise ValueError(f"{where}: seeds must be a list of integers, such as [42, 43, 44]; got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: a seed stands twice in {seeds}: each one trains the winner once")
    base = _merged(_overrides(values.get("base") or [], f"{where}: base"), overrides)
    methods = values.get("methods")
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(f"{where}: methods must name at least one method, with its overrides and its space")
    plan = Plan(
        name, base, {}, unit, int(amount) if amount == int(amount) else amount, sampler, counts["sampler_seed"],
        counts["startup_trials"], pruner, pruning, tuple(seeds),
    )  # fmt: skip
    plan = replace(plan, methods={str(m): _method(str(m), given, where) for m, given in methods.items()})
    _check_overrides(plan, {key_of(o) for o in overrides}, where)
    _check_grid(plan, where)
    return plan


def _method(name: str, given: Any, where: str) -> Method:
    here = f"{where}: method {name}"
    if not METHOD.fullmatch(name):
        raise ValueError(f"{here}: a name is made of letters, digits, '.', '-' and '_': it names a folder")
    if not isinstance(given, Mapping):
        raise ValueError(f"{here}: overrides and space are needed; got {given!r}")
    for key in ("budget", "seeds", "sampler", "pruner", "pruning"):
        if key in given:
            raise ValueError(
                f"{here}: {key} of one method: methods with different {key} cannot be compared; write it once, for all"
            )
    _check_keys(given, ("overrides", "space"), here)
    try:
        space = parse_space(given.get("space"))
    except ValueError as error:
        raise ValueError(f"{here}: {error}") from error
    return Method(name, _overrides(given.get("overrides") or [], f"{here}: overrides"), space)


def _overrides(given: Any, where: str) -> tuple[str, ...]:
    if not isinstance(given, list) or any(not isinstance(o, str) or "=" not in o for o in given):
        raise ValueError(f"{where} must be a list of key=value; got {given!r}")
    return tuple(given)


def _merged(base: Sequence[str], overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the base with the command's overrides in the place of those of the same key."""
    for text in overrides:
        _overrides([text], "an argument")
    new = {key_of(text) for text in overrides}
    return (*(text for text in base if key_of(text) not in new), *overrides)


def _check_overrides(plan: Plan, typed: set[str], where: str) -> None:
    for method in plan.methods.values():
        here = f"{where}: method {method.name}"
        fixed = [key_of(o) for o in (*plan.base, *method.overrides)]
        searched = [d.name for d in method.space]
        for key in (*fixed, *searched):
            if key in RESERVED:
                raise ValueError(
                    f"{here}: {key} is not yours to set in a search: trials are sealed, and the winner's test split is "
                    "read once"
                )
            if key.startswith("hydra"):
                raise ValueError(f"{here}: {key}: a search starts its runs itself, without Hydra's settings")
        for key in searched:
            if key in (key_of(o) for o in method.overrides) or key in typed:
                raise ValueError(f"{here}: {key} is both set and searched: leave one out")
        if "seed" in searched:
            raise ValueError(f"{here}: a seed is not searched: the best one says nothing about the next")


def _check_grid(plan: Plan, where: str) -> None:
    """Refuse a grid that ends before the budget, for one method sooner than for another."""
    if plan.sampler != "grid":
        return
    sizes = {}
    for method in plan.methods.values():
        try:
            sizes[method.name] = math.prod(len(dimension.grid()) for dimension in method.space)
        except ValueError as error:
            raise ValueError(f"{where}: method {method.name}: {error}") from error
    if plan.unit == "trials" and min(sizes.values()) < plan.amount:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"{where}: the grids have {said} combinations, and the budget is {plan.amount} trials each: methods would "
            f"spend different budgets; budget.amount must be {min(sizes.values())} or less, or the sampler another"
        )


def _check_keys(values: Any, allowed: Any, where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must have the keys {', '.join(allowed)}; got {values!r}")
    for key in values:
        if key not in allowed:
            hint = did_you_mean(str(key), allowed)
            raise ValueError(f"{where}: unknown key {key!r}{hint}; known are {', '.join(allowed)}")


def _one_of(value: Any, allowed: Sequence[str], where: str) -> None:
    if value not in allowed:
        hint = did_you_mean(str(value), allowed)
        raise ValueError(f"{where} must be one of {', '.join(allowed)}; got {value!r}{hint}")
