"""Checks of a study before its first trial.

First, without torch: every value of every space composes with the rest. Then, without weights: the settings apply to
the method and the benchmark family, all trials are selected by the same score of the same model on the same rows,
and each trial uses up some of the budget. Last, the rows can be read; those of a test split are not opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ..config.compose import CompositionError, composing
from ..config.schema import Config
from .search_plan import Plan
from .space import override

if TYPE_CHECKING:
    from ..runs.checks import Monitor

# Must be the same in all trials: otherwise a search would select the easiest rows, or the best base model.
SAME = (
    *(f"model.{key}" for key in ("name", "source", "path", "package", "sha256", "revision", "config")),
    *(f"data.{key}" for key in (
        "family", "tasks", "train_tasks", "source", "path", "package", "sha256", "mixture", "split_seed",
        "validation_size", "limit_validation", "target", "answer", "context", "options", "answer_form", "messages",
        "source_prompt", "validation_path", "test_path", "delimiter", "skip_invalid", "image", "image_folder",
    )),
)  # fmt: skip


def compose_corners(plan: Plan) -> dict[str, list[Config]]:
    """Compose configurations that cover every choice and both ends of every range; return them by method."""
    found: dict[str, list[Config]] = {method: [] for method in plan.methods}
    with composing() as compose:
        for method in plan.methods:
            space = plan.space(method)
            for i in range(max(len(dimension.values) for dimension in space)):
                params = {d.name: d.values[min(i, len(d.values) - 1)] for d in space}
                try:
                    found[method].append(compose(plan.trial_overrides(method, params)))
                except CompositionError as error:
                    drawn = " ".join(override(name, value) for name, value in params.items())
                    raise ValueError(f"search {plan.name}, method {method}, {drawn}:\n{error}") from error
    return found


def check_corners(plan: Plan, corners: dict[str, list[Config]]) -> Monitor:
    """Check everything that needs no weights; return the score that decides."""
    from ..runs.arguments import attachment, data_module, family_of, optimization_of
    from ..runs.checks import check_unused, monitor_of

    _check_same(plan, corners)
    scores: dict[Monitor, str] = {}
    for method, config in ((name, config) for name, configs in corners.items() for config in configs):
        here = f"search {plan.name}, method {method}"
        try:
            family = family_of(config)
            scores.setdefault(monitor_of(config, family), method)
            check_unused(config, family)
            attached = attachment(config, family)
            optimization_of(config)
            data_module(config, family, None)  # reads nothing yet
        except (ValueError, OSError) as error:
            raise ValueError(f"{here}: {error}") from error
        if config.data.validation_size == 0:
            raise ValueError(f"{here}: data.validation_size=0 leaves no rows for selection")
        free = _trains_nothing(config, attached)
        if free and plan.budget.unit != "trials":
            raise ValueError(
                f"{here}: {free} trains nothing, so its trials would cost no {plan.budget.unit} and never use up "
                "the budget: leave it out, or set budget.unit=trials"
            )
        if plan.budget.unit == "steps" and config.trainer.max_steps > plan.budget.amount:
            raise ValueError(
                f"{here}: one trial of trainer.max_steps={config.trainer.max_steps} costs more than the budget of "
                f"{plan.budget.amount:g} steps"
            )
    if len(scores) > 1:
        listed = ", ".join(f"{method} by {monitor} ({mode})" for (monitor, mode), method in scores.items())
        raise ValueError(f"search {plan.name}: methods are selected by different scores: {listed}")
    (score,) = scores
    return score


def _trains_nothing(config: Config, attached: Mapping[str, Any]) -> str:
    """Return the setting that leaves nothing to train; empty if something is trained."""
    for setting in ("max_steps", "max_epochs"):
        if getattr(config.trainer, setting) == 0:
            return f"trainer.{setting}=0"
    if attached["method"] in ("frozen", "none") and not attached["heads"]:
        return f"intervention={attached['method']}"
    return ""


def _check_same(plan: Plan, corners: Mapping[str, list[Config]]) -> None:
    """Reject a study whose trials differ in a key of :data:`SAME`, within a method or between methods."""
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
                    f"search {plan.name}: {key} is {expected} and {value} ({who}): trials with different rows or base "
                    f"models cannot be compared; set it once, in base"
                )


def _value(config: Config, key: str) -> Any:
    if key == "data.split_seed" and config.data.split_seed is None:
        return config.seed  # which then splits the rows
    return attrgetter(key)(config)


def check_rows(plan: Plan, corners: Mapping[str, list[Config]]) -> None:
    """Read the training and validation rows, which all trials share; no test rows, no weights."""
    from ..runs.arguments import data_module, family_of

    method, (config, *_) = next(iter(corners.items()))
    try:
        data_module(config, family_of(config), None).check_train()
    except (ValueError, OSError) as error:
        raise ValueError(f"search {plan.name}, method {method}: {error}") from error
