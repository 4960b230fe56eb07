"""Talk to the frozen base and the adapted model side by side: ``reft-chat run=FOLDER``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from .attachment import attach
from .base_models import load_base_model
from .checkpoint import load_adapter
from .construction import attachment, model_source
from .evaluation import generate_greedily
from .experiment import load_run_config
from .model import ReftModel

log = logging.getLogger(__name__)
HELP = (
    "Type a prompt; a \\ at the end of a line goes on in the next. "
    "/plain and /chat choose the template, /quit ends."
)
NO_TEMPLATE = "this tokenizer has no chat template"


def main(folder: Path, max_new_tokens: int = 64, template: str = "plain") -> None:
    """Answer prompts from standard input until it ends or says ``/quit``.

    Args:
        folder: a run folder.
        max_new_tokens: of each answer.
        template: ``plain`` reads the prompt as the training rows are read, text and a newline; ``chat`` reads
            it through the tokenizer's chat template.

    Raises:
        ValueError: if the folder is no run, or the tokenizer has no chat template.
    """
    console = Console()
    model, tokenizer = load(folder)
    if template == "chat" and tokenizer.chat_template is None:
        raise ValueError(f"{NO_TEMPLATE}; use template=plain")
    console.print(f"[bold]{escape(str(folder))}[/bold]: base and adapted model. {HELP}", soft_wrap=True)
    while True:
        text = _read(console)
        if text is None or text == "/quit":
            return
        if text in ("/plain", "/chat"):
            if text == "/chat" and tokenizer.chat_template is None:
                console.print(f"{NO_TEMPLATE}; template stays {template}")
            else:
                template = text[1:]
        elif text.startswith("/"):
            console.print(f"{escape(text)} is no command. {HELP}")
        elif text:
            base, adapted = answer(model, tokenizer, text, max_new_tokens, template)
            console.print(
                Columns(
                    # Text: what a model says may look like markup
                    [Panel(Text(base), title="frozen base"), Panel(Text(adapted), title="adapted")],
                    expand=True,
                    equal=True,
                )
            )


def load(folder: Path) -> tuple[ReftModel, Any]:
    """Return the adapted model of a run folder, ready to generate, and its tokenizer."""
    config = load_run_config(folder)
    _, adapter = load_adapter(folder / "adapter")  # a missing one is said before weights are loaded
    base, tokenizer = load_base_model(**model_source(config))
    model = attach(base, **attachment(config))
    model.load_adapter_state_dict(adapter)
    return model.eval(), tokenizer


@torch.no_grad()
def answer(
    model: ReftModel, tokenizer: Any, text: str, max_new_tokens: int, template: str
) -> tuple[str, str]:
    """Return what the frozen base and the adapted model answer, greedily."""
    if template == "chat":
        if tokenizer.chat_template is None:
            raise ValueError(f"{NO_TEMPLATE}; use template=plain")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)  # the template has the BOS
    else:
        encoded = tokenizer(text + "\n", return_tensors="pt")
    ids, mask = (encoded[name].to(model.base_model.device) for name in ("input_ids", "attention_mask"))
    batch = {"input_ids": ids, "attention_mask": mask, "prompt_mask": mask.bool(), "boundary": ids.shape[1]}

    def generate() -> str:
        (new,) = generate_greedily(
            model,
            batch,
            max_new_tokens=max_new_tokens,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
        )
        return tokenizer.decode(new, skip_special_tokens=True).strip() or "(nothing)"

    with model.disabled():
        base = generate()
    return base, generate()


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
