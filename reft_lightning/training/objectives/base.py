r"""Objectives: the loss of a batch, computed with as many passes of the model as it needs.

A pass can run an adapted model in these ways:

===================================  ===============================================================================
``model(...)``                       with its edits
``with reference(model):``           as the frozen base: a reference model that costs no memory
``with model.nulled():``             with each edit replaced by removing what it would add (:class:`Steerable`)
``adapter_names=[("default", a)]``   with other strengths a, or another adapter, for each row (:class:`Steerable`)
``row_values={"concept": ids}``      with values for each row, for edits that need them (:class:`Steerable`)
``source_ids=...``                   with source texts whose hidden states the edits use (:class:`Steerable`)
===================================  ===============================================================================

To define your own, write a subclass and give its import path (``objective._target_=mine.Mine``):

    class Distil(Objective):
        def loss(self, module, batch):
            inputs = inputs_of(batch)
            answered = inputs["labels"][:, 1:] != IGNORED  # (b, t), no padding
            with reference(module.model):
                goal = module.model(**inputs).logits[:, :-1][answered].softmax(-1)
            return F.cross_entropy(module.model(**inputs).logits[:, :-1][answered], goal)

Shapes: b rows, s columns of prompt | target, t target columns, v tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...adapters.adapted import AdaptedModel, Steerable
from ...data.encoding import target_only
from ...evaluation import summed_log_p

NOT_INPUTS = ("boundary", "examples", "rows")


class Objective:
    """The base of all objectives; a subclass defines :meth:`loss`, and its constructor's arguments are its options."""

    pairs: ClassVar[bool] = False
    """Whether a batch contains each prompt twice: b rows with the target, then b rows with the rejected answer."""
    steers: ClassVar[bool] = False
    """Whether it needs edits of several strengths, and a model that is :class:`Steerable`."""
    rewards: ClassVar[bool] = False
    """Whether the model is a classifier with one output, a reward for each text, instead of a language model."""
    closed_form: ClassVar[bool] = False
    """Whether one step of SGD with lr 1 over all rows reaches its minimum, and no other step does."""

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch, a scalar with a gradient.

        Args:
            module: the LightningModule; ``module.model`` is the adapted model, ``module.log`` logs additional values.
            batch: a batch of :class:`~reft_lightning.data.encoding.Collator`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(module, batch)")

    def check(self, model: AdaptedModel, method: Any) -> None:
        """Reject a model that cannot be trained by this objective, before weights are loaded.

        Args:
            model: the model without weights.
            method: a description of its method, see :class:`~reft_lightning.adapters.methods.Method`.

        Raises:
            ValueError: if it cannot be trained; gives the reason.
        """
        if not self.steers:
            return
        if model.config.heads:
            raise ValueError(
                f"the objective {type(self).__name__} varies the strength of edits, and trained heads "
                f"({', '.join(model.config.heads)}) have none: set intervention.heads=[]"
            )
        if not isinstance(model, Steerable):
            raise ValueError(
                f"the objective {type(self).__name__} needs edits with adjustable strength, and "
                f"{model.config.method} has none: choose an intervention, such as intervention=bias"
            )
        with model.nulled():  # raises if an intervention does not define null(h)
            pass


class SFT(Objective):
    """Supervised finetuning: the mean next-token loss over the target's tokens."""

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return the loss, which includes penalties of interventions."""
        output = module.output_of(inputs_of(batch), batch)
        penalty_of(module, output)
        return output.loss


class DifferenceInMeans(Objective):
    """The objective for ``intervention=difference_in_means``: the difference between chosen and rejected answers.

    The result is exact after one step of SGD with lr 1 over all rows (``trainer=closed_form optimizer=closed_form
    scheduler=constant``).
    """

    pairs, steers, closed_form = True, True, True

    def check(self, model: AdaptedModel, method: Any) -> None:
        """Reject other interventions, before weights are loaded."""
        super().check(model, method)
        if not method.closed_form:
            raise ValueError(
                f"the objective DifferenceInMeans works only with intervention=difference_in_means; got {method.name}"
            )

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return half the squared distance between the vectors and the differences."""
        inputs = inputs_of(batch)
        sign = torch.ones(len(inputs["labels"]), device=inputs["labels"].device)
        sign[len(sign) // 2 :] = -1
        return module.model(**inputs, row_values={"sign": sign})["penalty"]


def penalty_of(module: Any, output: Any) -> Tensor | float:
    """Return the penalty that interventions add to the loss of a pass, or 0, and log it as ``train/penalty``."""
    if "penalty" not in output:
        return 0.0
    module.log("train/penalty", output["penalty"].detach())
    return output["penalty"]


@contextmanager
def reference(model: AdaptedModel) -> Iterator[None]:
    """Run exactly the frozen base inside the block, without dropout or gradients."""
    module: Any = model
    training = module.training
    model.eval()
    try:
        with torch.no_grad(), model.disabled():
            yield
    finally:
        model.train(training)


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the model's inputs from a batch, with logits and labels only for the target's columns.

    If the target is a separate text, all columns of the labels belong to it.
    """
    laid = target_only(batch) if "boundary" in batch else batch
    return {name: value for name, value in laid.items() if name not in NOT_INPUTS}


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:  # (b, t + 1, v), (b, t + 1) -> (b,)
    r"""Return :math:`\log p(\text{target} \mid \text{prompt})`, summed over the tokens of each target."""
    return summed_log_p(logits[:, :-1], labels[:, 1:])
