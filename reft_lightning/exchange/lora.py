"""Write interventions as a LoRA of the peft library, if they are equivalent to one; see :mod:`.folding`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..adapters.reft.model import ReftModel
from ..adapters.saving import PEFT_CONFIG_FILE, PEFT_FILE, write_tensors
from ..storage.atomic import write_text
from .folding import folds_of

PREFIX = "base_model.model."  # starts every name in peft's files
TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}


def to_lora(reft: ReftModel, folder: str | os.PathLike) -> None:
    r"""Write an adapter that ``peft.PeftModel.from_pretrained(base_model, folder)`` loads, with the same logits.

    At the output h = M x + m of a linear map, :math:`h + U^\top (V h + c)` is a LoRA with
    :math:`A = V M`, :math:`B = U^\top` and the bias :math:`U^\top (V m + c)` (peft's ``lora_bias``, which does not
    need a bias in the map itself); at its input, A = V, :math:`B = M U^\top` and the bias is :math:`M U^\top c`.
    ``reft.scale`` is folded in. Trained heads are written as peft's ``modules_to_save``.

    Args:
        reft: a model with positions ``all``, at linear maps or at modules that end in one (``mlp_output``,
            ``attention_output``).
        folder: output folder for ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ValueError: if no LoRA computes the same, with the reason; nothing is written.
    """
    from peft import LoraConfig

    folds = folds_of(reft)
    if not reft.adapters.active:
        raise ValueError("no adapter is active, so there is no LoRA: set_adapter(NAME) first")
    if not folds:
        raise ValueError(
            "this adapter has only trained heads and no interventions, so there is no LoRA: use merge()"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    biased: dict[str, Tensor] = {}
    for fold in folds:
        change = fold.change()
        if change.dense is not None:
            raise ValueError(
                f"layer {fold.site.layer} cannot become a LoRA: {type(fold.phi).__name__} changes {fold.path} by a "
                "full-rank matrix; use merge()"
            )
        ranks[fold.path] = len(change.A)
        tensors[f"{PREFIX}{fold.path}.lora_A.weight"] = change.A.float()
        tensors[f"{PREFIX}{fold.path}.lora_B.weight"] = change.B.float()
        biased[f"{PREFIX}{fold.path}.lora_B.bias"] = change.bias.float()
    if has_bias := any(bias.any() for bias in biased.values()):
        tensors |= biased
    heads = _modules_with_heads(reft)
    for name in heads:
        for inside, tensor in reft.base_model.get_submodule(name).state_dict().items():
            tensors[f"{PREFIX}{name}.{inside}"] = tensor
    rank = max(ranks.values())
    others = {re.escape(path): r for path, r in ranks.items() if r != rank}
    kind = type(reft.base_model).__name__
    config = LoraConfig(
        base_model_name_or_path=reft.config.base_model,
        task_type=next((task for ending, task in TASKS.items() if kind.endswith(ending)), None),
        target_modules="|".join(map(re.escape, ranks)),  # a list would also match longer paths with this ending
        modules_to_save=heads or None, ensure_weight_tying=len(heads) > len(reft.config.heads),
        r=rank, lora_alpha=rank, rank_pattern=others, alpha_pattern=others, lora_bias=has_bias,
        fan_in_fan_out=isinstance(folds[0].linear, Conv1D), inference_mode=True,
    )  # fmt: skip
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / PEFT_FILE, tensors)
    write_text(folder / PEFT_CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _modules_with_heads(reft: ReftModel) -> list[str]:
    """Return the heads and the modules that share parameters with them, such as embeddings tied to an output head."""
    model, heads = reft.base_model, reft.config.heads
    trained = {id(p) for head in heads for p in model.get_submodule(head).parameters()}
    sharing = [
        name
        for name, module in model.named_modules()
        if any(id(p) in trained for p in module.parameters(recurse=False))
        and not any(name.startswith(f"{head}.") for head in heads)
    ]
    return [*heads, *(name for name in sharing if name not in heads)]
