"""Whether W&B has a key here; importing this file is cheap."""

from __future__ import annotations

import netrc
import os


def has_key() -> bool:
    """Whether W&B has a key here, in the environment or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].rstrip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
