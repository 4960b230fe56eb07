"""The budget: one unit, one amount, the same for every method; and what a trial has spent of it.

=======  ==============================================================================================
unit     what counts
=======  ==============================================================================================
trials   trials of any outcome: complete, pruned or failed
steps    optimizer steps
tokens   tokens that were trained on, padding left out
seconds  wall seconds of fit: training and the validations within; loading the model is left out, and so is
         what comes after fit
flops    nominal operations of training, see :func:`flops_per_token`
=======  ==============================================================================================

A trial starts if what is left covers it, where that is known in advance (a trial; steps, with
``trainer.max_steps``); the first one that is not covered ends the method. Where it is not known, trials start while
anything is left, and the batch that uses up the budget ends the trial: it counts as pruned, as its schedule was cut,
and cannot win. Pruned and failed trials cost what they spent. A trial that was running when the study was killed
runs again from its beginning, and its first attempt costs nothing. Trials that cost nothing would never use a budget
up: after :data:`FREE` of them in a row the method ends, until the command is started again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

COST_FILE = "cost.json"  # in a trial's folder; written while it trains
MEASURED = ("steps", "tokens", "seconds", "flops")
FREE = 3  # trials in a row that cost nothing, as those do that fail before their first batch
TOLERANCE = 0.01  # part of the budget by which methods may differ and still count as equal


def flops_per_token(model: nn.Module, roles: Mapping[str, list[nn.Parameter]]) -> float:
    r"""Return the nominal floating-point operations of one training token.

    .. math:: 2 (N + n) + 2 (N + n) [\text{something below the head is trained}] + 2 n

    for the forward pass, for the gradient that travels back through the model, and for the gradients of what is
    trained: N frozen and n trained parameters, each one product and one sum. Embeddings are looked up, so they do
    not count unless they are trained, or multiplied too, as those are that a model shares with its head. With
    everything trained this is the :math:`6 N` of the source. Attention's products of activations and what fast paths
    leave out are not in it: it says what a method asks for, not what a machine does.

    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.

    Args:
        model: an adapted model.
        roles: its trained parameters by role; those of ``head`` lie above everything else.
    """
    from torch import nn

    trained = {id(p) for parameters in roles.values() for p in parameters}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    others = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    multiplied = {id(p) for module in others for p in module.parameters(recurse=False)}
    looked_up = {id(table.weight) for table in tables} - multiplied
    parameters = {id(p): p for p in model.parameters()}
    n = sum(p.numel() for key, p in parameters.items() if key in trained)
    N = sum(p.numel() for key, p in parameters.items() if key not in trained and key not in looked_up)
    below = any(parameters for role, parameters in roles.items() if role != "head")
    if not n:
        return 0.0
    return 2.0 * (N + n) + (2.0 * (N + n) if below else 0.0) + 2.0 * n


def read_cost(folder: Path) -> dict[str, float]:
    """Return what a trial has spent so far; zeros where it has not begun to train."""
    path = folder / COST_FILE
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {unit: values.get(unit, 0) for unit in MEASURED}


def total_cost(folder: Path, but: str = "") -> dict[str, float]:
    """Return what the trials of a method have spent together, those that run included.

    Args:
        folder: of the method's trials.
        but: name of a trial to leave out.
    """
    total = dict.fromkeys(MEASURED, 0.0)
    for path in sorted(folder.glob(f"*/{COST_FILE}")):
        if path.parent.name != but:
            total = {unit: total[unit] + cost for unit, cost in read_cost(path.parent).items()}
    return total


def cost_in_advance(unit: str, config: Any) -> float | None:
    """Return what a trial of this configuration will spend, or None where only training can tell."""
    if unit == "trials":
        return 1
    return config.trainer.max_steps if unit == "steps" and config.trainer.max_steps > 0 else None


def unequal_in_advance(amount: float, costs: Mapping[str, float]) -> str:
    """Say why methods whose trials cost this much cannot spend the same; empty where they can."""
    whole = {name: math.floor(amount / cost) * cost for name, cost in costs.items()}
    if not whole or max(whole.values()) - min(whole.values()) <= TOLERANCE * amount:
        return ""
    said = ", ".join(f"{name} {whole[name]:g} in trials of {cost:g}" for name, cost in costs.items())
    return f"of {amount:g} steps the methods would spend {said}; give an amount that the trials of each fill"


def verdict(unit: str, amount: float, spent: Mapping[str, float]) -> str:
    """Say whether the methods have spent the same: ``equal``, or ``unequal:`` and by how much."""
    low, high = min(spent, key=spent.__getitem__), max(spent, key=spent.__getitem__)
    # trials are counted, so that one more is one too many
    allowed = 0 if unit == "trials" else TOLERANCE * amount
    if spent[high] - spent[low] <= allowed:
        return "equal"
    return f"unequal: {low} has spent {spent[low]:g} {unit}, {high} {spent[high]:g}, of {amount:g}"


def behind_trials(unit: str, spent: Mapping[str, Mapping[str, float]]) -> str:
    """Say by how much methods with the same number of trials differ in steps and tokens; empty where they do not.

    Args:
        unit: of the budget; where it is not trials, it is measured itself.
        spent: by method, in every unit.
    """
    said = []
    for other in ("steps", "tokens") if unit == "trials" else ():
        low = min(spent, key=lambda method: spent[method][other])
        high = max(spent, key=lambda method: spent[method][other])
        least, most = spent[low][other], spent[high][other]
        if most > (1 + TOLERANCE) * least:
            ratio = f", {most / least:.3g} times as many" if least else ""
            said.append(f"{low} {least:,.0f} {other} and {high} {most:,.0f}{ratio}")
    return f"trials were not equally long: {'; '.join(said)}" if said else ""
