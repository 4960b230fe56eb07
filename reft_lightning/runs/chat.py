"""Talk to the frozen base and the adapted model side by side: ``reft-chat run=FOLDER``."""

from __future__ import annotations

import logging
import sys
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
from ..base_models.fingerprint import fingerprint_of
from ..base_models.reading import context_of
from ..data.generation_data import GenerationData
from ..data.pictures import MARK, Picture
from ..data.prompts import TEMPLATES, tokenizer_of
from ..evaluation import Decoding
from ..terminal.bars import Bar
from .arguments import attachment
from .build import load_to_write
from .prompting import PromptFormat
from .run_folder import at_commit, load_run_config, warn_of_other_base

log = logging.getLogger(__name__)
LINES = "Type a prompt; a \\ at the end of a line continues it on the next."
PICTURES = "/image FILE shows a picture with the next question."
COMMANDS = "/plain, /alpaca and /chat choose the template, /new starts a new conversation, /quit ends it."
MAX_LENGTH = 4096  # tokens of question and answer, unless the model's context is shorter
SHORTEST = 16  # tokens that must remain for a question
NO_TEMPLATE = "this tokenizer has no chat template"


def main(folder: Path, max_new_tokens: int = 64, template: str | None = None) -> None:
    """Answer prompts from standard input until it ends or says ``/quit``; template None: that of the training."""
    console = Console(emoji=False)
    talk = Conversation(*load(folder, template), max_new_tokens)
    has_template = talk.reader.chat_template is not None
    if talk.prompts.template == "chat" and not has_template:
        raise ValueError(f"{NO_TEMPLATE}; use template=plain")
    sees = talk.prompts.kind.sees
    manual = " ".join([LINES, *([PICTURES] if sees else []), COMMANDS])
    console.print(f"[bold]{escape(str(folder))}[/bold]: base and adapted model. {manual}", soft_wrap=True)
    while True:
        text = _read(console)
        if text is None or text == "/quit":
            return
        command, _, name = text.partition(" ")
        if command == "/image" and sees:
            _show(console, talk, name.strip())
        elif text == "/new":
            talk.begin_again()
        elif text == "/chat" and not has_template:
            console.print(f"{NO_TEMPLATE}; the template is still {talk.prompts.template}")
        elif text[:1] == "/" and text[1:] in TEMPLATES:
            talk.prompts = replace(talk.prompts, template=text[1:])
            talk.begin_again()
        elif text.startswith("/"):
            console.print(f"{escape(text)} is not a command. {manual}")
        elif text:
            _ask(console, talk, text)


def _show(console: Console, talk: Conversation, name: str) -> None:
    picture = Picture(name, Path(name).expanduser())
    try:
        picture.open()
    except ValueError as error:
        console.print(escape(str(error)))
    else:
        talk.shown.append(picture)


def _ask(console: Console, talk: Conversation, text: str) -> None:
    try:
        with Bar("answering"):
            base, adapted = talk.ask(text)
    except ValueError as error:  # concerns this question only; the conversation continues
        console.print(escape(str(error)))
        return
    # Text, because a model's output may look like markup
    panels = [
        Panel(Text(said or "(nothing)"), title=who)
        for said, who in ((base, "frozen base"), (adapted, "adapted"))
    ]
    console.print(Columns(panels, expand=True, equal=True))


class Conversation:
    """A conversation with the frozen base and the adapted model, each of which sees its own earlier answers.

    Only chat templates can include earlier turns; with other templates each question is independent.

    Args:
        model: adapted model, ready to generate.
        reader: its tokenizer, or its processor of images and text.
        prompts: format of each question.
        max_new_tokens: maximum length of each answer. A question too long to leave room for it loses its beginning.

    Raises:
        ValueError: if an answer of this length leaves no room for a question.
    """

    def __init__(
        self, model: AdaptedModel, reader: Any, prompts: PromptFormat, max_new_tokens: int = 64
    ) -> None:
        self.model, self.reader, self.prompts, self.max_new_tokens = model, reader, prompts, max_new_tokens
        self._longest = min(MAX_LENGTH, context_of(model.base_model)) - max_new_tokens
        if self._longest < SHORTEST:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} leaves no room for a question: it must be at most "
                f"{self._longest + max_new_tokens - SHORTEST}"
            )
        self.shown: list[Picture] = []  # with the next question
        self.begin_again()

    def begin_again(self) -> None:
        """Forget the earlier turns and pictures."""
        self._turns: list[list[tuple[str, str]]] = [[], []]  # of the base and of the adapted model
        self._seen: list[Picture] = []

    def ask(self, question: str) -> tuple[str, str]:
        """Return the answers of the frozen base and the adapted model.

        Raises:
            ValueError: if the template or the processor rejects the question.
        """
        pictures = [*self._seen, *self.shown]
        if self.shown and MARK not in question:
            question = f"{MARK * len(self.shown)}\n{question}"
        with self.model.disabled():
            base = self._say(question, self._turns[0], pictures)
        adapted = self._say(question, self._turns[1], pictures)
        self.shown = []
        if self.prompts.template == "chat":
            self._seen = pictures
            for turns, said in zip(self._turns, (base, adapted), strict=True):
                turns += [("user", question), ("assistant", said)]
        return base, adapted

    def _say(self, question: str, turns: list[tuple[str, str]], pictures: list[Picture]) -> str:
        """Return an answer, decoded greedily with the code of the evaluation."""
        kind, example = self.prompts.kind, self.prompts.prompt(question, self.reader, turns, pictures)
        assert issubclass(kind.data, GenerationData)
        batch = kind.data.lay_out(self.reader, example, self._longest)
        device = self.model.base_model.device
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        decoding = Decoding(self.max_new_tokens, verify=False)
        ((said,),) = kind.write(self.model, batch, tokenizer_of(self.reader), decoding)
        return said.strip()


def load(folder: Path, template: str | None = None) -> tuple[AdaptedModel, Any, PromptFormat]:
    """Return the adapted model of a run folder, its tokenizer or processor, and the format of its prompts."""
    config = at_commit(load_run_config(folder), folder)
    prompts = PromptFormat.of(config, folder)
    if template is not None:
        prompts = replace(prompts, template=template)
    adapter = load_state(folder / "adapter")  # a missing one is reported before weights are loaded
    base, reader, kind = load_to_write(config, prompts.kind)
    warn_of_other_base(folder, fingerprint_of(base))
    model = adapt(base, **attachment(config))
    load_saved(model, folder / "adapter", adapter)
    return model.eval(), reader, replace(prompts, kind=kind)


def _read(console: Console) -> str | None:
    lines = []
    while True:
        try:
            line = console.input("[bold]> [/bold]" if not lines else "  ")
            line.encode()  # where Python does not refuse bytes that are not text, it reads them as surrogates
        except (EOFError, KeyboardInterrupt):
            return None
        except UnicodeError:
            name = sys.stdin.encoding or "text"
            console.print(f"This is not valid {name}; $PYTHONIOENCODING sets the encoding of what you type.")
            return ""
        if not line.endswith("\\"):
            return "\n".join([*lines, line]).strip()
        lines.append(line[:-1])
