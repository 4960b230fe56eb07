"""Evaluate a run's adapter on rows other than the run's own."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from ..config import compose
from ..config.overrides import key_of
from ..config.schema import CheckpointConfig, Config, DataConfig
from .arguments import OWN, data_module, family_of, untrained
from .build import outline
from .kinds import kind_of

log = logging.getLogger(__name__)

# keys of `data` that determine the prompt format and the batch size
LAYOUT = ("template", "system_prompt", "max_length", "batch_size", "eval_batch_size")


def on_other_rows(config: Config, rows: Sequence[str], named: str = "") -> Config:
    """Return the configuration of a run with the rows of another family, in the run's format unless set otherwise.

    ``rows`` are arguments of ``reft-train`` in the groups ``data`` and ``decoding``; errors name the first, which is
    ``data=NAME``, or ``named``. Rows of another kind than the model's, or with other classes, are refused.
    """
    wanted = compose.compose(["model=tiny_random", *rows])
    typed, defaults, named = {key_of(text) for text in rows}, DataConfig(), named or rows[0]
    kept = {
        name: value
        for name in LAYOUT
        if (value := getattr(config.data, name)) != getattr(defaults, name) and f"data.{name}" not in typed
    }
    if kept:
        log.info("as in training: %s", " ".join(f"data.{name}={value}" for name, value in kept.items()))
    data = replace(wanted.data, **kept)
    other = replace(config, data=data, decoding=wanted.decoding, checkpoint=CheckpointConfig(), callbacks={})
    own, theirs = (family_of(untrained(each)) for each in (config, other))
    if kind_of(own) != kind_of(theirs):
        raise ValueError(
            f"{named}: a model for {own.name} ({own.kind}) cannot be evaluated on rows of kind {theirs.kind}"
        )
    known, asked = own.classes_of(config.data.tasks), theirs.classes_of(other.data.tasks)
    if known != asked:
        said = [", ".join(names) or "numbers" for names in (known, asked)]
        raise ValueError(f"{named}: the run's model predicts {said[0]}, but these rows have {said[1]}")
    return other


def whole_file(config: Config, split: str) -> Config:
    """Use all rows of a single file of the user's own as the split, since nothing is trained on them."""
    data = config.data
    named = data.validation_path or data.test_path
    if data.family not in OWN or data.source != "local" or named or not Path(str(data.path)).is_file():
        return config
    return replace(config, data=replace(data, **{f"{split}_path": data.path}))


def train_questions(config: Config) -> set[Hashable]:
    """Return the questions of a run's train rows; an empty set if the rows are no longer available."""
    try:
        run = outline(untrained(config))
        return data_module(config, run.family, run.processor).train_questions()
    except (ValueError, OSError) as error:
        log.warning(
            "cannot read the run's train rows, so rows that also occur in them are not counted: %s", error
        )
        return set()


def place_of_tests(data: DataConfig) -> str:
    """Return where the test rows come from."""
    return data.test_path or data.path or data.source
