"""Format a user's question in the way the model read its training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..adapters.methods import method_named
from ..config.schema import Config
from ..data import Example, Family
from ..data.marks import Marks, as_marks, unmarked
from ..data.pictures import Picture, marked
from ..data.prompts import apply_template
from ..storage.reading import naming
from .arguments import OWN, family_of, needs_marks, reads_preferences
from .kinds import KINDS, Kind, kind_of


@dataclass(frozen=True)
class PromptFormat:
    """The format of a prompt.

    Args:
        template: a name in ``data.prompts.TEMPLATES``.
        system_prompt: system prompt of chat templates.
        line_break: whether a plain question ends with a line break, like the rows of ``data=custom``.
        kind: kind of the training rows.
        marks: texts that enclose the words to edit.
        given: whether the positions ``given``, which edit the marked words, are used.
    """

    template: str = "plain"
    system_prompt: str | None = None
    line_break: bool = False
    kind: Kind = KINDS["generation"]
    marks: Marks | None = None
    given: bool = False

    @classmethod
    def of(cls, config: Config, where: object) -> PromptFormat:
        """Return the format of a run's training rows.

        Raises:
            ValueError: if the run trained a classifier or a reward model, or its method needs a second text; names
                ``where``.
        """
        if reads_preferences(config):
            raise ValueError(f"{where} is a reward model, which does not generate text")
        if method_named(config.intervention.method).takes_source:
            raise ValueError(
                f"{where} needs the hidden states of another text for each question: use it from Python"
            )
        data = config.data
        if own := OWN.get(data.family):  # built without its rows, which may no longer exist
            template = data.template or own.template(data)
            marks, given = as_marks(data.marks), needs_marks(config.intervention)
            return cls(template, data.system_prompt, own.line_break(data), KINDS[own.kind], marks, given)
        family = family_of(config)
        if not kind_of(family).generates:
            raise ValueError(f"{where} is a classifier ({family.name}), which does not generate text")
        template = data.template or cast(Family, family).template
        return cls(template, data.system_prompt, kind=kind_of(family))

    def prompt(
        self,
        question: str,
        reader: Any,
        turns: Sequence[tuple[str, str]] = (),
        pictures: Sequence[Picture] = (),
    ) -> Example:
        """Return an example with the prompt that the model reads.

        Args:
            question: the user's question.
            reader: the tokenizer, or the processor of a model that reads images.
            turns: earlier turns, which only chat templates can include.
            pictures: one for each mark in the texts; without marks they come first.

        Raises:
            ValueError: if the chat template is missing or rejects the turns; if picture marks and pictures differ in
                number; or if words are not marked correctly.
        """
        ended = question.endswith("\n") or self.template != "plain" or not self.line_break
        said, asked = tuple(turns), question if ended else f"{question}\n"
        if self.kind.sees:
            with naming("this question"):
                said, asked = marked(said, asked, pictures)
        example = Example("question", asked, target="-", answer="-", turns=said, pictures=tuple(pictures))
        (text,) = apply_template(self.template, [example], reader, self.system_prompt)
        return text if self.marks is None else unmarked(text, self.marks, self.given)
