"""Find the modules of a classifier's head, which are trained and saved in addition to the interventions.

The ReFT paper's classifier is softmax(W_o tanh(W_d h_1 + b_d) + b_o) on the first token, and all four parameters are
trained (arXiv:2404.03592, section 3.2). Hugging Face models name them differently, so the head is read from the model:
everything with parameters outside the backbone, and the backbone's pooler, which is W_d in BERT and similar models
(their classifier is only W_o).

=====================  ===================================
RoBERTa, ELECTRA       ``classifier``
BERT                   ``bert.pooler``, ``classifier``
DistilBERT             ``pre_classifier``, ``classifier``
DeBERTa                ``pooler``, ``classifier``
Llama and similar      ``score``
=====================  ===================================
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..suggest import did_you_mean
from .dispatch import is_dispatched
from .quantization import is_quantized

log = logging.getLogger(__name__)

AUTO = "auto"
POOLER = "pooler"
# Transformers' class names for models with a new head for every task.
CLASSIFIERS = re.compile(
    "For(Sequence|Token|Image|Audio)Classification|ForMultipleChoice|ForQuestionAnswering"
)
_UNNAMED = re.compile(r"LABEL_\d+")  # transformers' names for unnamed classes
_WITHOUT_HEAD = (
    "For a new head, save the checkpoint without its own: "
    "AutoModel.from_pretrained(CHECKPOINT).save_pretrained(FOLDER), then model.source=local model.path=FOLDER"
)


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether a model has a task head on its backbone, such as BertForSequenceClassification."""
    return CLASSIFIERS.search(type(model).__name__) is not None


def classification_heads(model: PreTrainedModel) -> list[str]:
    """Return the paths of the modules that make up a classifier's head."""
    base, children = model.base_model_prefix, dict(model.named_children())
    if not is_classifier(model) or base not in children:
        raise ValueError(
            f"{type(model).__name__} is not a sequence classifier, so heads='auto' finds no head; load it with "
            "task='sequence_classification', or name the modules"
        )
    outside = {name: module for name, module in children.items() if name != base}
    poolers = {f"{base}.{name}": module for name, module in children[base].named_children() if name == POOLER}
    return [name for name, module in {**poolers, **outside}.items() if any(True for _ in module.parameters())]


def heads_to_train(model: PreTrainedModel, heads: str | Sequence[str] | bool | None) -> list[str]:
    """Return the paths of the modules to train as heads.

    Args:
        model: a transformers model.
        heads: their paths; ``"auto"`` for those of a classifier; None for those of a classifier, or none if the model
            is not one; ``False`` or an empty list for none.

    Raises:
        ValueError: if heads is another string, a path does not exist, ``"auto"`` finds no head, or a head is quantized
            or offloaded.
    """
    if (heads is None and is_classifier(model)) or heads == AUTO:
        heads = classification_heads(model)
    if heads is None or heads is False:
        return []
    if isinstance(heads, str) or not isinstance(heads, Sequence):
        raise ValueError(
            f"heads must be 'auto' or a list of module paths such as ['classifier'], or False for none; got {heads!r}"
        )
    modules = {name: module for name, module in model.named_modules() if name} if heads else {}
    for head in heads:
        if head not in modules:
            raise ValueError(
                f"the model has no module {head!r} to train as a head{did_you_mean(head, modules)}"
            )
        if not any(True for _ in modules[head].parameters()):
            raise ValueError(f"the module {head!r} has no parameters to train as a head")
        if is_dispatched(model) and any(p.is_meta for p in modules[head].parameters()):
            raise ValueError(
                f"the head {head!r} is offloaded and would not be trained: give it a device in device_map"
            )
        if is_quantized(modules[head]):
            raise ValueError(
                f"the head {head!r} is quantized and would not be trained: exclude it from quantization "
                "(llm_int8_skip_modules, modules_to_not_convert)"
            )
        around = next((other for other in heads if head.startswith(f"{other}.")), None)
        if around is not None or list(heads).count(head) > 1:
            raise ValueError(f"the head {head!r} is part of the head {around or head!r}: name it only once")
    return list(heads)


def parameters_of(model: PreTrainedModel, heads: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of heads by path, without duplicates: an output head can be tied to the embeddings."""
    found = {f"{head}.{n}": p for head in heads for n, p in model.get_submodule(head).named_parameters()}
    first = {id(parameter): name for name, parameter in reversed(found.items())}
    return {name: parameter for name, parameter in found.items() if first[id(parameter)] == name}


def widen_heads(model: PreTrainedModel) -> None:
    """Train and compute the head of a 16-bit classifier in float32.

    In bfloat16, which keeps 8 bits, an optimizer step smaller than 1/512 of a weight is lost, and close outputs tie. A
    quantized or offloaded head stays as it is.
    """
    for head in map(model.get_submodule, classification_heads(model)):
        offloaded = is_dispatched(model) and any(parameter.is_meta for parameter in head.parameters())
        if not is_quantized(head) and not offloaded:
            head.float()
            head.register_forward_pre_hook(widen_inputs)


def widen_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the inputs of a float32 module to float32; a forward pre-hook."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def check_only_heads_missing(model: PreTrainedModel, missing: Iterable[str], where: str) -> None:
    """Refuse a checkpoint that lacks weights outside the head, which is new."""
    heads = tuple(f"{name}." for name in classification_heads(model))
    lost = sorted(name for name in missing if not name.startswith(heads))
    if lost:
        shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        raise ValueError(
            f"the checkpoint {where} lacks weights of {type(model).__name__} outside its head: {shown}. They would be "
            "random and untrained; is this a checkpoint of this architecture?"
        )


def check_head_size(config: PretrainedConfig, outputs: int, where: str) -> None:
    """Refuse a checkpoint whose classifier and the task have different numbers of outputs."""
    if _has_head(config) and config.num_labels != outputs:
        named = ", ".join(_classes(config))
        raise ValueError(
            f"the classifier of the checkpoint {where} has {config.num_labels} outputs ({named}), but the task has "
            f"{outputs}. {_WITHOUT_HEAD}"
        )


def class_order(config: PretrainedConfig, classes: Sequence[str]) -> list[int] | None:
    """Match the outputs of a checkpoint's classifier to the classes of a task, by name.

    Names are compared ignoring case, with ``-`` and spaces equal to ``_``. If the checkpoint does not name its classes,
    or all names differ, its order is taken to be the task's, with a warning in the latter case.

    Args:
        config: configuration of a checkpoint whose classifier has one output per class.
        classes: names of the task's classes; empty for regression.

    Returns:
        The index of the output for each class of the task; None if both orders are the same.

    Raises:
        ValueError: if only some of the names match.
    """
    if not classes or not _has_head(config):
        return None
    theirs, ours = [_plain(name) for name in _classes(config)], [_plain(name) for name in classes]
    if sorted(theirs) == sorted(ours):
        order = [theirs.index(name) for name in ours]
        return None if order == list(range(len(ours))) else order
    listed = f"the checkpoint's classifier has the classes {', '.join(_classes(config))}, the task {', '.join(classes)}"
    if set(theirs) & set(ours):
        raise ValueError(f"{listed}: only some of them match. {_WITHOUT_HEAD}")
    if not all(_UNNAMED.fullmatch(name) for name in _classes(config)):
        log.warning("%s: assuming that they correspond in this order", listed)
    return None


def _has_head(config: PretrainedConfig) -> bool:
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def _classes(config: PretrainedConfig) -> list[str]:
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", "_", name.strip().lower())
