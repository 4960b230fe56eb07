"""From a custom row to an example: column names, texts with columns in braces, conversations."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..suggest import check_choice, did_you_mean
from .example import Example, Row, as_text, column, text_in
from .files import parse_json

TASK = "custom"
# Speakers, in both conversation formats.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


# How a row's answer may name one of its options, and the number of the first option.
ANSWER_FORMS = {"text": None, "letter": None, "index": 0, "number": 1}


@dataclass(frozen=True)
class Pattern:
    """A text with columns in braces, as (literal, column) pairs and the text after the last column.

    >>> Pattern.parse("{a} + {b} =", "data.prompt").fill({"a": 1, "b": 2})
    '1 + 2 ='
    """

    parts: tuple[tuple[str, str], ...]
    end: str = ""

    @classmethod
    def parse(cls, text: str, key: str) -> Pattern:
        r"""Parse a pattern; a text without braces is a column name.

        The two characters `\n`, which a shell passes through, mean a line break; `{{` is a literal brace.
        """
        if "{" not in text and "}" not in text:
            return cls((("", text),))
        try:
            fields = list(string.Formatter().parse(text.replace("\\n", "\n")))
        except ValueError as error:
            raise ValueError(
                f"{key}={text!r}: {error}; write column names in braces, and '{{{{' for a literal brace"
            ) from error
        parts, literal = [], ""
        for before, name, spec, kind in fields:
            literal += before  # an escaped brace is a separate piece, without a name
            if name is None:
                continue
            if not name or spec or kind:
                raise ValueError(f"{key}={text!r}: braces must contain a column name and nothing else")
            parts.append((literal, name))
            literal = ""
        if not parts:
            raise ValueError(f"{key}={text!r} names no column")
        return cls(tuple(parts), literal)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the column names."""
        return tuple(name for _, name in self.parts)

    def fill(self, row: Row) -> str:
        """Return the text of a row."""
        filled = (literal + text_of(column(row, name), name) for literal, name in self.parts)
        return "".join(filled) + self.end


