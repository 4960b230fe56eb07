"""Saved adapters: ``reft_config.json``, ``reft.safetensors`` and a model card ``README.md``, without pickle.

The configuration holds a version and every argument; the tensors are all trained ones, including heads, under their
names in ``adapter_state_dict``. Each file is written completely or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..interventions import INTERVENTIONS
from ..storage.atomic import write_text, write_whole
from ..storage.reading import naming, read_json
from .adapted import ParameterCount
from .hub import check_holds, download
from .reft.config import CARD_FILE, CONFIG_FILE, TENSOR_FILE, ReftConfig
from .reft.positions import MaskFunction

log = logging.getLogger(__name__)

BASELINE_CONFIG_FILE, BASELINE_FILE = "baseline_config.json", "baseline.safetensors"
PEFT_CONFIG_FILE, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
BESIDE = "peft"  # the subfolder of a peft adapter trained with interventions, and the prefix of its tensors


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str = "") -> None:
    """Reject tensors that do not fit an adapter, and warn about tensors that were or will be rounded to 16 bits."""
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{k}: {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
              for k in own.keys() & state.keys() if state[k].shape != own[k].shape]  # fmt: skip
    if missing or unexpected or shapes:
        raise ValueError(
            f"the adapter does not fit{what}: missing {_some(missing) or 'nothing'}, unexpected "
            f"{_some(unexpected) or 'nothing'}, other shapes {_some(sorted(shapes)) or 'none'}"
        )
    real = [name for name, tensor in own.items() if tensor.is_floating_point()]
    if whole := [f"{name} ({_dtype(state[name])})" for name in real if not state[name].is_floating_point()]:
        raise ValueError(f"the adapter{what} has integer weights: {_some(whole)}; was it quantized?")
    if broken := [name for name in real if not state[name].isfinite().all()]:
        raise ValueError(
            f"the adapter{what} has NaN or infinite values in {_some(broken)}: its training diverged, or its file is "
            "damaged"
        )
    half = [
        f"{name} is {_dtype(state[name])}, used as {_dtype(own[name])}"
        for name in real
        if state[name].dtype != own[name].dtype
        and {state[name].itemsize, own[name].itemsize} & {1, 2}
        # heads are trained in the dtype of their base, and lose nothing in a wider one
        and not (name.startswith("heads.") and state[name].itemsize < own[name].itemsize)
    ]
    if half:
        log.warning("the adapter%s has lower precision than it was trained with: %s", what, _some(half))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save_adapter(
    folder: str | os.PathLike,
    config: ReftConfig,
    state: dict[str, Tensor],
    count: ParameterCount,
) -> None:
    """Write the three files of an adapter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSOR_FILE, state, digest=True)
    write_text(folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")
    write_text(folder / CARD_FILE, model_card(config, count))


def tensors_of(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the tensors of some modules by name; a shared tensor appears once, under its first name."""
    state: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for part, module in parts.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if names.setdefault(id(tensor), f"{part}.{name}") == f"{part}.{name}":
                state[f"{part}.{name}"] = tensor.detach()
    return state


def write_tensors(path: Path, state: Mapping[str, Tensor], digest: bool = False) -> None:
    """Write a safetensors file completely or not at all; tensors that share memory are written separately.

    Args:
        path: path of the file.
        state: name -> tensor.
        digest: whether the metadata hold a digest of the tensors, by which :func:`read_tensors` detects a damaged file,
            or else the entry that other libraries look for. There is only one entry, as their order is not defined.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    metadata = {"sha256": _digest(tensors)} if digest else {"format": "pt"}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: if the file is damaged, even by a single flipped bit; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
            written = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    if written is not None and written != _digest(state):  # other libraries write none
        raise ValueError(
            f"{path} is damaged: its tensors differ from those that were saved; download or train it again"
        )
    return state


def load_adapter(
    name: str | os.PathLike,
    positions: str | MaskFunction | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub: Any,  # token, cache_dir, local_files_only
) -> tuple[ReftConfig, dict[str, Tensor]]:
    """Read an adapter from a folder or the hub; takes the arguments of :meth:`ReftModel.from_pretrained`."""
    folder = _place(name, (CONFIG_FILE, TENSOR_FILE), revision, subfolder, **hub)
    values = read_json(folder / CONFIG_FILE)
    with naming(folder):
        config = ReftConfig.from_dict(values, positions)
    return config, read_tensors(folder / TENSOR_FILE)


def load_beside(
    name: str | os.PathLike, *, revision: str | None = None, subfolder: str | None = None, **hub: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the peft adapter trained together with interventions: its settings, and its tensors under their prefix.

    The arguments are those with which :func:`load_adapter` reads the interventions.
    """
    below = f"{subfolder}/{BESIDE}" if subfolder else BESIDE
    folder = _place(name, (PEFT_CONFIG_FILE, PEFT_FILE), revision, below, **hub)
    tensors = read_tensors(folder / PEFT_FILE)
    return read_json(folder / PEFT_CONFIG_FILE), {
        f"{BESIDE}.{key}": tensor for key, tensor in tensors.items()
    }


def _place(
    name: str | os.PathLike, files: tuple[str, ...], revision: str | None, subfolder: str | None, **hub: Any
) -> Path:
    """Return the folder that holds some files: a local one, or else the hub's cache."""
    folder = Path(name)
    if not folder.is_dir():
        folder = download(str(name), files, revision=revision, subfolder=subfolder, **hub)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is for the hub, but {folder} is a local folder")
    else:
        folder = folder / (subfolder or "")
    check_holds(folder, *files)
    return folder


def load_state(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Read the trained tensors of a saved adapter or baseline, for ``load_adapter_state_dict``.

    Its kind follows from its files: ``reft_config.json``, peft's ``adapter_config.json`` or ``baseline_config.json``.
    Interventions with a subfolder ``peft`` were trained together with the adapter in it, whose tensors get that prefix.

    Raises:
        FileNotFoundError: if the folder holds no adapter, or lacks its tensors.
    """
    folder = Path(folder)
    for config, tensors in ((PEFT_CONFIG_FILE, PEFT_FILE), (BASELINE_CONFIG_FILE, BASELINE_FILE)):
        if (folder / config).is_file():
            if not (folder / tensors).is_file():
                raise FileNotFoundError(
                    f"{folder} does not hold an adapter: it has {config}, but {tensors} is missing"
                )
            return read_tensors(folder / tensors)
    config, state = load_adapter(folder)
    if config.beside or (folder / BESIDE).is_dir():
        state |= load_beside(folder)[1]
    return state


def adapter_of(folder: Path) -> Path:
    """Return the adapter's folder: the one inside a run's folder, or the folder itself."""
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


def warn_of_half(folder: str | os.PathLike, subfolder: str | None) -> None:
    """Warn if the folder of interventions also holds a peft adapter that their configuration does not name."""
    file = Path(folder, subfolder or "", BESIDE, PEFT_CONFIG_FILE)
    if file.is_file():
        log.warning(
            "%s is not loaded, as %s does not name a peft method trained together with these interventions; if one was "
            '(earlier versions did not record it), add to that file: "beside": "peft/%s"',
            file.parent, CONFIG_FILE, str(read_json(file).get("peft_type")).lower(),
        )  # fmt: skip


def load_saved(model: Any, folder: str | os.PathLike, state: dict[str, Tensor]) -> None:
    """Load what :func:`load_state` read from a folder, and the scale that interventions were saved with."""
    model.load_adapter_state_dict(state)
    if (Path(folder) / CONFIG_FILE).is_file():
        model.scale = float(read_json(Path(folder) / CONFIG_FILE).get("scale", 1.0))


def model_card(config: ReftConfig, count: ParameterCount) -> str:
    """Return the README of a saved adapter, which says what it is and how to load it."""
    base = config.base_model or "the base model"
    header = ["---", "library_name: reft_lightning", "tags: [reft, representation-finetuning]"]
    if config.base_model and "/" in config.base_model and not os.path.isabs(config.base_model):
        header.append(f"base_model: {config.base_model}")
    settings = "\n".join(f"| {name} | `{value}` |" for name, value in config.to_dict().items())
    name = config.base_model or "..."
    kind, labels = config.architecture.get("class", "AutoModel"), config.architecture.get("labels")
    arguments = f", num_labels={labels}" if labels is not None else ""
    heads = f" in addition to the heads {', '.join(config.heads)}" if config.heads else ""
    if config.beside:
        heads = f" in addition to those of {config.beside} in the subfolder `{BESIDE}`"
    return (
        "\n".join(header)
        + f"""
---
# A ReFT adapter ({config.method}) for {base}

Representation Finetuning (ReFT, arXiv:2404.03592): {count.trainable:,} trained parameters{heads},
{count.percent:.4f} % of the frozen base model's {count.base:,}.
{_formula(config.method)}
```python
import reft_lightning as rl
from transformers import {kind}

model = {kind}.from_pretrained("{name}"{arguments})
reft = rl.ReftModel.from_pretrained(model, "this folder or its name on the hub").eval()
```

| setting | value |
|---|---|
{settings}
"""
    )


def _formula(method: str) -> str:
    """Return the formula for Phi(h) from the docstring of an intervention."""
    found = re.search(r"\\Phi\(h\) = [^`\n]+", getattr(INTERVENTIONS.get(method), "__doc__", None) or "")
    return f"\n$$ {found[0]} $$\n" if found else ""
