"""What can be wrong with a study is said before its first trial.

First, without torch: every value of every space composes with the rest. Then, without weights: the settings mean
something to the method and to the benchmark family, all trials are selected by the same score of the same model on the
same rows, and methods can spend the same budget. Last, the rows are there; those of a test split are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from ..config.compose import CompositionError, compose
from ..config.schema import Config
from .budget import cost_in_advance, unequal_in_advance
from .search_plan import Plan
from .space import override

# What is compared must be the same in all trials: else a search would choose the easiest rows, or the best base model.
SAME = (
    *(f"model.{key}" for key in ("name", "source", "path", "package", "sha256", "revision", "config")),
    *(f"data.{key}" for key in (
        "family", "tasks", "train_tasks", "source", "path", "package", "sha256", "mixture", "split_seed",
        "validation_size", "limit_validation", "target", "answer", "context", "options", "messages", "test_path",
    )),
)  # fmt: skip


def compose_corners(plan: Plan) -> dict[str, list[Config]]:
    """Compose configurations that hold every choice and both ends of every range; return them by method.

    Raises:
        ValueError: for a parameter that does not exist, or a value that it cannot have.
    """
    found: dict[str, list[Config]] = {}
    for method in plan.methods.values():
        corners = [dimension.corners for dimension in method.space]
        found[method.name] = []
        for i in range(max(map(len, corners))):
            params = {d.name: c[min(i, len(c) - 1)] for d, c in zip(method.space, corners, strict=True)}
            try:
                found[method.name].append(compose(plan.trial_overrides(method.name, params)))
            except CompositionError as error:
                drawn = " ".join(override(name, value) for name, value in params.items())
                raise ValueError(f"search {plan.name}, method {method.name}, {drawn}:\n{error}") from error
    return found


def check_corners(plan: Plan, corners: dict[str, list[Config]]) -> tuple[str, str]:
    """Check what does not need weights; return the score that decides, and ``max`` or ``min``.

    Raises:
        ValueError: for a setting that means nothing or is out of its range, trials that select by different scores,
            by none or on different rows, trials that cost nothing of the budget, and trials that cannot spend the same.
    """
    from ..runs.arguments import attachment, data_module, family_of, optimization_of
    from ..runs.checks import Monitor, check_unused, monitor_of

    _check_same(plan, corners)
    scores: dict[Monitor, str] = {}
    costs: dict[str, set[float | None]] = {}
    for method, configs in corners.items():
        for config in configs:
            try:
                family = family_of(config)
                monitor = monitor_of(config, family)
                check_unused(config, family)
                attached = attachment(config, family)
                optimization_of(config)
                data_module(config, family, None)  # reads nothing yet
            except (ValueError, OSError) as error:
                raise ValueError(f"search {plan.name}, method {method}: {error}") from error
            if config.data.validation_size == 0:
                raise ValueError(
                    f"search {plan.name}, method {method}: data.validation_size=0 leaves no rows to select by"
                )
            free = _trains_nothing(config, attached)
            if free and plan.unit != "trials":
                raise ValueError(
                    f"search {plan.name}, method {method}: {free} trains nothing, so that its trials would cost no "
                    f"{plan.unit}, and never use the budget up: leave it out, or count trials (budget.unit=trials)"
                )
            scores.setdefault(monitor, method)
            costs.setdefault(method, set()).add(cost_in_advance(plan.unit, config))
    if len(scores) > 1:
        said = ", ".join(f"{method} by {monitor} ({mode})" for (monitor, mode), method in scores.items())
        raise ValueError(f"search {plan.name}: methods are selected by different scores: {said}")
    known = {method: c.pop() for method, c in costs.items() if len(c) == 1}
    if len(known) == len(costs) and None not in known.values():
        too_dear = [f"{m} {c:g}" for m, c in known.items() if c > plan.amount]
        if too_dear:
            raise ValueError(
                f"search {plan.name}: one trial costs more than the budget of {plan.amount:g} {plan.unit}: "
                f"{', '.join(too_dear)}"
            )
        unequal = unequal_in_advance(plan.amount, known)
        if unequal:
            raise ValueError(f"search {plan.name}: {unequal}")
    (score,) = scores
    return score


def _trains_nothing(config: Config, attached: Mapping[str, Any]) -> str:
    """Return the setting that leaves nothing to train; empty where something is trained."""
    for setting in ("max_steps", "max_epochs"):
        if getattr(config.trainer, setting) == 0:
            return f"trainer.{setting}=0"
    if attached["method"] in ("frozen", "none") and not attached["heads"]:
        return f"intervention={attached['method']}"
    return ""


def _check_same(plan: Plan, corners: Mapping[str, list[Config]]) -> None:
    """Refuse a study whose trials differ in what :data:`SAME` names, within a method or between two.

    Raises:
        ValueError: naming the setting, both values and both methods.
    """
    values = {
        (key, method): [_value(config, key) for config in configs]
        for key in SAME for method, configs in corners.items()
    }  # fmt: skip
    (first, *_) = corners
    for (key, method), found in values.items():
        for value in found:
            expected = values[key, first][0]
            if value != expected:
                who = f"method {method} searches it" if method == first else f"methods {first} and {method}"
                raise ValueError(
                    f"search {plan.name}: {key} is {expected} and {value} ({who}): trials that differ in their rows or "
                    f"in their base model cannot be compared; set it once, in base"
                )


def _value(config: Config, key: str) -> Any:
    if key == "data.split_seed" and config.data.split_seed is None:
        return config.seed  # it divides the rows then
    return attrgetter(key)(config)


def check_rows(plan: Plan, corners: Mapping[str, list[Config]]) -> None:
    """Read the rows that the trials will train on and be selected by; no test rows, and no weights.

    All trials read the same rows (:func:`check_corners`), so those of one are read.

    Raises:
        ValueError: for rows that are not there, cannot be read, or are too few to validate on.
    """
    from ..runs.arguments import data_module, family_of

    method, configs = next(iter(corners.items()))
    try:
        data_module(configs[0], family_of(configs[0]), None).check_train()
    except (ValueError, OSError) as error:
        raise ValueError(f"search {plan.name}, method {method}: {error}") from error
