"""What can be wrong with a study is said before its first trial.

First, without torch: every value of every space composes with the rest. Then, without weights: the settings mean
something to the method and to the benchmark family, all methods are selected by the same score, and their trials can
spend the same budget.
"""

from __future__ import annotations

from ..composition import CompositionError, compose
from ..schema import Config
from .budget import cost_in_advance, unequal_in_advance
from .plan import Plan
from .space import override


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
        ValueError: for a setting that means nothing or is out of its range, trials that select by different scores
            or by none, and trials that cannot spend the same budget.
    """
    from ..arguments import attachment, family_of, optimization_of
    from ..checks import check_unused, choose_monitor

    scores: dict[tuple[str, str], str] = {}
    costs: dict[str, set[float | None]] = {}
    for method, configs in corners.items():
        for config in configs:
            try:
                choose_monitor(config)
                family = family_of(config)
                check_unused(config, family)
                attachment(config, family)
                optimization_of(config)
            except (ValueError, OSError) as error:
                raise ValueError(f"search {plan.name}, method {method}: {error}") from error
            if config.data.validation_size == 0:
                raise ValueError(
                    f"search {plan.name}, method {method}: data.validation_size=0 leaves no rows to select by"
                )
            scores.setdefault((config.callbacks.monitor, config.callbacks.mode), method)
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
