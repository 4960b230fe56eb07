"""Load the base model that a saved adapter names, with the class it was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ...storage.hub_errors import network_fault, reason_of
from .config import ReftConfig

IN_PYTHON = "load it, and call from_pretrained(model, name)"


def load_base_of(
    config: ReftConfig, *, instead: str = IN_PYTHON, weights: bool = True, **loading: Any
) -> PreTrainedModel:
    """Load the base model of an adapter from the hub or a folder; ``instead`` is advice if it cannot be found.

    The class is looked up by name in transformers: a configuration cannot name other code. Without ``weights``, only
    the model's configuration is read, and the model is on the meta device.

    Raises:
        ValueError: if the adapter names no model, or a class that transformers does not have.
        FileNotFoundError: if the model cannot be loaded, with the reason.
    """
    trained = config.architecture
    kind = getattr(transformers, str(trained.get("class")), None)
    if config.base_model is None or not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(
            f"the adapter's base model {config.base_model!r} of class {trained.get('class')!r} cannot be loaded by "
            f"name: {IN_PYTHON}"
        )
    if trained.get("labels") is not None:
        loading = {"num_labels": trained["labels"], **loading}
    with naming_base(config.base_model, instead):
        if weights:
            return kind.from_pretrained(config.base_model, **loading)
        own: Any = kind.config_class  # in a checkpoint that also reads images, that of the text model
        with torch.device("meta"):
            return kind(own.from_pretrained(config.base_model, **loading))


@contextmanager
def naming_base(name: str, instead: str) -> Iterator[None]:
    """Make errors raised while a base model is loaded name it, and end with what to do ``instead``."""
    try:
        yield
    except Exception as error:
        if network_fault(error) is None and not isinstance(error, OSError | ValueError):
            raise
        raise FileNotFoundError(
            f"the adapter's base model {name!r} is not a folder, and could not be loaded from the hub "
            f"({reason_of(error)}); {instead}"
        ) from error
