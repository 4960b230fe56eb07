"""What an adapted model is, whatever adapts it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class ParameterCount(NamedTuple):
    """Trained parameters, parameters of the base model, and their ratio in percent."""

    trainable: int
    base: int
    percent: float


class AdaptedModel(Protocol):
    """What the module needs of a model."""

    def forward(self, **batch: Any) -> Any:
        """Return loss and logits."""
        ...

    def generate(self, **inputs: Any) -> Tensor:
        """Return prompts and new tokens."""
        ...

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every trained tensor."""
        ...

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load them; all must be there."""
        ...

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by role."""
        ...
