"""Attaching to a base model is all or nothing, and the model keeps a note of its adapters.

Adapters that leave the parameters and modules of a base model unchanged can share it: each edits only in its own calls.
An adapter that changes them (trained heads, the peft library, BitFit) needs the model to itself. The note is an
attribute of the model, so it is copied and pickled with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..base_models.dispatch import is_dispatched, keep_in_place, let_move
from ..base_models.quantization import keep_gradients
from .adapted import AdapterConfig

NOTE = "attached_by_reft_lightning"


@dataclass
class Attached:
    """The adapters that a base model has."""

    learned: set[str]  # the parameters that required gradients before the first adapter was attached
    configs: list[AdapterConfig]
    alone: bool  # whether the only adapter changes the base model, so no other can be attached


@contextmanager
def attaching(model: PreTrainedModel, config: AdapterConfig, alone: bool) -> Iterator[None]:
    """Freeze a base model and attach an adapter to it inside the block, or leave it exactly as it was.

    Raises:
        ValueError: if the model is not a Hugging Face model, or has an adapter that cannot share it.
    """
    check_base(model)
    note: Attached | None = vars(model).get(NOTE)
    if note is not None and (note.alone or alone):
        raise ValueError(
            f"this {type(model).__name__} already has {_named(note.configs)}, and {_named([config])} cannot share it: "
            f"the {'first' if note.alone else 'second'} changes parameters or modules of the base. Remove the first "
            "with its detach(), or attach to a newly loaded model"
        )
    with all_or_nothing(model):
        if note is None:
            learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            note = Attached(learned, [], alone)
        setattr(model, NOTE, replace(note, configs=[*note.configs, config]))
        model.requires_grad_(False)
        if is_dispatched(model):
            keep_in_place(model)
        keep_gradients(model)
        yield


@contextmanager
def together(model: PreTrainedModel) -> Iterator[None]:
    """Allow one more adapter inside the block, although the existing one changes the base model."""
    setattr(model, NOTE, replace(vars(model)[NOTE], alone=False))
    try:
        yield
    finally:
        setattr(model, NOTE, replace(vars(model)[NOTE], alone=True))


def detached(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Delete a removed adapter from the note; after the last one, restore which parameters require gradients."""
    note: Attached = vars(model)[NOTE]
    others = [other for other in note.configs if other is not config]
    if others:
        setattr(model, NOTE, replace(note, configs=others))
    else:
        delattr(model, NOTE)
        let_move(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in note.learned)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Restore a model exactly if the block raises: its modules, hooks, and which parameters require gradients."""
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [
        (
            vars(module),
            dict(vars(module)),
            [(d, dict(d)) for d in vars(module).values() if isinstance(d, dict)],
        )
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for attributes, values, tables in before:
            for table, entries in [(attributes, values), *tables]:
                table.clear()
                table.update(entries)
        for parameter, learned in learning:
            parameter.requires_grad_(learned)
        raise


def unseen_draws() -> AbstractContextManager[None]:
    """Restore the random number generators after the block, whose draws are overwritten at once."""
    device = torch.get_default_device()  # where parameters are created
    if device.type in ("cpu", "meta"):
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def check_base(model: Any) -> None:
    """Reject anything that is not a Hugging Face model."""
    if isinstance(model, PreTrainedModel):
        return
    inner = getattr(model, "base_model", None)
    hint = ""
    if isinstance(inner, PreTrainedModel):
        hint = "; it already has an adapter: detach() it, or give its base_model for a second adapter"
    elif isinstance(model, nn.Module) and hasattr(model, "get_base_model"):
        hint = "; give peft_model.get_base_model()"
    elif isinstance(model, str):
        hint = "; load it first: AutoModelForCausalLM.from_pretrained(name)"
    raise ValueError(f"attach takes a transformers model; got {shown(model)}{hint}")


def shown(model: Any) -> str:
    """Return the text by which an error message shows what was given as a model."""
    return repr(model) if isinstance(model, str | PathLike) else f"a {type(model).__name__}"


def _named(configs: list[AdapterConfig]) -> str:
    return ", ".join(
        config.method + (f" with trained heads {config.heads}" if config.heads else "") for config in configs
    )
