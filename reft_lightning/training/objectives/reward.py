r"""Reward models: one number r(x, y) for a prompt and an answer, from a classifier with one output.

Shapes: b pairs, which are 2 b rows of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Objective, penalty_of
from .preferences import margins_of, note_margins


class Reward(Objective):
    r"""The chosen answer of a pair should have the higher reward (Bradley-Terry model of comparisons).

    .. math:: L = -\log \sigma\big(r(x, y^+) - r(x, y^-)\big)

    The model is a classifier with one output, whose head is trained together with the edits. Positions refer to the
    whole text, prompt and answer, as in pyreft's example: ``l1`` is its last token, which the head reads.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1, with one pair of answers per prompt.
    """

    pairs, rewards = True, True

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss over the pairs; log how often, and by how much, the chosen answer is ahead."""
        output = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        margins = margins_of(rewards_of(output))
        note_margins(module, margins)
        return -F.logsigmoid(margins).mean() + penalty_of(module, output)


def rewards_of(output: Any) -> Tensor:  # -> (2 b,), float32 at least
    """Return the rewards in the output of a classifier."""
    logits: Tensor = output.logits.squeeze(-1)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
