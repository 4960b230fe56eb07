"""Shared parts of reading other libraries' files, which run no code and never leave a model half changed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors
from transformers import PreTrainedModel

from ..adapters.attaching import all_or_nothing, unseen_draws
from ..adapters.reft.attach import attach
from ..adapters.reft.config import ReftConfig
from ..adapters.reft.model import ReftModel
from ..storage.reading import naming


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file written by ``torch.save``; nothing else is unpickled.

    Raises:
        ValueError: if it is damaged or holds anything other than tensors by name; the message names the file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run code and is not read"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must contain tensors by name; got a {type(state).__name__}")
    return state


def take(path: Path, state: Mapping[str, Tensor], shapes: Mapping[str, int], what: str) -> list[Tensor]:
    """Return tensors of a file and check their numbers of dimensions; `what` names their owner in messages.

    Raises:
        ValueError: if a tensor is missing or has the wrong shape; the message names the file.
    """
    for name, dimensions in shapes.items():
        if name not in state:
            raise ValueError(
                f"{path}: {what} needs {name}, which is missing; it has {', '.join(sorted(state)) or 'no tensors'}"
            )
        if state[name].ndim != dimensions:
            raise ValueError(
                f"{path}: {name} of {what} must have {dimensions} dimensions; got the shape {tuple(state[name].shape)}"
            )
    return [state[name] for name in shapes]


def orthogonal_map(original: Tensor, base: Tensor) -> Tensor:  # (d, r), (d, d) -> (d, r)
    """Return the matrix that ``torch.nn.utils.parametrizations.orthogonal`` computes from its saved tensors.

    Its parameter holds Householder vectors below the diagonal and signs on it, or, if square, a skew-symmetric matrix.
    """
    original, base = original.float(), base.float()
    lower = original.tril(-1)
    if original.shape[0] == original.shape[1]:
        return base @ torch.linalg.matrix_exp(lower - lower.mT)
    vectors = torch.linalg.householder_product(lower, 2 / (1 + lower.square().sum(0)))
    return base @ (vectors * original.diagonal().int())


def check_not_joint(config: ReftConfig, library: str) -> None:
    """Reject interventions that were trained together with a peft adapter, which another library cannot store."""
    if config.beside:
        raise ValueError(
            f"this adapter was trained together with {config.beside}, but a folder for {library} holds only "
            "interventions"
        )


def check_alone(reft: ReftModel, library: str) -> None:
    """Reject what another library cannot store: several adapters, an encoder-decoder, an adapter at another weight."""
    check_not_joint(reft.config, library)
    if len(reft.adapter_names) > 1:
        raise ValueError(
            f"this model has the adapters {', '.join(reft.adapter_names)}, but a folder for {library} holds only one: "
            "delete the others (delete_adapter), or attach the one to write to a model of its own"
        )
    if any(site.stack for site in reft.sites.values()):
        raise ValueError(
            f"{type(reft.base_model).__name__} has an encoder and a decoder, but a folder for {library} can number the "
            "layers of only one"
        )
    if [choice.weight for choice in reft.adapters.active] != [1.0]:
        raise ValueError(
            f"a folder for {library} holds an adapter at full weight: set_adapter({reft.adapter_names[0]!r}), and set "
            "its strength as its scale"
        )


def in_memory(reft: ReftModel) -> ReftModel:
    """Give trained tensors memory, to be filled from a file, if the base model is on the meta device."""
    for module in (reft.interventions, *map(reft.base_model.get_submodule, reft.config.heads)):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_meta:
                held = torch.empty_like(tensor, device="cpu")
                # in place, so that tied parameters stay tied
                swap_tensors(tensor, nn.Parameter(held) if isinstance(tensor, nn.Parameter) else held)
    return reft


def attached(
    base_model: PreTrainedModel,
    folder: Path,
    layers: Mapping[int, Mapping[str, Any]],
    state: dict[str, Tensor],
    **settings: Any,
) -> ReftModel:
    """Attach an adapter read from a folder, or leave the base model as it was.

    Settings shared by all layers become the adapter's; `settings` are further arguments of :func:`attach`.

    Raises:
        ValueError: if it does not fit the model; the message names the folder.
    """
    first = next(iter(layers.values()))
    shared = {
        key: value for key, value in first.items() if all(own.get(key) == value for own in layers.values())
    }
    own = {layer: {k: v for k, v in values.items() if k not in shared} for layer, values in layers.items()}
    listed = own if any(own.values()) else list(own)
    with naming(folder), all_or_nothing(base_model), unseen_draws():
        reft = attach(base_model, **{"method": first["method"], **shared}, layers=listed, **settings)
        in_memory(reft)
        reft.load_adapter_state_dict(state)
        return reft.eval()
