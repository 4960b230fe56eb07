"""lm-evaluation-harness: a model class that tells the interventions which tokens belong to the prompt.

lm-eval 0.4.13 has no entry points for models, so importing this file registers ``reft_lightning``, and running it runs
lm-eval's own command line::

    python -m reft_lightning.integrations.lm_eval run --model reft_lightning \
        --model_args pretrained=NAME,adapter=FOLDER --tasks TASK

Shapes: b rows, s columns, v tokens of the vocabulary.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.reft.model import ReftModel
from ..adapters.saving import load_adapter
from .transformers import as_pretrained

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"reft_lightning.integrations.lm_eval needs lm-eval ({error}): pip install 'reft_lightning[lm-eval]'"
    ) from error

Harness: Any = HFLM  # lm-eval's decorator hides its type
PROMPT = 1 << 40  # subtracted from the ids of a prompt to mark them on their way through HFLM


@register_model("reft_lightning")
class ReftLM(Harness):
    """lm-eval's ``hf`` model with an adapter of interventions.

    The prompt is the context of a request, in all kinds of tasks. For the rolling log-likelihood of a whole text it is
    the part of a window before the tokens to score: the prefix token and, in later windows of a long text, the tokens
    that overlap with the previous window.

    Args:
        pretrained: name or folder of the base model, the model itself, or a :class:`~reft_lightning.ReftModel`.
        adapter: folder or name of a saved adapter; None if ``pretrained`` has it, or for the frozen base model.
        **kwargs: arguments of ``hf``: ``dtype``, ``batch_size``, ``max_length``, ...

    Raises:
        FileNotFoundError: if there is no such adapter.
        ValueError: if the adapter does not fit the base model.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | ReftModel,
        adapter: str | PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        if adapter is not None:
            load_adapter(adapter)  # fail before gigabytes are read
        reft = pretrained if isinstance(pretrained, ReftModel) else None
        super().__init__(pretrained if reft is None else reft.base_model, **kwargs)
        if adapter is not None:
            reft = ReftModel.from_pretrained(self._model, adapter)
        self.edited = reft is not None
        if reft is not None:
            self._model = as_pretrained(reft).eval()

    def _loglikelihood_tokens(
        self, requests: list[Any], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        if self.edited:
            requests = [(text, [t - PROMPT for t in context], rest) for text, context, rest in requests]
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:  # (b, s) -> (b, s, v)
        if not self.edited:
            return super()._model_call(inps, attn_mask, labels)
        prompt = inps < 0
        precision = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, precision, enabled=precision is not None):
            return self.model(input_ids=inps + PROMPT * prompt, prompt_mask=prompt).logits


if __name__ == "__main__":
    cli_evaluate()
