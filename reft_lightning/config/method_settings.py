"""Settings of interventions that mean nothing to a baseline."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.methods import Method
from .schema import InterventionConfig


def check_settings_mean_something(
    method: Method, intervention: InterventionConfig, arguments: Sequence[str]
) -> None:
    """Reject settings of interventions for a baseline: they would change nothing.

    Args:
        method: ``intervention.method``.
        intervention: of the configuration.
        arguments: of the command line, which can be left out; other settings come from a file.

    Raises:
        ValueError: with what to leave out, and what to add where a file sets it.
    """
    if method.takes_settings or method.ignores_settings:
        return
    defaults = vars(InterventionConfig())
    own = ("method", "heads", "options", "beside", "beside_options")
    unused = [name for name in defaults if name not in own and getattr(intervention, name) != defaults[name]]
    if not unused:
        return
    typed = {text.lstrip("+").partition("=")[0] for text in arguments}
    leave = [name for name in unused if f"intervention.{name}" in typed]
    add = [name for name in unused if name not in leave]
    where = ", whose own settings belong in intervention.options" if method.takes_options else ""
    given = " ".join(f"intervention.{name}={getattr(intervention, name)}" for name in unused)
    advice = []
    if leave:
        advice.append(f"leave {' '.join(f'intervention.{name}' for name in leave)} out")
    if add:
        reset = " ".join(f"intervention.{name}={defaults[name]}" for name in add)
        advice.append(f"a file of settings, such as the experiment's, sets it: add {reset}")
    raise ValueError(f"{given} means nothing to {method.name}{where}: {'; '.join(advice)}")
