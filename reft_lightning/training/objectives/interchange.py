r"""Objectives with two prompts: what would the model answer with the source prompt's hidden states in a subspace?

Rows contain both prompts (``data.source_prompt``), and as the target the answer of a causal model whose variable has
the source's value. Interventions that take hidden states of other texts (``das`` and its variants) insert them.

Shapes: b rows, t target columns, n target tokens, v tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...adapters.adapted import AdaptedModel
from ...data.encoding import IGNORED
from .base import Objective, inputs_of, penalty_of, reference


class Interchange(Objective):
    r"""Distributed alignment search: the next-token loss of the counterfactual target.

    ``train/iia`` is the interchange intervention accuracy, the share of rows where each token of the target is the
    likeliest; on validation rows it is ``val/<task>/accuracy``, computed from generated texts. Interventions are
    annealed over the training steps. Source: Geiger et al. 2023, arXiv:2303.02536; boundless: Wu et al. 2023,
    arXiv:2305.08809.
    """

    def check(self, model: AdaptedModel, method: Any) -> None:
        """Reject methods that do not take hidden states of other texts."""
        super().check(model, method)
        if not method.takes_source:
            raise ValueError(
                f"the objective {type(self).__name__} inserts hidden states of a source prompt, and {method.name} "
                "does not take any: choose intervention=das, boundless_das or cdas"
            )

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of the target, which includes penalties of interventions."""
        inputs = inputs_of(batch)
        anneal(module)
        output = module.output_of(inputs, batch)
        penalty_of(module, output)
        goals = inputs["labels"][:, 1:]
        right = (output.logits[:, :-1].argmax(-1) == goals) | (goals == IGNORED)  # (b, t)
        module.log("train/iia", right.all(-1).float().mean())
        return output.loss


class CDAS(Interchange):
    r"""Concept DAS: the edited prompt should give the target the same probabilities as the source prompt does.

    .. math:: L = \frac{1}{n} \sum_t \text{JSD}\big(p_\Phi(\cdot \mid x, y_{<t}) \,\|\, p_0(\cdot \mid x', y_{<t})\big)

    where :math:`p_\Phi` is the model with its edits, :math:`p_0` the frozen base, x' the source prompt and y the target
    of the source. With rows in both directions (the source with the concept, and without it), the edit learns to steer
    both ways.
    Source: Bao et al. 2026, arXiv:2602.05234, and its code (``jensen_shannon_loss``).
    """

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return the mean divergence over the target's tokens, in nats."""
        inputs = inputs_of(batch)
        labels, keep = inputs.pop("labels"), inputs["logits_to_keep"]
        answered = labels[:, 1:] != IGNORED  # (b, t)
        targets = slice(batch["boundary"], None)
        ids, mask = batch["source_ids"], batch["source_mask"]
        source = {
            "input_ids": torch.cat([ids, inputs["input_ids"][:, targets]], 1),
            "attention_mask": torch.cat([mask, inputs["attention_mask"][:, targets]], 1),
        }
        with reference(module.model):
            goal = module.model(**source, logits_to_keep=keep).logits[:, :-1][answered]
        output = module.model(**inputs)
        return divergence(output.logits[:, :-1][answered], goal) + penalty_of(module, output)


def anneal(module: Any) -> None:
    """Set the progress of training in all parts of a model that are annealed."""
    done = min(module.global_step / module.total_steps, 1.0)
    for part in module.model.modules():
        if hasattr(part, "annealed"):
            part.annealed = done


def divergence(logits: Tensor, others: Tensor) -> Tensor:  # (n, v), (n, v) -> ()
    r"""Return the mean Jensen-Shannon divergence of two distributions, in nats: 0 to log 2."""
    p, q = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (logits, others))
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype))
    both = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2
    return both.mean()
