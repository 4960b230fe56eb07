"""Talk to the frozen base and the adapted model side by side: ``reft-chat run=FOLDER``."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from ..adapters.adapt import adapt
from ..adapters.adapted import AdaptedModel
from ..adapters.saving import load_saved, load_state
from ..base_models.loading import load_base_model
from ..data.encoding import Collator, encode
from ..data.prompts import TEMPLATES
from ..evaluation import Decoding, generate
from ..terminal.bars import Bar
from .arguments import attachment, model_source
from .prompting import PromptFormat
from .run_folder import load_run_config

log = logging.getLogger(__name__)
HELP = (
    "Type a prompt; a \\ at the end of a line goes on in the next. "
    "/plain, /alpaca and /chat choose the template, /quit ends."
)
MAX_LENGTH = (
    4096  # tokens of question and answer, or what the model reads; the beginning of a longer one is left out
)
SHORTEST = 16  # tokens that a question may have at least
NO_TEMPLATE = "this tokenizer has no chat template"


def main(folder: Path, max_new_tokens: int = 64, template: str | None = None) -> None:
    """Answer prompts from standard input until it ends or says ``/quit``.

    Args:
        folder: a run folder.
        max_new_tokens: of each answer.
        template: laid around each prompt, a name in ``data.prompts.TEMPLATES``; None for that of the training rows.

    Raises:
        ValueError: if the folder is no run, its model is a classifier, or the tokenizer has no chat template.
    """
    console = Console()
    config = load_run_config(folder)
    prompts = PromptFormat.of(config, folder)
    if template is not None:
        prompts = replace(prompts, template=template)
    model, tokenizer = load(folder)
    if prompts.template == "chat" and tokenizer.chat_template is None:
        raise ValueError(f"{NO_TEMPLATE}; use template=plain")
    console.print(f"[bold]{escape(str(folder))}[/bold]: base and adapted model. {HELP}", soft_wrap=True)
    while True:
        text = _read(console)
        if text is None or text == "/quit":
            return
        if text[:1] == "/" and text[1:] in TEMPLATES:
            if text == "/chat" and tokenizer.chat_template is None:
                console.print(f"{NO_TEMPLATE}; template stays {prompts.template}")
            else:
                prompts = replace(prompts, template=text[1:])
        elif text.startswith("/"):
            console.print(f"{escape(text)} is no command. {HELP}")
        elif text:
            with Bar("answering"):
                base, adapted = answer(
                    model,
                    tokenizer,
                    text,
                    max_new_tokens,
                    prompts.template,
                    prompts.system_prompt,
                    prompts.line_break,
                )
            console.print(
                Columns(
                    # Text: what a model says may look like markup
                    [Panel(Text(base), title="frozen base"), Panel(Text(adapted), title="adapted")],
                    expand=True,
                    equal=True,
                )
            )


def load(folder: Path) -> tuple[AdaptedModel, Any]:
    """Return the adapted model of a run folder, ready to generate, and its tokenizer."""
    config = load_run_config(folder)
    adapter = load_state(folder / "adapter")  # a missing one is said before weights are loaded
    base, tokenizer = load_base_model(**model_source(config))
    model = adapt(base, **attachment(config))
    load_saved(model, folder / "adapter", adapter)
    return model.eval(), tokenizer


def answer(
    model: AdaptedModel,
    tokenizer: Any,
    text: str,
    max_new_tokens: int,
    template: str,
    system_prompt: str | None = None,
    line_break: bool = False,
) -> tuple[str, str]:
    """Return what the frozen base and the adapted model answer, greedily, by the code of the evaluation.

    The last three arguments are those of :class:`~.prompting.PromptFormat`.

    Raises:
        ValueError: if so long an answer leaves no room for a question.
    """
    example = PromptFormat(template, system_prompt, line_break).prompt(text, tokenizer)
    known = getattr(model.base_model.config.get_text_config(), "max_position_embeddings", None)
    most = min(MAX_LENGTH, known or MAX_LENGTH)
    if max_new_tokens > most - SHORTEST:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a question: at most {most - SHORTEST}"
        )
    batch = Collator(tokenizer.pad_token_id)([encode(tokenizer, example, most - max_new_tokens)])
    batch = {k: v.to(model.base_model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    decoding = Decoding(max_new_tokens, verify=False)

    def say() -> str:
        ((said,),) = generate(model, batch, tokenizer, decoding)
        return said.strip() or "(nothing)"

    with model.disabled():
        base = say()
    return base, say()


def _read(console: Console) -> str | None:
    lines = []
    while True:
        try:
            line = console.input("[bold]> [/bold]" if not lines else "  ")
        except (EOFError, KeyboardInterrupt):
            return None
        if not line.endswith("\\"):
            return "\n".join([*lines, line]).strip()
        lines.append(line[:-1])
