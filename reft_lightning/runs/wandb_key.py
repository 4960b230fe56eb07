"""Whether W&B has a key here; importing this file is cheap."""

from __future__ import annotations


def has_key() -> bool:
    """Whether W&B finds a key for its server, wherever it looks: environment, its settings, $NETRC or ~/.netrc.

    Raises:
        ValueError: for a key that cannot be one.
    """
    import wandb
    from wandb.errors import AuthenticationError

    try:
        return wandb.login(prompt=False, verify=False)
    except AuthenticationError as error:
        raise ValueError(
            f"the key of W&B cannot be used: {error} Correct it, or set WANDB_MODE=offline"
        ) from error
