"""A ReftModel as a transformers model: for Trainer, trl's trainers, pipelines and Accelerate.

They check whether a model is a ``PreTrainedModel``, and read its configuration, its embeddings and its class name.

Shapes: b rows, s columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..adapters.masks import spans_of
from ..adapters.reft.model import ReftModel
from ..adapters.saving import check_fit, write_tensors
from ..base_models.reading import continues_texts
from ..base_models.stacks import reads_two_texts


class Loaded(NamedTuple):
    """What ``load_state_dict`` returns; both fields are empty, as all tensors must match."""

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()


# Attributes that these libraries read from a model, if the base model has them.
OF_THE_BASE = ("loss_type", "generation_config", "hf_device_map")


def as_pretrained(reft: ReftModel) -> AsPretrained:
    """Return a ReftModel as a transformers model with the class name and the configuration of its base.

    It trains, evaluates and generates like ``reft``, whose parameters it shares. Only the adapter is saved, and
    :meth:`ReftModel.from_pretrained` loads it; checkpoints of Trainer and Accelerate contain no tensors of the base.
    """
    kind = type(reft.base_model)
    own = {
        "can_generate": kind.can_generate,
        "supports_gradient_checkpointing": kind.supports_gradient_checkpointing,
        "_no_split_modules": kind._no_split_modules,
    }
    return type(kind.__name__, (AsPretrained,), own)(reft)


class AsPretrained(PreTrainedModel):
    """A transformers model that computes the same as a ReftModel. Built by :func:`as_pretrained`.

    Args:
        reft: the model with interventions; shared, not copied.
    """

    def __init__(self, reft: ReftModel) -> None:
        base = reft.base_model
        super().__init__(PretrainedConfig())  # not the base's config, which this would modify
        self.config, self.name_or_path = base.config, base.name_or_path
        for name in OF_THE_BASE:
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values())
        self.accepts_loss_kwargs = getattr(base, "accepts_loss_kwargs", takes_any)
        self.reft, self.training = reft, reft.training
        self.register_forward_pre_hook(self._find_prompt, with_kwargs=True)

    # --- forward and generate ------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, s)
        labels: Tensor | None = None,  # (b, s) or (b,)
        prompt_mask: Tensor | None = None,  # (b, s) bool
        position_ids: Tensor | None = None,  # (b, s)
        token_type_ids: Tensor | None = None,  # (b, s)
        **kwargs: Any,
    ) -> Any:
        """Run :meth:`ReftModel.forward`. Trainer keeps only the dataset columns that are parameters here."""
        named = {"position_ids": position_ids, "token_type_ids": token_type_ids}
        kwargs |= {name: value for name, value in named.items() if value is not None}
        return self.reft(input_ids, attention_mask, labels, prompt_mask, **kwargs)

    def _find_prompt(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Find the prompt from the labels, before a trainer that replaces ``forward`` removes them (as trl's do)."""
        base = self.reft.base_model
        if reads_two_texts(base) or not continues_texts(base):  # the whole input is prompt
            return None
        attention, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if kwargs.get("prompt_mask") is not None:
            return None
        if labels is None and self.reft.training and self.get_output_embeddings() is not None:
            raise ValueError(
                "there are no labels to tell which tokens are prompt: pass prompt_mask (b, s), a column of the data "
                "set (Trainer removes the labels for label_smoothing_factor and compute_loss_func)"
            )
        if labels is None or labels.ndim < 2 or labels.is_floating_point():
            return None
        spans = spans_of(torch.ones_like(labels) if attention is None else attention, labels, None)
        choices, _ = self.reft.adapters.chosen_by(kwargs.get("adapter_names"), len(labels))
        self.reft.check_prompts(spans, labels, choices)
        return args, {**kwargs, "prompt_mask": spans.prompt}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`ReftModel.generate`; as another model's draft model, it is called with the text so far."""
        settings = kwargs.get("generation_config")
        if getattr(settings, "is_assistant", False):
            ids = kwargs["input_ids"]
            # settings are new in each generation
            prompt = vars(settings).setdefault("prompt_columns", ids.shape[1])
            kwargs["prompt_mask"] = (torch.arange(ids.shape[1], device=ids.device) < prompt).expand_as(ids)
            if kwargs.get("attention_mask") is None:  # transformers omits a mask of ones
                kwargs["attention_mask"] = torch.ones_like(ids)
        return self.reft.generate(*args, **kwargs)

    def _supports_logits_to_keep(self) -> bool:  # called on a draft model
        return False

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Refuse continuous batching."""
        raise ValueError(
            "continuous batching packs the tokens of several texts into one row, in which positions are undefined: use "
            "generate, with rows of equal length or padding, or reft-serve"
        )

    @property
    def base_model(self) -> Any:
        """The model without its output head, with edits; trl computes its own losses on it."""
        return self._headless

    def _headless(self, **inputs: Any) -> Any:
        base, found = self.reft.base_model, []
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            inputs["logits_to_keep"] = 1
        hook = base.base_model.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            self.reft(**inputs)
        finally:
            hook.remove()
        return found[-1]

    def __reduce__(self) -> tuple[Any, ...]:  # its class is created dynamically, and is not in any module
        return as_pretrained, (self.reft,)

    # --- parts of the base model ---------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """Return the base model's input embeddings."""
        return self.reft.base_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the base model's output embeddings."""
        return self.reft.base_model.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the base model's token embeddings, see transformers."""
        return self.reft.base_model.resize_token_embeddings(*args, **kwargs)

    # --- files ---------------------------------------------------------------------------------------------------

    def state_dict(
        self, *, destination: dict[str, Tensor] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Return the trained tensors, under their names in a saved adapter."""
        destination = {} if destination is None else destination
        destination |= {prefix + name: tensor for name, tensor in self.reft.adapter_state_dict().items()}
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Loaded:
        """Load tensors returned by :meth:`state_dict`.

        Raises:
            ValueError: if a tensor is missing, unexpected, or has another shape.
        """
        self.reft.load_adapter_state_dict(dict(state_dict))
        return Loaded()

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the adapter, and its tensors once more under the file name that Trainer looks for.

        Args:
            save_directory: the folder.
            is_main_process: whether this is the main process; others save nothing.
            state_dict: what :meth:`state_dict` returns; a sharded one is refused.
            **kwargs: how to split and name the weights of a whole model; ignored here.

        Raises:
            ValueError: if ``state_dict`` does not contain the adapter's tensors.
        """
        own = self.state_dict()
        if state_dict is not None:
            check_fit(own, state_dict)
        if is_main_process:
            self.reft.save_pretrained(save_directory)
            write_tensors(Path(save_directory) / SAFE_WEIGHTS_NAME, own)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Push the adapter, see :meth:`ReftModel.push_to_hub`."""
        self.reft.push_to_hub(repo_id, **kwargs)
