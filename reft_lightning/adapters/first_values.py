"""What trained parameters of a base model were before training, so that the base can be had again exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FirstValues:
    """Copies of some parameters, in CPU memory.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.values = _copies({name: p for name, p in parameters.items() if not p.is_meta})

    @contextmanager
    def restored(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Give the parameters their first values inside the block."""
        trained = _copies(parameters)
        try:
            fill(parameters, self.values)
            yield
        finally:
            fill(parameters, trained)


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters, by name."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
