"""What makes two runs the same run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What may differ without making another experiment of a run: its seed, where files lie, what is logged, and what
# the machine affords as long as a step sees the same rows.
FREE = re.compile(
    r"seed|name|resume|evaluate_base|option_likelihood|logger\..*|model\.path|data\.path|data\.test_path|"
    r"data\.eval_batch_size|data\.num_workers|trainer\.(accelerator|enable_progress_bar|log_every_n_steps)|"
    r"callbacks\.checkpoint_every_n_steps|decoding\.verify"
)
FILES = ("data.mixture", "model.tokenizer")  # compared by the name of the file alone


# What may differ between the parts of a run.
RESUME_FREE = (
    "name",
    "resume",
    "logger.",
    "trainer.enable_progress_bar",
    "trainer.accelerator",
    "data.num_workers",
    "kept.",
    "callbacks.checkpoint_every_n_steps",
)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value; an empty dictionary is no key."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a hash of what determines a result: the configuration without names, places, and what is kept."""
    kept = {k: v for k, v in config.items() if k not in ("name", "resume", "logger", "kept")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_same_run(now: dict[str, Any], earlier: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a run under another configuration: optimizer and schedule are the checkpoint's.

    Args:
        now: the configuration as a dictionary.
        earlier: that of the run.
        folder: of the run.

    Raises:
        ValueError: if a value differs that determines the result.
    """
    before = flat(earlier)
    differ = [
        f"{name}: {before.get(name)!r} then, {value!r} now"
        for name, value in flat(now).items()
        if before.get(name) != value and not name.startswith(RESUME_FREE)
    ]
    if differ:
        raise ValueError(
            f"resume={folder} continues that run: what determines its result must stay; {'; '.join(differ)}"
        )
