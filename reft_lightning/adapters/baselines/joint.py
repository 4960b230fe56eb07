"""Interventions and a method of the peft library, trained together on one base model.

peft puts its adapter into the base model first, and the interventions are attached to the result, so that they edit,
and are trained on, the representations of the adapted model. LoReFT with LoRA: the weights W + (alpha/r)
B A of a layer, then h + R'(W h + b - R h) at the tokens that P selects.

On disk each part is whole: a folder holds the files of the interventions, its subfolder ``peft`` those of peft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapted import ParameterCount
from ..attaching import together
from ..reft.config import ReftConfig
from ..reft.model import ReftModel
from ..saving import BESIDE, check_fit, save_adapter
from .peft import PeftBaseline


class JointModel(nn.Module):
    """A frozen base model with an adapter of the peft library and interventions.

    Heads are peft's ``modules_to_save``: trained copies, so that :meth:`disabled` is exactly the base.

    Args:
        peft: the base model with peft's adapter in it.
        attach: attaches interventions to the base model that it is given, such as
            ``partial(attach, method="loreft", rank=4)``; without heads.
    """

    def __init__(self, peft: PeftBaseline, attach: Callable[[PreTrainedModel], ReftModel]) -> None:
        super().__init__()
        learning = [p for p in peft.parameters() if p.requires_grad]
        self.peft = peft
        with together(peft.base_model):
            self.reft = attach(peft.base_model)
        for parameter in learning:  # attaching freezes all that it finds
            parameter.requires_grad_(True)

    @property
    def base_model(self) -> PreTrainedModel:
        """The Hugging Face model, with peft's adapter in it."""
        return self.reft.base_model

    @property
    def config(self) -> ReftConfig:
        """What was attached of interventions; that of peft is ``model.peft.config``."""
        return self.reft.config

    def detach(self) -> PreTrainedModel:
        """Take both off the base model and return it."""
        self.reft.detach()
        return self.peft.detach()

    @property
    def scale(self) -> float:
        """Return the strength of the interventions' edits."""
        return self.reft.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.reft.scale = scale

    @property
    def penalty_weight(self) -> float:
        """Return the weight of what interventions add to the loss."""
        return self.reft.penalty_weight

    @penalty_weight.setter
    def penalty_weight(self, weight: float) -> None:
        self.reft.penalty_weight = weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted model, see :meth:`ReftModel.forward`."""
        return self.reft(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with both, see :meth:`ReftModel.generate`."""
        return self.reft.generate(*args, **kwargs)

    def compile(self, **options: Any) -> None:
        """Compile the training step, see :meth:`ReftModel.compile`."""
        self.reft.compile(**options)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run exactly the base model inside the block, its head as it was before training too."""
        with self.reft.disabled(), self.peft.disabled():
            yield

    def nulled(self) -> AbstractContextManager[None]:
        """Null the interventions' edits, see :meth:`ReftModel.nulled`."""
        return self.reft.nulled()

    # --- parameters and files -------------------------------------------------------------------------------------

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every trained tensor: the interventions', and peft's under ``peft.``."""
        beside = {f"{BESIDE}.{name}": tensor for name, tensor in self.peft.adapter_state_dict().items()}
        return self.reft.adapter_state_dict() | beside

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`adapter_state_dict` returned, into the same parameters."""
        check_fit(self.adapter_state_dict(), state, f" {self.config.method} + {self.peft.config.method}")
        prefix = f"{BESIDE}."
        self.reft.load_adapter_state_dict({k: v for k, v in state.items() if not k.startswith(prefix)})
        self.peft.load_adapter_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters of both parts by role: ``rotation`` (R), ``weight``, ``bias``, ``head``."""
        ours, theirs = self.reft.parameter_roles(), self.peft.parameter_roles()
        return {role: [*ours[role], *theirs[role]] for role in ours}

    def parameter_count(self) -> ParameterCount:
        """Count what both parts train against the bare base model; heads are in neither."""
        beside = self.peft.parameter_count()
        return ParameterCount.of(self._interventions().trainable + beside.trainable, beside.base)

    def _interventions(self) -> ParameterCount:
        trainable = sum(p.numel() for p in self.reft.interventions.parameters())
        return ParameterCount.of(trainable, self.peft.parameter_count().base)

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write the files of the interventions into a folder, and peft's own into its subfolder ``peft``.

        peft reads its subfolder, and :meth:`ReftModel.from_pretrained` the folder; the card says how to load both.
        """
        folder = Path(folder)
        self.peft.config.base_model = self.config.base_model
        self.peft.save_pretrained(folder / BESIDE)
        save_adapter(
            folder,
            self.reft.saved_config(),
            self.reft.adapter_state_dict(),
            self._interventions(),
            self._card(),
        )

    def _card(self) -> str:
        beside = self.peft.parameter_count()
        return f"""
## Trained together with {self.peft.config.method}

The subfolder `{BESIDE}` holds an adapter of the peft library with {beside.trainable:,} more parameters. It belongs
to this one, and is put into the base model first:

```python
from peft import PeftModel

adapted = PeftModel.from_pretrained(model, "this folder/{BESIDE}").get_base_model()
reft = rl.ReftModel.from_pretrained(adapted, "this folder")
```
"""
