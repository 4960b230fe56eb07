"""Whether W&B has a key here; importing this file is cheap."""

from __future__ import annotations


def has_key() -> bool:
    """Whether W&B finds a key for its server, wherever it looks: environment, its settings, $NETRC or ~/.netrc.

    A run that is open in this process, as in a notebook, answers by its own mode: W&B does not look again.

    Raises:
        ValueError: for a key that cannot be one.
    """
    import wandb
    from wandb.errors import AuthenticationError

    if wandb.run is not None:
        return not (wandb.run.offline or wandb.run.disabled)
    try:
        return wandb.login(prompt=False, verify=False)
    except AuthenticationError as error:
        raise ValueError(
            f"the key of W&B cannot be used: {error} Correct it, or set WANDB_MODE=offline"
        ) from error
