r"""One pass of a frozen base model for the rows of several adapters that are trained independently.

.. math:: \nabla_{\theta_i} L_i = \nabla_{\theta_i} \sum_j L_j \qquad \text{as } L_j \text{ depends only on its own }
    \theta_j

Batches of similar length are stacked, and each row names its adapter. The graph is cut at the logits: each adapter
backpropagates its own loss to its own logits when it needs to, and one shared backward pass then goes through the base
model. Losses and gradients equal those of separate passes up to rounding.

Shapes: b rows of an adapter, s columns, t of them targets, n rows in all, v tokens of the vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from ..adapters.reft.model import ReftModel
from ..base_models.random_state import random_state, set_random_state
from .agreement import Difference, check_agreement
from .choose_part import needs_whole_batches, prefix_of
from .frozen_part import FrozenPrefix, suffix_lengths

log = logging.getLogger(__name__)

# largest ratio of the longest to the shortest batch of a pass, as padding costs time too
PADDED = 1.25
Batch = Mapping[str, Any]  # model inputs in the layout prompt | target, with labels for the last columns


class Trained(NamedTuple):
    """An adapter that trains."""

    model: ReftModel  # on the base model that all share
    rows: Any  # its encoded training rows, with their `lengths` and `prompt_lengths`


class Asked(NamedTuple):
    """A batch of an adapter."""

    inputs: Batch
    rows: list[int]  # row numbers
    boundary: int  # the column in which targets start
    random: dict[str, Tensor]  # the state of the adapter's random numbers, which a pass advances


class JoinedPass:
    """Forward and backward passes of several adapters on one causal base model.

    The first forward pass, and each one longer than all before it, is compared with the plain pass of every adapter.
    If logits or losses differ by more than rounding explains, or passes keep failing, joining stops with a warning.

    Args:
        adapters: name -> adapter.

    Attributes:
        works: whether passes are joined.
    """

    def __init__(self, adapters: Mapping[str, Trained]) -> None:
        self._adapters = adapters
        self._base = next(iter(adapters.values())).model.base_model
        self._model: ReftModel | None = None  # until the first pass
        self._prefix: FrozenPrefix | None = None
        self._first_rows: dict[str, int] = {}  # adapter -> number of its first row among all rows
        self._checked = 0  # columns of the longest pass that was compared
        self._failures = 0
        # logits of a pass (n, t + 1, v) with their graph, and those of its adapters (b, t + 1, v)
        self._passes: list[tuple[Tensor, list[Tensor]]] = []
        self.works = True
        if reason := next(filter(None, (_why_apart(one.model) for one in adapters.values())), ""):
            self._refuse(reason)

    def _join(self) -> ReftModel:
        model = ReftModel.joining({name: one.model for name, one in self._adapters.items()})
        prompts, suffixes, count = [], [], 0
        for name, (reft, rows) in self._adapters.items():
            own = torch.tensor(rows.prompt_lengths)
            self._first_rows[name] = count
            count += len(own)
            prompts.append(own)
            suffixes.append(suffix_lengths(reft, own, torch.tensor(rows.lengths) - own))
        self._prefix = prefix_of(model, torch.cat(prompts), torch.cat(suffixes))
        return model

    def forward(self, asked: Mapping[str, Asked]) -> dict[str, CausalLMOutput] | None:
        """Return the output of each adapter for its batch; None if each must run its own pass.

        A loss backpropagates only to its logits; :meth:`backward` does the rest.
        """
        self._passes = []
        if not self.works:
            return None
        try:
            outputs = self._forward(asked)
        except Difference as error:
            self._refuse(f"one pass for all runs {error}")
        except Exception as error:  # for example, one adapter diverged, and the others can continue
            self._failures += 1
            log.warning("a pass for %d adapters failed: %s: %s", len(asked), type(error).__name__, error)
            if self._failures > len(self._adapters):
                self._refuse("passes for all runs keep failing")
        else:
            return outputs
        self._passes = []
        return None

    def _forward(self, asked: Mapping[str, Asked]) -> dict[str, CausalLMOutput]:
        self._model = self._model or self._join()
        parts, outputs = self._parts(asked), {}
        longest = max(map(_columns, asked.values()))
        if longest > self._checked:
            self._check(parts)
            self._checked = longest
        with self._own_random_numbers(asked):
            for part in parts:
                logits = self._logits_of(part)
                self._passes.append((logits, _cut(part, logits)))
                outputs |= self._outputs(part, self._passes[-1][1])
        return outputs

    def _parts(self, asked: Mapping[str, Asked]) -> list[dict[str, Asked]]:
        """Group batches for shared passes: of similar length, and either all or none with a frozen prefix."""
        kinds = {name: (self._frozen({name: one}), _columns(one)) for name, one in asked.items()}
        parts: list[dict[str, Asked]] = []
        frozen, shortest = False, 0
        for name in sorted(asked, key=kinds.__getitem__):
            if not parts or kinds[name][0] != frozen or kinds[name][1] > PADDED * shortest:
                parts.append({})
                frozen, shortest = kinds[name]
            parts[-1][name] = asked[name]
        return parts

    def _frozen(self, asked: Mapping[str, Asked]) -> bool:
        boundary = max(one.boundary for one in asked.values())
        return self._prefix is not None and self._prefix.columns(self._rows(asked), boundary) > 0

    def _rows(self, asked: Mapping[str, Asked]) -> list[int]:
        return [self._first_rows[name] + row for name, one in asked.items() for row in one.rows]

    def _check(self, parts: list[dict[str, Asked]]) -> None:
        """Compare with the plain pass of each adapter, without dropout."""
        assert self._model is not None
        self._model.adapters.eval()
        try:
            for part in parts:
                with torch.no_grad():
                    outputs = self._outputs(part, _cut(part, self._logits_of(part)))
                for name, (inputs, *_) in part.items():
                    model = self._adapters[name].model
                    check_agreement(model, inputs, partial(model, **inputs), partial(outputs.get, name))
        finally:
            self._model.adapters.train()

    def _logits_of(self, asked: Mapping[str, Asked]) -> Tensor:  # (n, t + 1, v)
        assert self._model is not None
        inputs, boundary = self._joined(asked)
        if self._prefix is not None and self._frozen(asked):
            return self._prefix(inputs, self._rows(asked), boundary).logits
        return self._model(**inputs).logits

    def _outputs(self, asked: Mapping[str, Asked], logits: list[Tensor]) -> dict[str, CausalLMOutput]:
        loss, size = self._base.loss_function, self._base.config.get_text_config().vocab_size
        return {
            name: CausalLMOutput(
                loss=loss(logits=own, labels=one.inputs["labels"], vocab_size=size), logits=own
            )
            for (name, one), own in zip(asked.items(), logits, strict=True)
        }

    @contextmanager
    def _own_random_numbers(self, asked: Mapping[str, Asked]) -> Iterator[None]:
        """Let each adapter draw from its own random numbers, in the order of a separate pass."""
        device, others = self._base.device, []

        def before(state: dict[str, Tensor], *call: Any) -> None:
            others.append(random_state(device))
            set_random_state(state, device)

        def after(state: dict[str, Tensor], *call: Any) -> None:
            state.update(random_state(device))
            set_random_state(others.pop(), device)

        with ExitStack() as hooks:
            for name, one in asked.items():
                groups = self._adapters[name].model.interventions.values()
                for phi in (phi for group in groups for phi in group if _draws(phi)):
                    hooks.enter_context(phi.register_forward_pre_hook(partial(before, one.random)))
                    hooks.enter_context(phi.register_forward_hook(partial(after, one.random)))
            yield

    def _joined(self, asked: Mapping[str, Asked]) -> tuple[dict[str, Any], int]:
        """Return the inputs of all rows, and the column where their targets start."""
        boundary = max(one.boundary for one in asked.values())
        after = max(map(_targets, asked.values()))
        pad = getattr(self._base.config.get_text_config(), "pad_token_id", None) or 0

        def stacked(name: str, value: int) -> Tensor:  # -> (n, s)
            return torch.cat([
                F.pad(one.inputs[name], (boundary - one.boundary, after - _targets(one)), value=value)
                for one in asked.values()
            ])  # fmt: skip

        inputs = {
            "input_ids": stacked("input_ids", pad),
            "attention_mask": stacked("attention_mask", 0),
            "prompt_mask": stacked("prompt_mask", 0),
            "logits_to_keep": after + 1,
            "adapter_names": [name for name, one in asked.items() for _ in one.rows],
        }
        return inputs, boundary

    def backward(self) -> None:
        """Backpropagate the gradients of the logits, for adapters that have them, to the parameters."""
        passes, self._passes = self._passes, []
        for logits, cut in passes:
            gradient = torch.zeros_like(logits)
            for part, own in zip(gradient.split([len(own) for own in cut]), cut, strict=True):
                if own.grad is not None:
                    part[:, : own.shape[1]] = own.grad
            logits.backward(gradient)

    def _refuse(self, reason: str) -> None:
        self.works = False
        log.warning("%s: %s; falling back to separate passes for each run", type(self._base).__name__, reason)


def _why_apart(model: ReftModel) -> str:
    adapter = model.adapters.first
    if any(phi.penalty() is not None for phi in adapter.penalized):
        return f"{adapter.config.method} adds a penalty to the loss"
    return needs_whole_batches(model)


def _draws(phi: Any) -> bool:
    """Whether an intervention may draw random numbers, which a user's own class always may."""
    return phi.dropout > 0 or not type(phi).__module__.startswith("reft_lightning.")


def _columns(asked: Asked) -> int:
    return asked.inputs["input_ids"].shape[1]


def _targets(asked: Asked) -> int:
    return _columns(asked) - asked.boundary


def _cut(asked: Mapping[str, Asked], logits: Tensor) -> list[Tensor]:  # (n, t + 1, v) -> (b, t + 1, v) each
    rows = logits.split([len(one.rows) for one in asked.values()])
    return [
        own[:, : _targets(one) + 1].detach().requires_grad_()
        for own, one in zip(rows, asked.values(), strict=True)
    ]
