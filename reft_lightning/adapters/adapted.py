"""What an adapted model is, whatever adapts it: all that training, evaluation and runs use of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel


class ParameterCount(NamedTuple):
    """Trained parameters, parameters of the base model, and their ratio in percent."""

    trainable: int
    base: int
    percent: float

    @classmethod
    def of(cls, trainable: int, base: int) -> ParameterCount:
        """Return the count with its ratio."""
        return cls(trainable, base, 100 * trainable / base)


class AdapterConfig(Protocol):
    """What every adapter knows of itself."""

    method: str
    heads: list[str]
    base_model: str | None


@runtime_checkable
class AdaptedModel(Protocol):
    """A base model with an adapter, and its ``torch.nn.Module``: ReFT, each baseline, both together."""

    @property
    def base_model(self) -> PreTrainedModel:
        """The Hugging Face model, with whatever was put into it."""
        ...

    @property
    def config(self) -> AdapterConfig:
        """What was attached; ``config.base_model`` is the name that saved files give the base model."""
        ...

    def __call__(self, *args: Any, **batch: Any) -> Any:
        """Run :meth:`forward`."""
        ...

    def forward(self, *args: Any, **batch: Any) -> Any:
        """Return what the base model returns: ``loss``, ``logits``, ..."""
        ...

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """Return prompts and new tokens, as Hugging Face does."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """Run exactly the base model inside the block."""
        ...

    def detach(self) -> PreTrainedModel:
        """Take the adapter off and return exactly the base model; this model cannot be used any more."""
        ...

    def compile(self, **options: Any) -> None:
        """Compile the training step, where ``Method.compiles``."""
        ...

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off."""
        ...

    def eval(self) -> Self:
        """Switch dropout off."""
        ...

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every trained tensor."""
        ...

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`adapter_state_dict` returned.

        Raises:
            ValueError: if a tensor is missing, unexpected, or of another shape.
        """
        ...

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by role: ``rotation`` (R), ``weight``, ``bias`` and ``head``."""
        ...

    def parameter_count(self) -> ParameterCount:
        """Count the trained parameters against the base model's; heads are in neither."""
        ...

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write the adapter's files into a folder."""
        ...


@runtime_checkable
class Steerable(AdaptedModel, Protocol):
    """An adapted model whose passes may differ in what the edits do: ReFT, and ReFT together with a baseline."""

    def nulled(self) -> AbstractContextManager[None]:
        """Remove from hidden states, inside the block, what the edits would add."""
        ...

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[Any] | None = None,
        row_values: Mapping[str, Tensor] | None = None,
        source_ids: Tensor | None = None,
        source_mask: Tensor | None = None,
        **batch: Any,
    ) -> Any:
        """Return what the base model returns, with an adapter, a strength, values and another text for each row."""
        ...
