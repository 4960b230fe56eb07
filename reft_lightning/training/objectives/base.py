r"""An objective: the loss of a batch, from as many passes of the model as it takes.

The states of an adapted model that passes may be made in:

===================================  ===============================================================================
``model(...)``                       with its edits
``with reference(model):``           the frozen base: a reference model that costs no memory
``with model.nulled():``             each edit replaced by the removal of what it would add (:class:`Steerable`)
``adapter_names=[("default", a)]``   other strengths a, or another adapter, for each row (:class:`Steerable`)
``row_values={"concept": ids}``      what is said of each row to edits that ask for it (:class:`Steerable`)
``source_ids=...``                   other texts, whose hidden states edits take (:class:`Steerable`)
===================================  ===============================================================================

One's own is a subclass, named by its import path (``objective._target_=mine.Mine``):

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
    """Whether a batch holds each prompt twice: b rows with the target, then b with the answer that was rejected."""
    steers: ClassVar[bool] = False
    """Whether it needs edits of several strengths, and a model that is :class:`Steerable`."""
    rewards: ClassVar[bool] = False
    """Whether the model is a classifier with one output, a reward for each text, instead of a language model."""
    closed_form: ClassVar[bool] = False
    """Whether one step of SGD with lr 1 over all rows is its minimum, and any other step is not."""

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch, a scalar with a gradient.

        Args:
            module: the LightningModule: ``module.model`` is the adapted model, ``module.log`` notes further numbers.
            batch: of :class:`~reft_lightning.data.encoding.Collator`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(module, batch)")

    def check(self, model: AdaptedModel, method: Any) -> None:
        """Reject a model that cannot be trained by this objective, before weights are loaded.

        Args:
            model: without weights.
            method: what is known of its method, a :class:`~reft_lightning.adapters.methods.Method`.

        Raises:
            ValueError: with the reason.
        """
        if self.steers and model.config.heads:
            raise ValueError(
                f"the objective {type(self).__name__} gives rows edits of other strengths, and a trained head "
                f"({', '.join(model.config.heads)}) has none: set intervention.heads=[]"
            )
        if self.steers and not isinstance(model, Steerable):
            raise ValueError(
                f"the objective {type(self).__name__} needs edits whose strength can be chosen, and "
                f"{model.config.method} has none: choose an intervention, such as intervention=bias"
            )
        if isinstance(model, Steerable) and self.steers:
            with model.nulled():  # which refuses an intervention without null(h)
                pass


class SFT(Objective):
    """Supervised finetuning: the mean next-token loss over the target's tokens."""

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return the loss, with what interventions add to it."""
        output = module.output_of(inputs_of(batch), batch)
        penalty_of(module, output)
        return output.loss


class DifferenceInMeans(Objective):
    """What ``intervention=difference_in_means`` asks for: the difference between chosen and rejected answers.

    It is exact after one step of SGD with lr 1 over all rows (``trainer=closed_form optimizer=closed_form
    scheduler=constant``).
    """

    pairs, steers, closed_form = True, True, True

    def check(self, model: AdaptedModel, method: Any) -> None:
        """Reject other interventions, before weights are loaded."""
        super().check(model, method)
        if not method.closed_form:
            raise ValueError(
                f"the objective DifferenceInMeans fits intervention=difference_in_means only; got {method.name}"
            )

    def loss(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Return half the squared distance of the vectors from the differences."""
        inputs = inputs_of(batch)
        sign = torch.ones(len(inputs["labels"]), device=inputs["labels"].device)
        sign[len(sign) // 2 :] = -1
        return module.model(**inputs, row_values={"sign": sign})["penalty"]


def penalty_of(module: Any, output: Any) -> Tensor | float:
    """Return what interventions add to the loss of a pass, 0 for nothing; it is logged as ``train/penalty``."""
    if "penalty" not in output:
        return 0.0
    module.log("train/penalty", output["penalty"].detach())
    return output["penalty"]


@contextmanager
def reference(model: AdaptedModel) -> Iterator[None]:
    """Run exactly the frozen base inside the block, without dropout and without gradient."""
    module: Any = model
    training = module.training
    model.eval()
    try:
        with torch.no_grad(), model.disabled():
            yield
    finally:
        model.train(training)


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what the model takes of a batch, with the logits and labels of the target's columns only.

    Where the target is a text of its own, all columns are the target's.
    """
    laid = target_only(batch) if "boundary" in batch else batch
    return {name: value for name, value in laid.items() if name not in NOT_INPUTS}


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:  # (b, t + 1, v), (b, t + 1) -> (b,)
    r"""Return :math:`\log p(\text{target} \mid \text{prompt})`, summed over the tokens of each target."""
    return summed_log_p(logits[:, :-1], labels[:, 1:])
