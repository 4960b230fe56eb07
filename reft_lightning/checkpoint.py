"""Saved adapters: ``reft_config.json`` + ``reft.safetensors`` + a model card ``README.md``, and no pickle.

The configuration holds a version and every argument; the tensors are all trained ones, heads included. Files are
written beside their place and moved into it, so that a crash leaves the old adapter or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from .positions import MaskFunction, parse_positions

FORMAT = 1
CONFIG_FILE, TENSOR_FILE, CARD_FILE = "reft_config.json", "reft.safetensors", "README.md"
BASELINE_CONFIG_FILE, BASELINE_FILE = "baseline_config.json", "baseline.safetensors"
PEFT_CONFIG_FILE, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"


class LayerSpec(NamedTuple):
    """What is attached at one layer."""

    method: str
    positions: str | MaskFunction
    tied: str
    component: str
    clip: str
    settings: dict[str, Any]


@dataclass
class ReftConfig:
    """Everything that :func:`reft_lightning.attach` was told."""

    method: str
    layers: list[int]
    positions: str | MaskFunction = "f7+l7"
    tied: str = "all"
    component: str = "block_output"
    settings: dict[str, Any] = field(default_factory=dict)
    per_layer: dict[int, dict[str, Any]] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    base_model: str | None = None
    clip: str = "paper"  # what files without it, from before it was a choice, mean

    def for_layer(self, layer: int) -> LayerSpec:
        """Return the common specification with what differs at this layer."""
        own = dict(self.per_layer.get(layer, {}))
        names = ("method", "positions", "tied", "component", "clip")
        common = {name: own.pop(name, getattr(self, name)) for name in names}
        return LayerSpec(**common, settings={**self.settings, **own})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; a position callable is named, not stored."""
        values = asdict(self)
        values["positions"] = str(parse_positions(self.positions))
        for layer, own in self.per_layer.items():
            if callable(own.get("positions")):
                raise ValueError(
                    f"layer {layer} has a position function of its own, and code is not stored: give one function for "
                    "all layers (it is passed again when loading), or a specification such as 'f7+l7'"
                )
        values["per_layer"] = {str(layer): own for layer, own in self.per_layer.items()}
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any], positions: MaskFunction | None = None) -> ReftConfig:
        """Rebuild a configuration.

        Raises:
            ValueError: for a newer format, an unknown key, or a position callable that is not given.
        """
        values = dict(values)
        version = values.pop("format", None)
        if version != FORMAT:
            raise ValueError(
                f"{CONFIG_FILE} has format {version!r}; this version reads {FORMAT}: update reft_lightning"
            )
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(
                f"{CONFIG_FILE} has unknown keys {unknown}; known: {sorted(cls.__dataclass_fields__)}"
            )
        if positions is not None:
            values["positions"] = positions
        elif str(values["positions"]).startswith("<callable"):
            raise ValueError(
                f"the adapter was trained with the position function {values['positions']}, and code is not stored: "
                "pass it, ReftModel.from_pretrained(model, name, positions=function)"
            )
        values["per_layer"] = {int(layer): own for layer, own in values.get("per_layer", {}).items()}
        return cls(**values)


def check_fit(own: dict[str, Tensor], state: dict[str, Tensor], what: str = "") -> None:
    """Refuse tensors that are not exactly those of an adapter.

    Raises:
        ValueError: if one is missing, unexpected, or of another shape.
    """
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{k}: {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
              for k in own.keys() & state.keys() if state[k].shape != own[k].shape]  # fmt: skip
    if missing or unexpected or shapes:
        raise ValueError(
            f"the adapter does not fit{what}: missing {missing}, unexpected {unexpected}, shapes {shapes}"
        )


def save_adapter(folder: str | os.PathLike, config: ReftConfig, state: dict[str, Tensor], count: Any) -> None:
    """Write the three files of an adapter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSOR_FILE, state)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    replace_file(
        folder / CARD_FILE, lambda path: path.write_text(model_card(config, count), encoding="utf-8")
    )


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors into a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    replace_file(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place and move it there."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def load_adapter(
    name: str | os.PathLike, positions: MaskFunction | None = None
) -> tuple[ReftConfig, dict[str, Tensor]]:
    """Read an adapter from a folder, or from the Hugging Face hub where no such folder exists.

    Raises:
        FileNotFoundError: if a file of the adapter is missing.
        ValueError: for a configuration that this version cannot read.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name))
    for file in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / file).is_file():
            there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
            raise FileNotFoundError(f"{folder} holds no adapter: {file} is missing; there is {there}")
    config = ReftConfig.from_dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")), positions)
    return config, load_file(folder / TENSOR_FILE)


def load_state(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Read the trained tensors of a saved adapter or baseline: what ``load_adapter_state_dict`` takes.

    Which one it is, its files say: ``reft_config.json``, peft's ``adapter_config.json`` or ``baseline_config.json``.

    Raises:
        FileNotFoundError: if the folder holds none, or not the tensors.
    """
    folder = Path(folder)
    for config, tensors in ((PEFT_CONFIG_FILE, PEFT_FILE), (BASELINE_CONFIG_FILE, BASELINE_FILE)):
        if (folder / config).is_file():
            if not (folder / tensors).is_file():
                raise FileNotFoundError(f"{folder} holds no adapter: {tensors} is missing beside {config}")
            return load_file(folder / tensors)
    return load_adapter(folder)[1]


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, TENSOR_FILE]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name!r} is no folder here, and no adapter of that name could be had from the hub ({error})"
        ) from error


def model_card(config: ReftConfig, count: Any) -> str:
    """Return the README of a saved adapter: what it is, and how to load it."""
    base = config.base_model or "the base model"
    header = ["---", "library_name: reft_lightning", "tags: [reft, representation-finetuning]"]
    if config.base_model and "/" in config.base_model and not os.path.isabs(config.base_model):
        header.append(f"base_model: {config.base_model}")
    settings = "\n".join(f"| {name} | `{value}` |" for name, value in config.to_dict().items())
    name = config.base_model or "..."
    kind = "AutoModelForSequenceClassification" if config.heads else "AutoModelForCausalLM"
    arguments = ", num_labels=..." if config.heads else ""
    beside = f", beside the heads {', '.join(config.heads)}" if config.heads else ""
    return (
        "\n".join(header)
        + f"""
---
# A ReFT adapter ({config.method}) for {base}

Representation Finetuning (ReFT, arXiv:2404.03592): {count.trainable:,} trained parameters{beside},
{count.percent:.4f} % of the frozen base model's {count.base:,}.

```python
import reft_lightning as rl
from transformers import {kind}

model = {kind}.from_pretrained("{name}"{arguments})
reft = rl.ReftModel.from_pretrained(model, "this folder or its name on the hub")
```

| setting | value |
|---|---|
{settings}
"""
    )
