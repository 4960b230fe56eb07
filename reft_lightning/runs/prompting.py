"""How a question of a user is written as the model read its training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.methods import method_named
from ..config.schema import Config
from ..data import Example
from ..data.marks import Marks, as_marks, unmarked
from ..data.pictures import Picture, marked
from ..data.prompts import apply_template
from ..storage.reading import naming
from .arguments import OWN, family_of, needs_marks, reads_preferences
from .kinds import KINDS, Kind, kind_of


@dataclass(frozen=True)
class PromptFormat:
    """What is laid around a question.

    Args:
        template: a name in ``data.prompts.TEMPLATES``.
        system_prompt: for chat templates.
        line_break: whether a plain question ends its line, as the rows of ``data=custom`` do.
        kind: of the training rows.
        marks: what stands before and after words that are edited.
        given: whether they are.
    """

    template: str = "plain"
    system_prompt: str | None = None
    line_break: bool = False
    kind: Kind = KINDS["generation"]
    marks: Marks | None = None
    given: bool = False

    @classmethod
    def of(cls, config: Config, where: object) -> PromptFormat:
        """Return that of a run's training rows.

        Raises:
            ValueError: if the run trained a classifier or a reward model; ``where`` it is.
        """
        if reads_preferences(config):
            raise ValueError(f"{where} is a reward model, which generates no text")
        if method_named(config.intervention.method).takes_source:
            raise ValueError(
                f"{where} takes hidden states of another text with each question: use it in Python"
            )
        data = config.data
        if own := OWN.get(data.family):  # its rows, which may be gone, are not needed to talk
            template = data.template or own.template(data)
            marks, given = as_marks(data.marks), needs_marks(config.intervention)
            return cls(template, data.system_prompt, own.line_break(data), KINDS[own.kind], marks, given)
        family = family_of(config)
        if not kind_of(family).generates:
            raise ValueError(f"{where} is a classifier ({family.name}), which generates no text")
        template = data.template or str(getattr(family, "template", "plain"))
        return cls(template, data.system_prompt, kind=kind_of(family))

    def prompt(
        self,
        question: str,
        reader: Any,
        turns: Sequence[tuple[str, str]] = (),
        pictures: Sequence[Picture] = (),
    ) -> Example:
        """Return an example whose prompt is what the model reads.

        Args:
            question: of the user.
            reader: the tokenizer, or the processor of a model that reads images.
            turns: what was said before, which only chat templates have a place for.
            pictures: one for each mark in the texts; without a mark they come first.

        Raises:
            ValueError: if the template is the tokenizer's, which has none or refuses the turns; for other marks than
                pictures; or for words that are not marked as they should be.
        """
        ended = question.endswith("\n") or self.template != "plain" or not self.line_break
        said, asked = tuple(turns), question if ended else f"{question}\n"
        if self.kind.sees:
            with naming("this question"):
                said, asked = marked(said, asked, pictures)
        example = Example("question", asked, target="-", answer="-", turns=said, pictures=tuple(pictures))
        (text,) = apply_template(self.template, [example], reader, self.system_prompt)
        return text if self.marks is None else unmarked(text, self.marks, self.given)
