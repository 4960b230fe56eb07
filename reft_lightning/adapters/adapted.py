"""The interface of an adapted model, whatever adapts it: everything that training, evaluation and runs use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel


class ParameterCount(NamedTuple):
    """The numbers of trained parameters and of the base model's, and their ratio in percent."""

    trainable: int
    base: int
    percent: float

    @classmethod
    def of(cls, trainable: int, base: int) -> ParameterCount:
        """Return the count with its ratio."""
        return cls(trainable, base, 100 * trainable / base)


class AdapterConfig(Protocol):
    """The attributes that every adapter's configuration has."""

    method: str
    heads: list[str]
    base_model: str | None


@runtime_checkable
class AdaptedModel(Protocol):
    """A base model with an adapter, as a ``torch.nn.Module``: ReFT, a baseline, or both together.

    It is for types: from Python 3.12 on, ``isinstance`` does not see ``base_model``, which is a submodule.
    """

    @property
    def base_model(self) -> PreTrainedModel:
        """The Hugging Face model, with any modules that were inserted."""
        ...

    @property
    def config(self) -> AdapterConfig:
        """The adapter's configuration; ``config.base_model`` is the base model's name in saved files."""
        ...

    def __call__(self, *args: Any, **batch: Any) -> Any:
        """Run :meth:`forward`."""
        ...

    def forward(self, *args: Any, **batch: Any) -> Any:
        """Return the base model's output: ``loss``, ``logits``, ..."""
        ...

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """Return prompts with new tokens, as in Hugging Face."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """Run exactly the base model inside the block."""
        ...

    def detach(self) -> PreTrainedModel:
        """Remove the adapter and return exactly the base model; this model cannot be used afterwards."""
        ...

    def compile(self, **options: Any) -> None:
        """Compile the training step, if ``Method.compiles``."""
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
            ValueError: if a tensor is missing or unexpected, or has the wrong shape.
        """
        ...

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by role: ``rotation`` (R), ``weight``, ``bias`` and ``head``."""
        ...

    def parameter_count(self) -> ParameterCount:
        """Count the trained parameters and the base model's; neither includes heads."""
        ...

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write the adapter's files into a folder."""
        ...


@runtime_checkable
class Steerable(Protocol):
    """An :class:`AdaptedModel` whose edits can differ from pass to pass: ReFT, and ReFT together with a baseline.

    It declares only methods, so ``isinstance`` works on every version of Python.
    """

    def nulled(self) -> AbstractContextManager[None]:
        """Inside the block, remove from hidden states the components the edits would add."""
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
        """Return the base model's output, with an adapter, a strength, values and another text for each row."""
        ...
