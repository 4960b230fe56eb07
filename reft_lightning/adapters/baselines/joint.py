"""Interventions and a method of the peft library, trained together on one base model.

peft inserts its adapter into the base model first. The interventions are attached to the result, so they edit, and are
trained on, the representations of the adapted model. LoReFT with LoRA: the weights W + (alpha/r) B A of a layer, then
h + R'(W h + b - R h) at the tokens that P selects.

Each part is complete on disk: a folder holds the files of the interventions, its subfolder ``peft`` those of peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...base_models.heads import heads_to_train
from ..adapted import ParameterCount
from ..attaching import together
from ..first_values import fill
from ..methods import check_beside, method_named
from ..reft.config import ReftConfig
from ..reft.model import ReftModel
from ..saving import BESIDE, check_fit
from .peft import PeftBaseline


class JointModel(ReftModel):
    """A ReftModel on a base model with a peft adapter, both of which are trained.

    ``scale``, ``nulled()``, ``unedited()`` and ``adapter_names`` apply to the interventions; :meth:`disabled` and
    :meth:`detach` apply to both. Heads are peft's ``modules_to_save``, which are trained copies: :meth:`disabled` is
    exactly the base.

    Args:
        peft: the base model with peft's adapter.
        config: configuration of the interventions, without heads.
    """

    def __init__(self, peft: PeftBaseline, config: ReftConfig) -> None:
        learning = [p for p in peft.parameters() if p.requires_grad]
        with together(peft.base_model):
            super().__init__(peft.base_model, replace(config, beside=peft.config.method))
        self.peft = peft
        for parameter in learning:  # attaching freezes every parameter
            parameter.requires_grad_(True)

    def load_adapter(self, name: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Refuse another saved adapter: it was trained without this model's peft adapter."""
        raise ValueError(
            f"{name} cannot be loaded next to interventions that were trained together with {self.config.beside}, "
            "which changes the base model for every adapter: load it onto a base model of its own with "
            "ReftModel.from_pretrained"
        )

    def detach(self) -> PreTrainedModel:
        """Remove both from the base model and return it."""
        super().detach()
        return self.peft.detach()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run exactly the base model inside the block, with the head it had before training."""
        with super().disabled(), self.peft.disabled():
            yield

    # --- parameters and files -------------------------------------------------------------------------------------

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every trained tensor; the names of peft's start with ``peft.``."""
        theirs = {f"{BESIDE}.{name}": tensor for name, tensor in self.peft.adapter_state_dict().items()}
        return super().adapter_state_dict() | theirs

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`adapter_state_dict` returned, into the same parameters."""
        check_fit(self.adapter_state_dict(), state, f" {self.config.method} + {self.peft.config.method}")
        prefix = f"{BESIDE}."
        theirs = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        fill(super().adapter_state_dict(), state)
        self.peft.load_adapter_state_dict(theirs)

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters of both parts by role: ``rotation`` (R), ``weight``, ``bias``, ``head``."""
        ours, theirs = super().parameter_roles(), self.peft.parameter_roles()
        return {role: [*ours[role], *theirs[role]] for role in ours}

    def parameter_count(self) -> ParameterCount:
        """Count the parameters trained by both parts and the base model's own; neither includes heads."""
        theirs = self.peft.parameter_count()
        ours = sum(p.numel() for p in self.adapters.parameters())
        return ParameterCount.of(ours + theirs.trainable, theirs.base)

    def save_pretrained(self, folder: str | PathLike, selected_adapters: Sequence[str] | None = None) -> None:
        """Write the files of the interventions to a folder, and peft's to its subfolder ``peft``.

        peft can load the subfolder, and :meth:`ReftModel.from_pretrained` loads both.
        """
        super().save_pretrained(folder, selected_adapters)
        if selected_adapters is None or self.adapter_names[0] in selected_adapters:
            self.peft.config.base_model = self.config.base_model
            self.peft.save_pretrained(Path(folder, BESIDE))


def join(base_model: PreTrainedModel, config: ReftConfig, settings: Mapping[str, Any]) -> JointModel:
    """Attach interventions and a peft adapter that were saved together, with initial values.

    ``settings`` are those of the peft method that the configuration names, as saved by peft.

    Raises:
        ValueError: if the method cannot be trained together with interventions, or does not take the settings.
    """
    check_beside(method_named(config.method), config.beside, {})
    method = method_named(config.beside)
    options = {name: settings[name] for name in method.options() if name in settings}
    heads = heads_to_train(base_model, settings.get("modules_to_save") or False)
    return JointModel(PeftBaseline(base_model, method, heads, options), config)
