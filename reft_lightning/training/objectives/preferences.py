r"""Pairwise objectives: of two answers to a prompt, the chosen one y+ should be likelier than the rejected one y-.

The reference :math:`\pi_0` is the frozen base: the model itself without its edits.

Shapes: b pairs, which are 2 b rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.encoding import IGNORED
from .base import Objective, inputs_of, log_probs, penalty_of, reference


class DPO(Objective):
    r"""Direct preference optimization.

    .. math:: L = -\log \sigma\Big(\beta \log \frac{\pi(y^+)}{\pi_0(y^+)} - \beta \log \frac{\pi(y^-)}{\pi_0(y^-)}\Big)

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.

    Args:
        beta: how strongly the model is kept close to the base; 0.1 to 0.5 in the paper.

    Raises:
        ValueError: if beta is not a positive number.
    """

    pairs = True

    def __init__(self, beta: float = 0.1) -> None:
        if not isinstance(beta, int | float) or not 0 < beta < math.inf:
            raise ValueError(f"objective.options.beta must be above 0; got {beta}")
        self.beta = beta

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss over the pairs; log how often, and by how much, the chosen answer is ahead."""
        inputs = inputs_of(batch)
        with reference(module.model):
            base = log_probs(module.model(**inputs).logits, inputs["labels"])
        output = module.model(**inputs)
        rewards = self.beta * (log_probs(output.logits, inputs["labels"]) - base)  # (2 b,)
        margins = margins_of(rewards)
        note_margins(module, margins)
        return -F.logsigmoid(margins).mean() + penalty_of(module, output)


class RePS(Objective):
    r"""Reference-free preference steering: edits of strength a should make y+ likely, and nulled edits y-.

    .. math:: L = -\log \sigma(w^+ a(y^+) - a(y^-)) - \log \sigma(w^- n(y^-) - n(y^+))

    where a(y) is the mean log-likelihood of an answer's tokens under edits with a strength drawn for each row, and n(y)
    the same under nulled edits. The weights come from the frozen base, whose log-likelihoods :math:`\ell(y)` are sums:
    :math:`w^+ = \max(\ell(y^-) - \ell(y^+), 1)` and :math:`w^- = \max(\ell(y^+) - \ell(y^-), 1)`.
    Source: Wu et al. 2025, arXiv:2505.20809; weights as in its code (``scaled_simpo``), which divides the sums of an
    answer by the number of tokens in prompt and answer.

    Args:
        strengths: the strengths to draw from; the defaults are those of the authors' code.

    Raises:
        ValueError: if there are no strengths, or one is not a finite number.
    """

    pairs, steers = True, True

    def __init__(self, strengths: Sequence[float] = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20)) -> None:
        numbers = isinstance(strengths, Sequence) and all(isinstance(a, int | float) for a in strengths)
        if not strengths or not numbers or not all(map(math.isfinite, strengths)):
            raise ValueError(f"objective.options.strengths must be a list of finite numbers; got {strengths}")
        self.strengths = tuple(map(float, strengths))

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss over the pairs."""
        inputs = inputs_of(batch)
        labels, model = inputs.pop("labels"), module.model
        counts = (labels[:, 1:] != IGNORED).sum(-1)
        drawn = torch.randint(len(self.strengths), (len(labels),)).tolist()
        with reference(model):
            base = margins_of(log_probs(model(**inputs).logits, labels))  # (b,)
        output = model(**inputs, adapter_names=[("default", self.strengths[i]) for i in drawn])
        steered = (log_probs(output.logits, labels) / counts).chunk(2)
        with model.nulled():
            nulled = (log_probs(model(**inputs).logits, labels) / counts).chunk(2)
        towards = (-base).clamp(min=1) * steered[0] - steered[1]
        away = base.clamp(min=1) * nulled[1] - nulled[0]
        note_margins(module, towards)
        return -F.logsigmoid(towards).mean() - F.logsigmoid(away).mean() + penalty_of(module, output)


def margins_of(scores: Tensor) -> Tensor:  # (2 b,) -> (b,)
    """Return by how much the chosen answers are ahead."""
    chosen, rejected = scores.chunk(2)
    return chosen - rejected


def note_margins(module: Any, margins: Tensor) -> None:
    """Log how often, and by how much, the chosen answer is ahead."""
    module.log("train/margin", margins.detach().mean())
    module.log("train/pair_accuracy", (margins > 0).float().mean())
