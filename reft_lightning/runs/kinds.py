"""The kinds of benchmark families: a table from a family's ``kind`` to the classes and settings of its runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PretrainedConfig

from ..adapters.adapted import AdaptedModel
from ..config.schema import Config
from ..data import AnyFamily
from ..data.benchmark_data import BenchmarkData
from ..data.classification_data import ClassificationData
from ..data.generation_data import GenerationData
from ..data.image_data import ImageData
from ..data.preferences import PreferenceData
from ..data.text_data import TextData
from ..data.text_to_text import TextToTextData
from ..evaluation import generate, write
from ..training.classification import ClassificationModule
from ..training.generation import GenerationModule
from ..training.module import FinetuningModule
from ..training.reward import RewardModule
from ..training.text import TextModule
from ..training.text_to_text import TextToTextModule

if TYPE_CHECKING:
    from .build import Prepared


@dataclass(frozen=True)
class Kind:
    """A kind of benchmark family.

    Args:
        task: task of the base model, a key of :data:`~reft_lightning.base_models.loading.TASKS`.
        data: the data module.
        module: (configuration, prepared run, model, training pass) -> the Lightning module.
        generates: whether a language model is trained, whose texts are scored.
        write: (adapted model, batch, tokenizer, decoding) -> the texts of each row.
        prompts: whether rows have prompts, after which texts are generated.
        sees: whether rows have pictures, which a processor reads.
        heads: heads that are trained unless the configuration says otherwise.
        unused: keys of ``data`` that do not apply.
    """

    task: str
    data: type[BenchmarkData]
    module: Callable[[Config, Prepared, AdaptedModel, Any], FinetuningModule]
    generates: bool
    write: Callable[..., list[list[str]]] = generate
    prompts: bool = True
    sees: bool = False
    heads: str | tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def _generation(
    config: Config,
    run: Prepared,
    model: AdaptedModel,
    training_pass: Any,
    cls: type[GenerationModule] = GenerationModule,
) -> GenerationModule:
    assert run.decoding is not None
    return cls(
        model,
        run.data,
        run.optimization,
        run.decoding,
        run.objective,
        config.option_likelihood,
        training_pass,
    )


def _classification(
    config: Config, run: Prepared, model: AdaptedModel, training_pass: Any
) -> ClassificationModule:
    assert isinstance(run.data, ClassificationData)
    return ClassificationModule(model, run.data, run.optimization, training_pass, run.class_order)


def _preference(config: Config, run: Prepared, model: AdaptedModel, training_pass: Any) -> RewardModule:
    return RewardModule(model, run.data, run.optimization, run.objective, training_pass)


KINDS = {
    "generation": Kind("causal_lm", GenerationData, _generation, generates=True),
    "text": Kind(
        "causal_lm", TextData, partial(_generation, cls=TextModule), generates=True, prompts=False,
        unused=("system_prompt", "target_tokens"),
    ),
    "text_to_text": Kind(
        "seq2seq_lm", TextToTextData, partial(_generation, cls=TextToTextModule), generates=True, write=write
    ),
    "vision": Kind("image_text_to_text", ImageData, _generation, generates=True, sees=True,
                   unused=("target_tokens",)),
    "classification": Kind(
        "sequence_classification", ClassificationData, _classification, generates=False, heads="auto",
        # its published validation set is split, and texts are used as is
        unused=("train_tasks", "validation_size", "template", "system_prompt", "target_tokens"),
    ),
    "preference": Kind(
        "sequence_classification", PreferenceData, _preference, generates=False, heads="auto",
        unused=("target_tokens",),
    ),
}  # fmt: skip


def kind_of(family: AnyFamily | None) -> Kind:
    """Return the kind of a family; without a family, that of generated texts."""
    return KINDS[family.kind if family else "generation"]


def is_text_to_text(kind: Kind, hf_config: PretrainedConfig) -> bool:
    """Whether a model reads prompts and targets of this kind separately, with an encoder and a decoder."""
    return (
        kind.task == "causal_lm"
        and kind.prompts
        and type(hf_config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    )
