"""Whether W&B can be used on this machine, and has a key; importing this file is cheap."""

from __future__ import annotations

from pathlib import Path


def check_home() -> None:
    """Refuse a user without a home folder, as in some containers: W&B looks there for its settings."""
    try:
        Path.home()
    except RuntimeError as error:
        raise ValueError(
            "you have no home folder, which W&B needs: set HOME to a folder that you can write to"
        ) from error


def has_key() -> bool:
    """Whether W&B finds a key for its server in the environment, its settings, $NETRC or ~/.netrc.

    If a W&B run is open in this process, as in a notebook, its mode decides, as W&B does not look again.

    Raises:
        ValueError: for a malformed key, or a user without a home folder.
    """
    check_home()
    import wandb
    from wandb.errors import AuthenticationError

    if wandb.run is not None:
        return not (wandb.run.offline or wandb.run.disabled)
    try:
        return wandb.login(prompt=False, verify=False)
    except AuthenticationError as error:
        raise ValueError(
            f"the W&B key cannot be used: {error} Correct it, or set WANDB_MODE=offline"
        ) from error
