"""Settings of interventions that mean nothing to a baseline."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.baselines.methods import IN_PLACE
from .schema import InterventionConfig


def check_no_intervention_settings(intervention: InterventionConfig, arguments: Sequence[str] = ()) -> None:
    """Refuse settings of interventions beside a baseline: they would change nothing.

    Args:
        intervention: of the configuration, with a baseline as its method.
        arguments: of the command line, which can be left out; other settings come from a file.

    Raises:
        ValueError: with what to leave out, and what to add where a file says otherwise.
    """
    defaults, method = vars(InterventionConfig()), intervention.method
    own = ("method", "heads", "options", "beside", "beside_options")
    unused = [name for name in defaults if name not in own and getattr(intervention, name) != defaults[name]]
    if not unused:
        return
    typed = {text.lstrip("+").partition("=")[0] for text in arguments}
    leave = [name for name in unused if f"intervention.{name}" in typed]
    add = [name for name in unused if name not in leave]
    where = "" if method in IN_PLACE else ", whose own settings stand in intervention.options"
    said = " ".join(f"intervention.{name}={getattr(intervention, name)}" for name in unused)
    advice = []
    if leave:
        advice.append(f"leave {' '.join(f'intervention.{name}' for name in leave)} out")
    if add:
        reset = " ".join(f"intervention.{name}={defaults[name]}" for name in add)
        advice.append(f"a file of settings, such as the experiment's, says so: add {reset}")
    raise ValueError(f"{said} means nothing to {method}{where}: {'; '.join(advice)}")
