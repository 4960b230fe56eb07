"""Which modules of a classifier are its head: what is trained, and saved, in addition to the interventions.

The ReFT paper's classifier is softmax(W_o tanh(W_d h_1 + b_d) + b_o) on the first token, and all four are trained
(arXiv:2404.03592, section 3.2). Hugging Face's models spell it differently, so the head is read from the model:
everything outside the base model that has parameters, and the base model's pooler, which is the W_d of BERT and the
like (their classifier is W_o alone).

=====================  ===================================
RoBERTa, ELECTRA       ``classifier``
BERT                   ``bert.pooler``, ``classifier``
DistilBERT             ``pre_classifier``, ``classifier``
DeBERTa                ``pooler``, ``classifier``
Llama and its kin      ``score``
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
_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls classes without a name


# What transformers calls models whose head is new in every task.
CLASSIFIERS = re.compile(
    "For(Sequence|Token|Image|Audio)Classification|ForMultipleChoice|ForQuestionAnswering"
)


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether a model has the head of a task on its backbone, as BertForSequenceClassification has."""
    return CLASSIFIERS.search(type(model).__name__) is not None


def classification_heads(model: PreTrainedModel) -> list[str]:
    """Return the paths of the modules that are a classifier's head."""
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
    """Return the paths of the modules that are trained as heads.

    Args:
        model: of transformers.
        heads: their paths; ``"auto"`` for those of a classifier; None for those of a classifier, and none of another
            model; ``False`` or an empty list for none.

    Raises:
        ValueError: for another string, a path that the model does not have, a model without a head of its own, or a
            head that is quantized or offloaded.
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
                f"the head {head!r} is offloaded, and then not trained: give it a device in device_map"
            )
        if is_quantized(modules[head]):
            raise ValueError(
                f"the head {head!r} is quantized, and then not trained: name it among the modules that are not "
                "(llm_int8_skip_modules, modules_to_not_convert)"
            )
        around = next((other for other in heads if head.startswith(f"{other}.")), None)
        if around is not None or list(heads).count(head) > 1:
            raise ValueError(f"the head {head!r} is part of the head {around or head!r}: name it once")
    return list(heads)


def parameters_of(model: PreTrainedModel, heads: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of heads by path, each once: an output head may be the embeddings too."""
    found = {f"{head}.{n}": p for head in heads for n, p in model.get_submodule(head).named_parameters()}
    first = {id(parameter): name for name, parameter in reversed(found.items())}
    return {name: parameter for name, parameter in found.items() if first[id(parameter)] == name}


def widen_heads(model: PreTrainedModel) -> None:
    """Train and compute the head of a 16-bit classifier in float32.

    A step of an optimizer that is smaller than 1/512 of a weight is lost in bfloat16, which keeps 8 bits, and two
    outputs that are close tie. A head that is quantized, or offloaded, stays as it is.
    """
    for head in map(model.get_submodule, classification_heads(model)):
        offloaded = is_dispatched(model) and any(parameter.is_meta for parameter in head.parameters())
        if not is_quantized(head) and not offloaded:
            head.float()
            head.register_forward_pre_hook(widen_inputs)


def widen_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a module in float32 its inputs in float32, as a hook before its forward."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def check_only_heads_missing(model: PreTrainedModel, missing: Iterable[str], where: str) -> None:
    """Refuse a checkpoint that lacks other weights than those of the head, which is new."""
    heads = tuple(f"{name}." for name in classification_heads(model))
    lost = sorted(name for name in missing if not name.startswith(heads))
    if lost:
        shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        raise ValueError(
            f"the checkpoint {where} lacks weights of {type(model).__name__} outside its head: {shown}. They would "
            "be random and never trained; is this a checkpoint of this architecture?"
        )


def check_head_size(config: PretrainedConfig, outputs: int, where: str) -> None:
    """Refuse a checkpoint whose classifier has another number of outputs than the task."""
    if _has_head(config) and config.num_labels != outputs:
        named = ", ".join(_classes(config))
        raise ValueError(
            f"the classifier of the checkpoint {where} has {config.num_labels} outputs ({named}), the task has "
            f"{outputs}. {_WITHOUT_HEAD}"
        )


def class_order(config: PretrainedConfig, classes: Sequence[str]) -> list[int] | None:
    """Return which output of a checkpoint's classifier is each class of a task, by their names.

    Names are compared without case, and with ``-`` and spaces read as ``_``. A checkpoint that does not name its
    classes, or names all of them otherwise, is taken in the order of the task, and a warning says so in the second
    case.

    Args:
        config: of a checkpoint whose classifier has an output for each class.
        classes: names of the task's classes; empty for a regression.

    Returns:
        The number of the output for each class of the task; None where both orders are the same.

    Raises:
        ValueError: if only some of the names are the task's.
    """
    if not classes or not _has_head(config):
        return None
    theirs, ours = [_plain(name) for name in _classes(config)], [_plain(name) for name in classes]
    if sorted(theirs) == sorted(ours):
        order = [theirs.index(name) for name in ours]
        return None if order == list(range(len(ours))) else order
    listed = f"the checkpoint's classifier has the classes {', '.join(_classes(config))}, the task {', '.join(classes)}"
    if set(theirs) & set(ours):
        raise ValueError(f"{listed}: only some of them agree. {_WITHOUT_HEAD}")
    if not all(_UNNAMED.fullmatch(name) for name in _classes(config)):
        log.warning("%s: they are taken as the same, in this order", listed)
    return None


_WITHOUT_HEAD = (
    "For a new head, save the checkpoint without its own: "
    "AutoModel.from_pretrained(CHECKPOINT).save_pretrained(FOLDER), then model.source=local model.path=FOLDER"
)


def _has_head(config: PretrainedConfig) -> bool:
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def _classes(config: PretrainedConfig) -> list[str]:
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", "_", name.strip().lower())