def text_of(value: Any, name: str) -> str:
    """Return a cell as text: missing values (None, NaN) become the empty text, lists are joined with commas."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return as_text(value, name)
    if isinstance(value, Mapping):
        raise ValueError(f"column {name!r} must be text; got an object, {value!r:.80}")
    if isinstance(value, list | tuple):
        if any(isinstance(part, list | tuple) for part in value):
            raise ValueError(f"column {name!r} must be text; got a list of lists, {value!r:.80}")
        return ", ".join(text_of(part, name) for part in value)
    return str(value)


def json_list(text: str) -> list[Any] | None:
    """Parse a text as a JSON list, the form that lists have in CSV files; return None if it is anything else."""
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


class Columns:
    """Turn rows into examples by column names.

    Raises:
        ValueError: if the target has no place for `answer` or for the `options`.
    """

    def __init__(
        self,
        prompt: str,
        target: str,
        answer: str | None,
        context: str | None,
        options: str | Sequence[str] | None,
        answer_form: str,
        line_break: bool,
        source_prompt: str | None = None,
    ) -> None:
        self.prompt, self.target = Pattern.parse(prompt, "data.prompt"), Pattern.parse(target, "data.target")
        self.context = Pattern.parse(context, "data.context") if context else None
        self.source_prompt = Pattern.parse(source_prompt, "data.source_prompt") if source_prompt else None
        self.options: tuple[str, ...] = (options,) if isinstance(options, str) else tuple(options or ())
        self.answer_form, self.line_break = answer_form, line_break
        if not all(isinstance(name, str) for name in self.options):
            raise ValueError(f"data.options must be a column name or a list of column names; got {options!r}")
        check_choice("data.answer_form", answer_form, ANSWER_FORMS)
        if answer_form != "text" and not options:
            raise ValueError(f"data.answer_form={answer_form} refers to the options: set data.options")
        bare = self.target == Pattern((("", self.target.names[0]),))  # one column without text around it
        if answer and answer not in self.target.names:
            raise ValueError(
                f"data.answer={answer!r} is not in data.target={target!r}"
                f"{did_you_mean(answer, self.target.names)}: the target must contain the answer, as in "
                f"'The answer is {{{answer}}}', so that it can be found in generated texts"
            )
        if options and not answer and not bare:
            raise ValueError(
                f"data.options needs data.answer, the column of data.target={target!r} that the options replace"
            )
        self.answer = self.target.names[0] if bare else answer
        place = self.target.names.index(self.answer) if self.answer else 0
        ends = [*(literal for literal, _ in self.target.parts[1:]), self.target.end]
        # the text around the answer, used to find the answer in a generated text
        self.before, self.after = (
            (self.target.parts[place][0].strip(), ends[place].strip()) if self.answer else ("", "")
        )
        texts = filter(None, (self.prompt, self.target, self.context, self.source_prompt))
        self.names = (*(name for text in texts for name in text.names), *self.options)

    def __call__(self, row: Row) -> Example:
        """Return the example of a row; raise ValueError if a column is missing, or the prompt or answer is empty."""
        prompt = self.prompt.fill(row)
        if not any(text_of(row[name], name).strip() for name in self.prompt.names):
            raise ValueError(f"the row has no prompt: {_columns(self.prompt.names)} empty")
        for name in self.target.names:
            if not text_of(column(row, name), name).strip():
                raise ValueError(f"the row has no answer: {_columns((name,))} empty")
        options = self._options(row)
        if options and self.answer:
            row = {**row, self.answer: self._chosen(text_of(row[self.answer], self.answer), options)}
        target = self.target.fill(row).strip()
        answer = text_of(row[self.answer], self.answer).strip() if self.answer else target
        if self.find(target) != answer:
            raise ValueError(
                f"the answer {answer!r} cannot be separated from the rest of the target {target!r:.200}: the text "
                f"around {{{self.answer}}} in data.target must identify it"
            )
        context = self.context.fill(row) if self.context else ""
        source_prompt = self.source_prompt.fill(row) if self.source_prompt else ""
        if self.source_prompt and not source_prompt.strip():
            raise ValueError(f"the row has no source prompt: {_columns(self.source_prompt.names)} empty")
        if self.line_break and context:
            context = _ended(context)
        elif self.line_break:
            prompt, source_prompt = _ended(prompt), _ended(source_prompt)
        targets = (self.target.fill({**row, str(self.answer): word}).strip() for word in options if word)
        return Example(
            TASK, prompt, target, answer, tuple(targets), context=context, source_prompt=source_prompt
        )

    def find(self, text: str) -> str | None:
        """Return the part of a text in the answer's place in the target; None if the text around it is missing."""
        _, found, rest = text.partition(self.before) if self.before else ("", "here", text)
        if self.after and self.after in rest:
            rest = rest.rpartition(self.after)[0]
        return rest.strip() or None if found else None

    def _options(self, row: Row) -> list[str]:
        """Return the options of a row; an option is empty if its column is."""
        if len(self.options) != 1:
            return [text_of(column(row, name), name).strip() for name in self.options]
        (name,) = self.options
        cell = parts = column(row, name)
        if isinstance(cell, str):
            parts = json_list(cell) if cell.strip()[:1] == "[" else cell.split(",")
        if not isinstance(parts, list | tuple):
            raise ValueError(
                f"column {name!r} must be a list, a JSON list as text, or comma-separated text; got {cell!r:.80}"
            )
        return [text_of(part, name).strip() for part in parts]

    def _chosen(self, answer: str, options: Sequence[str]) -> str:
        """Return the option that the answer names."""
        answer = answer.strip()
        if self.answer_form == "text":
            place = options.index(answer) if answer in options else -1
        elif self.answer_form == "letter":
            letter = answer.strip("(). ").upper()
            place = string.ascii_uppercase.find(letter) if len(letter) == 1 else -1
        else:
            digits = answer.removesuffix(".0")  # tables with missing values write integers as floats
            place = int(digits) - ANSWER_FORMS[self.answer_form] if digits.isdecimal() else -1
        if not 0 <= place < len(options) or not options[place]:
            raise ValueError(
                f"the answer {answer!r}, read as data.answer_form={self.answer_form}, is not among the options "
                f"{', '.join(options)}; data.answer_form can be {', '.join(ANSWER_FORMS)}"
            )
        return options[place]


