"""The values a base model's trained parameters had before training, so that the base can be restored exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FirstValues:
    """Copies of some parameters by name, in CPU memory."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.values = {
            name: p.detach().to("cpu", copy=True) for name, p in parameters.items() if not p.is_meta
        }

    @contextmanager
    def restored(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Restore the parameters' first values inside the block.

        Values are swapped, not copied, so the backward of an earlier forward pass still works after the block.
        """
        trained = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.values[name].to(parameter.device, parameter.dtype)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters, by name."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
