"""The budget of each method: its unit, its amount, and what a method's trials have spent.

=======  ==============================================================================================
unit     what is counted
=======  ==============================================================================================
trials   trials of any outcome: complete, pruned or failed
steps    optimizer steps
tokens   tokens trained on, without padding
seconds  wall time of ``fit``: training and the validations within it
=======  ==============================================================================================

Trials start while any budget is left. The batch that would exceed the budget is not trained: its trial ends as pruned
and cannot win, as its schedule was cut short. A trial whose process was killed runs again, and its first attempt is
not charged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNITS = ("trials", "steps", "tokens", "seconds")
TOLERANCE = 0.01  # fraction of the budget by which methods may differ and still count as equal


def counted(trials: Sequence[Any]) -> list[Any]:
    """Return the Optuna trials that count: started, and not replaced by another attempt."""
    # Optuna's retry callback records the earlier attempts of a trial there
    replaced = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    return [t for t in trials if t.state.name != "WAITING" and t.number not in replaced]


def spent(trials: Sequence[Any]) -> dict[str, float]:
    """Return the total cost of a method's Optuna trials by unit; running trials count with their last report."""
    found = counted(trials)
    costs = [trial.user_attrs.get("cost", {}) for trial in found]
    return {"trials": len(found), **{unit: sum(c.get(unit, 0) for c in costs) for unit in UNITS[1:]}}


def verdict(unit: str, amount: float, costs: Mapping[str, Mapping[str, float]]) -> str:
    """Return ``equal``, or which methods spent least and most; for trials, also whether they were equally long."""
    low, least, high, most = _ends(unit, costs)
    # trials are counted exactly
    allowed = 0 if unit == "trials" else TOLERANCE * amount
    found = "equal"
    if most - least > allowed:
        found = f"unequal: {low} has spent {least:g} {unit}, {high} {most:g}, of {amount:g}"
    lengths = trial_lengths(costs) if unit == "trials" else ""
    return "; ".join(filter(None, (found, lengths)))


def _ends(unit: str, costs: Mapping[str, Mapping[str, float]]) -> tuple[str, float, str, float]:
    """Return (method, cost) of the method that spent the least of a unit, then of the one that spent the most."""
    low, high = (pick(costs, key=lambda method: costs[method][unit]) for pick in (min, max))
    return low, costs[low][unit], high, costs[high][unit]


def trial_lengths(costs: Mapping[str, Mapping[str, float]]) -> str:
    """Return how methods with the same number of trials differ in steps and tokens; empty if they do not."""
    found = []
    for unit in ("steps", "tokens"):
        low, least, high, most = _ends(unit, costs)
        if most > (1 + TOLERANCE) * least:
            ratio = f", {most / least:.3g} times as many" if least else ""
            found.append(f"{low} {least:,.0f} {unit} and {high} {most:,.0f}{ratio}")
    return f"trials were not equally long: {'; '.join(found)}" if found else ""
