"""Saved adapters: ``reft_config.json`` + ``reft.safetensors`` + a model card ``README.md``, and no pickle.

The configuration holds a version and every argument; the tensors are all trained ones, heads included. Tensors that
differ in their layer and copy alone are stored as one, ``interventions.0-29.0.basis`` (30, r, d): their names would
else take 100 bytes each. Each file is written beside its place and moved into it, so that a crash leaves it old or new,
never half-written.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .reft.config import CARD_FILE, CONFIG_FILE, TENSOR_FILE, ReftConfig
from .reft.positions import MaskFunction

BASELINE_CONFIG_FILE, BASELINE_FILE = "baseline_config.json", "baseline.safetensors"
PEFT_CONFIG_FILE, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
BESIDE = "peft"  # the subfolder of a peft adapter trained beside interventions, and the prefix of its tensors


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
    write_tensors(folder / TENSOR_FILE, pack(state))
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    replace_file(
        folder / CARD_FILE, lambda path: path.write_text(model_card(config, count), encoding="utf-8")
    )


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the tensors of interventions that differ in their layer and copy alone.

    Their name then gives the numbers of all: ``interventions.0-3,7.0-1.basis``, layer by layer.
    """
    packed: dict[str, Tensor] = {}
    alike: dict[tuple, dict[str, list[str]]] = {}  # name behind the copy, dtype, shape -> layer -> copies
    for name, tensor in state.items():
        if match := _OF_ONE.fullmatch(name):
            layer, copy, rest = match.groups()
            alike.setdefault((rest, tensor.dtype, tensor.shape), {}).setdefault(layer, []).append(copy)
        else:
            packed[name] = tensor
    for (rest, *_), layers in alike.items():
        by_copies: dict[tuple[str, ...], list[str]] = {}
        for layer, copies in layers.items():
            by_copies.setdefault(tuple(copies), []).append(layer)
        for copies, members in by_copies.items():
            tensors = [state[f"interventions.{layer}.{copy}.{rest}"] for layer in members for copy in copies]
            name = f"interventions.{_join(members)}.{_join(copies)}.{rest}"
            packed[name] = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
    return packed


def unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what :func:`pack` was given; a tensor of one layer and copy stays as it is.

    Raises:
        ValueError: if a name stands for more or fewer tensors than are stored under it.
    """
    unpacked: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _OF_MANY.fullmatch(name)
        layers, copies = (_runs(match[1]), _runs(match[2])) if match else ([], [])
        count = sum(map(len, layers)) * sum(map(len, copies))
        if count < 2:
            unpacked[name] = tensor
        elif tensor.shape[:1] != (count,):
            raise ValueError(
                f"the adapter's tensor {name} must hold {count} along its first dimension; it has the shape "
                f"{tuple(tensor.shape)}"
            )
        else:
            numbers = itertools.product(itertools.chain(*layers), itertools.chain(*copies))
            for (layer, copy), one in zip(numbers, tensor.unbind(), strict=True):
                unpacked[f"interventions.{layer}.{copy}.{match[3]}"] = one
    return unpacked


_OF_ONE = re.compile(r"interventions\.(\d+)\.(\d+)\.(.+)")
_RUNS = r"(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)"
_OF_MANY = re.compile(rf"interventions\.{_RUNS}\.{_RUNS}\.(.+)")


def _join(numbers: Sequence[str]) -> str:  # 0, 1, 2, 7 -> "0-2,7"
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _runs(text: str) -> list[range]:  # "0-2,7" -> 0, 1, 2 and 7
    ends = [[int(end) for end in run.split("-")] for run in text.split(",")]
    return [range(run[0], run[-1] + 1) for run in ends]


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
    return config, unpack(load_file(folder / TENSOR_FILE))


def load_state(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Read the trained tensors of a saved adapter or baseline: what ``load_adapter_state_dict`` takes.

    Which one it is, its files say: ``reft_config.json``, peft's ``adapter_config.json`` or ``baseline_config.json``.
    Interventions with a subfolder ``peft`` were trained together with what lies there: its tensors get that prefix.

    Raises:
        FileNotFoundError: if the folder holds none, or not the tensors.
    """
    folder = Path(folder)
    for config, tensors in ((PEFT_CONFIG_FILE, PEFT_FILE), (BASELINE_CONFIG_FILE, BASELINE_FILE)):
        if (folder / config).is_file():
            if not (folder / tensors).is_file():
                raise FileNotFoundError(f"{folder} holds no adapter: {tensors} is missing beside {config}")
            return load_file(folder / tensors)
    state = load_adapter(folder)[1]
    if (folder / BESIDE).is_dir():
        if not (folder / BESIDE / PEFT_CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"{folder / BESIDE} holds no adapter of peft: {PEFT_CONFIG_FILE} is missing; interventions trained "
                "alone have no such folder"
            )
        state |= {f"{BESIDE}.{name}": tensor for name, tensor in load_state(folder / BESIDE).items()}
    return state


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
