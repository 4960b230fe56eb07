"""Baselines as adapted models: their base class, and those that train the base model's own parameters.

BitFit (Ben Zaken et al. 2021, arXiv:2106.10199) trains every bias, full finetuning everything, and ``frozen`` nothing.
The methods of the peft library are in :mod:`reft_lightning.adapters.baselines.peft`.

Shapes: b rows, s columns.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...base_models.heads import parameters_of
from ...base_models.loading import number_of_parameters
from ...base_models.patching import replaced
from ...interventions.base import HALVES
from ...storage.atomic import write_text
from ..adapted import ParameterCount
from ..arguments import forward_inputs, known_arguments, left_padded_inputs
from ..attaching import attaching, check_base, detached
from ..first_values import FirstValues, fill
from ..methods import Method
from ..plain import plain
from ..saving import BASELINE_CONFIG_FILE, BASELINE_FILE, check_fit, write_tensors

log = logging.getLogger(__name__)
FORMAT = 1


@dataclass
class BaselineConfig:
    """The method, its options and heads, and the base model; saved with the tensors."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    base_model: str | None = None

    def __post_init__(self) -> None:
        for name in ("options", "heads", "base_model"):
            setattr(self, name, plain(name, getattr(self, name)))


class Baseline(nn.Module):
    """A base model trained by a method other than ReFT, with the same interface.

    The first values of base parameters that are trained in place are kept in CPU memory, so :meth:`disabled` is exactly
    the base.

    Args:
        config: method, options and heads.
        base_model: a frozen Hugging Face model.
        trained: names of the parameters to train in place.
    """

    base_model: Any

    def __init__(self, config: BaselineConfig, base_model: PreTrainedModel, trained: Iterable[str]) -> None:
        super().__init__()
        self.config = config
        parameters = dict(base_model.named_parameters())
        self._known = known_arguments(base_model)
        self._in_place = list(trained)
        for name in self._in_place:
            parameters[name].requires_grad_(True)
        self._first = FirstValues({name: parameters[name] for name in self._in_place})
        total = number_of_parameters(base_model)
        self._heads = _names_of(config.heads, base_model)
        self._base_parameters = total - sum(parameters[name].numel() for name in self._heads)
        self._enabled = True

    def forward(
        self,
        input_ids: Tensor | None = None,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, s)
        labels: Tensor | None = None,  # (b, s), only its last columns, or (b,)
        prompt_mask: Tensor | None = None,  # (b, s) bool, ignored; accepted for a common signature
        **kwargs: Any,
    ) -> Any:
        """Run the adapted model on rows padded on either side; labels for the last columns need ``logits_to_keep``."""
        inputs = forward_inputs(self.base_model, self._known, input_ids, attention_mask, labels, kwargs)
        return self.base_model(**inputs)

    def generate(
        self,
        input_ids: Tensor | None = None,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, s)
        prompt_mask: Tensor | None = None,  # (b, s) bool, ignored
        **kwargs: Any,
    ) -> Any:
        """Generate as Hugging Face does, after moving right-side padding to the left, except in an encoder's input."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        return self.base_model.generate(**left_padded_inputs(given, self.base_model))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run exactly the base model inside the block, with the head it had before training."""
        if not self._enabled:
            yield
            return
        with self._first.restored(self._trained_in_place()), replaced([(self, "_enabled", False)]):
            yield

    def detach(self) -> PreTrainedModel:
        """Restore the trained parameters' first values and return the base model; save the adapter first."""
        fill(self._trained_in_place(), self._first.values)
        detached(self.base_model, self.config)
        return self.base_model

    def _trained_in_place(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.base_model.named_parameters())
        return {name: parameters[name] for name in self._in_place}

    # --- parameters and files -------------------------------------------------------------------------------------

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every trained tensor, by its name in the base model."""
        return {name: parameter.detach() for name, parameter in self._trained_in_place().items()}

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`adapter_state_dict` returned, into the same parameters."""
        check_fit(self.adapter_state_dict(), state, f" {self.config.method}")
        self._load(state)

    def _load(self, state: dict[str, Tensor]) -> None:
        fill(self._trained_in_place(), state)

    def _is_head(self, name: str) -> bool:
        """Whether a trained parameter, by its name in this module, belongs to a head."""
        return name.removeprefix("base_model.") in self._heads

    def _is_vector(self, parameter: nn.Parameter) -> bool:
        return parameter.ndim < 2

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by role; vectors count as biases, without weight decay."""
        roles: dict[str, list[nn.Parameter]] = {"rotation": [], "weight": [], "bias": [], "head": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                role = "head" if self._is_head(name) else "bias" if self._is_vector(parameter) else "weight"
                roles[role].append(parameter)
        return roles

    def parameter_count(self) -> ParameterCount:
        """Count the trained parameters and the base model's; neither includes heads."""
        roles = self.parameter_roles()
        trainable = sum(p.numel() for role in ("weight", "bias") for p in roles[role])
        return ParameterCount.of(trainable, self._base_parameters)

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write ``baseline_config.json``, and the tensors of the base's parameters that were trained."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / BASELINE_FILE, self._trained_in_place(), digest=True)
        values = {"format": FORMAT, **asdict(self.config)}
        write_text(folder / BASELINE_CONFIG_FILE, json.dumps(values, indent=2) + "\n")


class InPlaceBaseline(Baseline):
    """BitFit, full finetuning, or the frozen model.

    Args:
        base_model: a Hugging Face model.
        method: a method that trains the base model's own parameters.
        heads: paths of modules to train in addition; counted separately.

    Raises:
        ValueError: if the model has no parameters to train (BitFit without biases), or heads are given with ``frozen``.
    """

    def __init__(self, base_model: PreTrainedModel, method: Method, heads: Sequence[str] = ()) -> None:
        assert method.in_place is not None
        check_base(base_model)
        config = BaselineConfig(
            method.name, heads=list(heads), base_model=base_model.config.name_or_path or None
        )
        of_heads = _names_of(heads, base_model)
        names = [name for name, _ in base_model.named_parameters()]
        chosen = [name for name in names if method.in_place(name) and name not in of_heads]
        if method.trains and not chosen:
            raise ValueError(
                f"{type(base_model).__name__} has no parameters that {method.name} trains: BitFit needs biases, which "
                "BERT, RoBERTa, GPT-2 and OPT have, but Llama and similar models do not; use intervention=peft/lora "
                "or another method"
            )
        if heads and not method.trains_heads:
            raise ValueError(
                f"method {method.name} trains nothing: use intervention=none to train only heads, or "
                "intervention.heads=[] to train nothing"
            )
        with attaching(base_model, config, alone=bool(chosen or heads)):
            super().__init__(config, base_model, [*chosen, *(n for n in names if n in of_heads)])
            self.base_model = base_model
        if chosen and not next(base_model.parameters()).is_meta and base_model.dtype in HALVES:
            log.warning(
                "%s trains %s weights: small updates are lost to rounding; use model.dtype=float32 to keep them",
                method.name, str(base_model.dtype).removeprefix("torch."),
            )  # fmt: skip


def _names_of(heads: Sequence[str], model: PreTrainedModel) -> set[str]:
    """Return the names of heads' parameters in ``named_parameters()``: a tied head has the embeddings' name."""
    found = {id(parameter) for parameter in parameters_of(model, heads).values()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}
