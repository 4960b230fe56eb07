"""How a question of a user is written as the model read its training rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..adapters.methods import method_named
from ..config.schema import Config
from ..data import Example
from ..data.prompts import apply_template
from .arguments import OWN, family_of, reads_preferences
from .kinds import KINDS, kind_of


@dataclass(frozen=True)
class PromptFormat:
    """What is laid around a question.

    Args:
        template: a name in ``data.prompts.TEMPLATES``.
        system_prompt: for chat templates.
        line_break: whether a plain question ends its line, as the rows of ``data=custom`` do.
    """

    template: str = "plain"
    system_prompt: str | None = None
    line_break: bool = False

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
        # one's own rows, which may be gone, are not needed to talk
        own = OWN.get(config.data.family)
        family = None if own else family_of(config)
        if (KINDS[own.kind] if own else kind_of(family)).sees:
            raise ValueError(
                f"{where} reads pictures, and questions are texts here: use the adapter in Python"
            )
        if family is not None and not kind_of(family).generates:
            raise ValueError(f"{where} is a classifier ({family.name}), which generates no text")
        template = config.data.template or str(getattr(family, "template", "plain"))
        return cls(template, config.data.system_prompt, line_break=own is not None)

    def prompt(self, question: str, tokenizer: Any) -> Example:
        """Return an example whose prompt is what the model reads.

        Raises:
            ValueError: if the template is the tokenizer's, which has none or refuses the question.
        """
        ended = question.endswith("\n") or self.template != "plain" or not self.line_break
        example = Example("question", question if ended else f"{question}\n", target="-", answer="-")
        return next(iter(apply_template(self.template, [example], tokenizer, self.system_prompt)))
