"""Reject intervention settings that do not apply to a baseline."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.methods import Method
from .overrides import key_of
from .schema import InterventionConfig


def check_settings_mean_something(
    method: Method, intervention: InterventionConfig, arguments: Sequence[str]
) -> None:
    """Reject settings that have no effect on a baseline; the advice depends on whether they are arguments."""
    if method.takes_settings or method.ignores_settings:
        return
    own = ("method", "heads", "options", "init_from", "beside", "beside_options")
    defaults = {name: value for name, value in vars(InterventionConfig()).items() if name not in own}
    unused = [name for name, default in defaults.items() if getattr(intervention, name) != default]
    if not unused:
        return
    typed = {key_of(text) for text in arguments}
    leave = [f"intervention.{name}" for name in unused if f"intervention.{name}" in typed]
    add = [f"intervention.{name}={defaults[name]}" for name in unused if f"intervention.{name}" not in typed]
    advice = [f"leave out {' '.join(leave)}"] if leave else []
    if add:
        advice.append(f"a YAML file, such as the experiment's, sets it: add {' '.join(add)}")
    where = ", whose own settings belong in intervention.options" if method.takes_options else ""
    given = " ".join(f"intervention.{name}={getattr(intervention, name)}" for name in unused)
    raise ValueError(f"{given} does not apply to {method.name}{where}: {'; '.join(advice)}")
