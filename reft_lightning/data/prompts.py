r"""Prompt templates: how an instruction is formatted before the model reads it.

A template takes an example whose `prompt` is the bare question and returns the same example with the text that the
model reads. `alpaca` is the header of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca, README),
ending in one newline as in the paper's code (arXiv:2404.03592; pyreft at dafd0995a366, examples/loreft)::

    Below is an instruction that describes a task. Write a response that appropriately completes the request.

    ### Instruction:
    Name a colour.

    ### Response:

`chat` is the chat template of the tokenizer, or of the processor for models that read images. If both the template and
the tokenizer add a BOS, only one remains after `encoding.encode` (none for models without one, such as Qwen's).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..suggest import check_choice, did_you_mean
from .encoding import leading_ids
from .example import Example
from .pictures import MARK

log = logging.getLogger(__name__)

Template = Callable[[Example, Any], Example]

ROLES = ("system", "user", "assistant")
_TASK = "Below is an instruction that describes a task"
_INPUT = "paired with an input that provides further context"
_REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
WITHOUT_INPUT = f"{_TASK}. {_REQUEST}"
WITH_INPUT = f"{_TASK}, {_INPUT}. {_REQUEST}"
RESPONSE = "\n\n### Response:\n"


def plain(example: Example, tokenizer: Any = None) -> Example:
    r"""Return the example with its context, if any, on a new line after the prompt.

    >>> plain(Example("t", "Add up.", "3", "3", context="1 + 2")).prompt
    'Add up.\n1 + 2'
    """
    text = f"{example.prompt}\n{example.context}" if example.context else example.prompt
    return _laid_out("plain", example, text, tokenizer)


def alpaca(example: Example, tokenizer: Any = None) -> Example:
    r"""Return the example under Alpaca's header, with "### Input:" if it has a context.

    >>> alpaca(Example("t", "Name a colour.", "Red", "Red")).prompt.splitlines()[2:]
    ['### Instruction:', 'Name a colour.', '', '### Response:']
    """
    if example.context:
        text = f"{WITH_INPUT}{example.prompt}\n\n### Input:\n{example.context}{RESPONSE}"
    else:
        text = f"{WITHOUT_INPUT}{example.prompt}{RESPONSE}"
    return _laid_out("alpaca", example, text, tokenizer)


def chat(example: Example, tokenizer: Any) -> Example:
    """Return the example in the tokenizer's chat template, ending with the generation prompt.

    The context follows the prompt after an empty line. If the template puts white space before the assistant's text
    (Llama-2: `[/INST] Red`), the target and the options begin with it, as the model was trained.

    Raises:
        ValueError: if the tokenizer has no chat template, or the template rejects the turns (some have no system
            role); names the row.
    """
    where = example.source or example.task
    if tokenizer.chat_template is None:
        raise ValueError(
            f"template chat needs a tokenizer with a chat template, and {_name(tokenizer)} has none; use an "
            "instruction-tuned model, or template alpaca or plain"
        )
    question = f"{example.prompt}\n\n{example.context}" if example.context else example.prompt
    turns = [*example.turns, ("user", question)]
    for role, _ in turns:
        check_choice(f"{where}: a turn's role", role, ROLES)
    text = _render(tokenizer, turns, where)
    lead = _white_space_of_answers(tokenizer, turns, text, where)
    inner = tokenizer_of(tokenizer)
    bos: Any = inner.bos_token
    if bos and leading_ids(inner) and text.lstrip().startswith(bos):
        text = text.lstrip().removeprefix(bos)  # the tokenizer adds it
    return replace(
        example,
        prompt=text,
        target=_led(lead, example.target),
        options=tuple(_led(lead, option) for option in example.options),
        context="",
        turns=(),
    )


TEMPLATES: dict[str, Template] = {"plain": plain, "alpaca": alpaca, "chat": chat}


def apply_template(
    name: str,
    examples: Iterable[Example],
    tokenizer: Any,
    system_prompt: str | None = None,
) -> list[Example]:
    """Return the examples with the text that the model reads.

    Args:
        name: a key of `TEMPLATES`.
        examples: examples with bare prompts.
        tokenizer: a tokenizer, or the processor of a model that reads images; only `chat` uses its chat template.
        system_prompt: first turn of every example that does not begin with a system turn; `chat` only.

    Raises:
        ValueError: if there is no such template (suggests the closest name), or it has no place for a system prompt.
    """
    if name not in TEMPLATES:
        raise ValueError(
            f"unknown prompt template {name!r}{did_you_mean(name, TEMPLATES)}; choose one of {', '.join(TEMPLATES)}"
        )
    if system_prompt and name != "chat":
        raise ValueError(f"template {name} has no place for a system prompt; got {system_prompt!r:.60}")
    if name == "chat":
        _warn_of_today(str(tokenizer.chat_template))
    return [TEMPLATES[name](_begun(example, system_prompt), tokenizer) for example in examples]


@cache  # once per template
def _warn_of_today(template: str) -> None:
    if "strftime_now" in template:  # transformers' function, as in Llama 3.2's
        log.warning(
            "the chat template writes today's date into prompts: a run that is resumed, evaluated or repeated on "
            "another day will read different texts"
        )


def _begun(example: Example, system_prompt: str | None) -> Example:
    if not system_prompt or (example.turns and example.turns[0][0] == "system"):
        return example
    return replace(example, turns=(("system", system_prompt), *example.turns))


def _laid_out(name: str, example: Example, text: str, reader: Any) -> Example:
    """Return an example with the text that the model reads, with the processor's image token for each picture."""
    if example.turns:
        raise ValueError(
            f"{example.source or example.task}: template {name} has no place for earlier turns of a conversation "
            f"(there are {len(example.turns)}); use template chat"
        )
    text = text.replace(MARK, reader.image_token) if example.pictures else text
    return replace(example, prompt=text, context="")


def tokenizer_of(reader: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer itself, or the tokenizer of a processor of images and text."""
    return reader.tokenizer if _sees(reader) else reader


def _sees(reader: Any) -> bool:
    return hasattr(reader, "image_processor")


def _content(text: str, reader: Any) -> Any:
    """Return the content of a message: for a processor, parts of text and image without line breaks around images."""
    if not _sees(reader):
        return text
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(text.split(MARK)):
        parts += [{"type": "image"}] if i else []
        trimmed = piece.strip("\n") if MARK in text else piece
        parts += [{"type": "text", "text": trimmed}] if trimmed else []
    return parts


def _render(tokenizer: Any, turns: Sequence[tuple[str, str]], where: str, prompt: bool = True) -> str:
    messages = [{"role": role, "content": _content(text, tokenizer)} for role, text in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates are third-party programs and can raise anything
        roles = ", ".join(role for role, _ in turns)
        reason = error if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{where}: the chat template of {_name(tokenizer)} rejects the turns {roles}: {reason}"
        ) from error


_PROBE = "answer"


def _white_space_of_answers(tokenizer: Any, turns: Sequence[tuple[str, str]], prompt: str, where: str) -> str:
    """Return what the template puts between the prompt and the assistant's text, if it is only white space."""
    whole = _render(tokenizer, [*turns, ("assistant", _PROBE)], where, prompt=False)
    if not whole.startswith(prompt):
        return ""
    between, _, _ = whole[len(prompt) :].partition(_PROBE)
    return between if between.isspace() else ""


def _led(lead: str, text: str) -> str:
    return text if text.startswith(lead) else lead + text


def _name(tokenizer: Any) -> str:
    tokenizer = tokenizer_of(tokenizer)
    return tokenizer.name_or_path or type(tokenizer).__name__