def _columns(names: Sequence[str]) -> str:
    listed = ", ".join(map(repr, names))
    return f"column {listed} is" if len(names) == 1 else f"columns {listed} are"


def _ended(text: str) -> str:
    return text if not text or text[-1].isspace() else text + "\n"


class Texts:
    """Turn rows into examples with a text and no prompt; the text is learnt as is."""

    def __init__(self, target: str) -> None:
        self.target = Pattern.parse(target, "data.target")
        self.names = self.target.names

    def __call__(self, row: Row) -> Example:
        """Return the example of a row; raise ValueError if a column is missing or the text is empty."""
        text = self.target.fill(row)
        if not any(text_of(row[name], name).strip() for name in self.names):
            raise ValueError(f"the row has no text: {_columns(self.names)} empty")
        return Example(TASK, "", text, text)


class Conversations:
    """Turn rows with a column of messages into examples."""

    def __init__(self, messages: str, line_break: bool = False) -> None:
        self.names = (messages,)
        self.line_break = line_break

    def __call__(self, row: Row) -> Example:
        """Return the example of a conversation, whose target is the last answer, after everything before it."""
        earlier, prompt, target = exchange_of(column(row, self.names[0]))
        for text, role in ((prompt, "the user's last"), (target, "the assistant's last")):
            if not text.strip():
                raise ValueError(f"{role} message is empty")
        prompt = _ended(prompt) if self.line_break else prompt
        return Example(TASK, prompt, target.strip(), target.strip(), turns=earlier)

    def find(self, text: str) -> str | None:
        """Return a text without surrounding white space; None if nothing is left."""
        return text.strip() or None


def exchange_of(messages: Any) -> tuple[tuple[tuple[str, str], ...], str, str]:
    """Return the earlier turns, the last question and the last answer of messages, as read by `turns_of`."""
    turns = turns_of(messages)
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        roles = ", ".join(role for role, _ in turns) or "nothing"
        raise ValueError(
            "the row has no answer: a conversation must end with a user message and the assistant's answer; "
            f"got {roles}"
        )
    *earlier, (_, prompt), (_, target) = turns
    return tuple(earlier), prompt, target


def turns_of(messages: Any) -> list[tuple[str, str]]:
    """Return (role, text) pairs of messages in either format; messages may also be JSON text, as in a CSV file.

    The content of a message may also be a list of parts in OpenAI's format, `[{"type": "text", "text": "..."}, ...]`.
    """
    if isinstance(messages, str):
        try:
            messages = parse_json(messages, "messages")
        except json.JSONDecodeError as error:
            raise ValueError(
                f"messages given as text must be JSON ({error.msg}); got {messages!r:.80}"
            ) from error
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"a conversation must be a list of messages; got {messages!r:.80}")
    turns = []
    for message in messages:
        who, what = ("from", "value") if "from" in message else ("role", "content")
        role, content = column(message, who), column(message, what)
        check_choice("the role of a message", role, ROLES)
        turns.append((ROLES[role], _content(content, what)))
    return turns


def _content(content: Any, name: str) -> str:
    if not isinstance(content, list | tuple):
        return as_text(content, name)
    for part in content:
        if column(part, "type") != "text":
            raise ValueError(f"a message's {name} must be text; got the part {part!r:.80}")
    return "".join(text_in(part, "text") for part in content)
