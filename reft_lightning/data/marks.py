"""Marked words in a prompt, whose tokens the positions ``given`` edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from .example import Example

Marks = tuple[str, str]  # before and after the words


def as_marks(marks: Sequence[str] | None) -> Marks | None:
    """Return the setting ``data.marks`` as two texts, or None if it is not set.

    Raises:
        ValueError: if it is anything but two different texts.
    """
    if marks is None:
        return None
    texts = [] if isinstance(marks, str) else list(marks)
    if len(texts) != 2 or len(set(texts)) != 2 or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(
            f"data.marks must be two different texts, one before and one after the words to edit, such as "
            f"""'data.marks=["<<",">>"]'; got {marks!r}"""
        )
    before, after = texts
    return before, after


def without_marks(example: Example, marks: Marks) -> Example:
    """Return an example with the marks removed from everything the model reads: prompt, context and earlier turns."""
    prompt, context = (_either(marks).sub("", text) for text in (example.prompt, example.context))
    turns = tuple((role, _either(marks).sub("", text)) for role, text in example.turns)
    return replace(example, prompt=prompt, context=context, turns=turns)


def _either(marks: Marks) -> re.Pattern[str]:
    """Return a pattern that matches both marks, the longer one first."""
    return re.compile("(" + "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) + ")")


def unmarked(example: Example, marks: Marks, needed: bool) -> Example:
    """Return an example with the marks removed from its prompt, and the spans between them as ``marked``.

    The prompt with its marks is recorded, because rows may differ in their marks only.

    If words are `needed`, a prompt without marks is an error; otherwise marks are removed without noting the spans.

    Raises:
        ValueError: for an unmatched mark, or marks without words between them; names the row.
    """
    before, after = marks
    where = example.source or example.task
    text, spans, start = "", [], None
    for piece in _either(marks).split(example.prompt):  # every second piece is a mark
        if piece not in marks:
            text += piece
        elif (piece == before) != (start is None):
            raise ValueError(f"{where}: {piece!r} without {after if piece == before else before!r} before it")
        elif piece == before:
            start = len(text)
        elif not text[start:].strip():
            raise ValueError(f"{where}: there is nothing between {before!r} and {after!r}")
        else:
            spans.append((start, len(text)))
            start = None
    if start is not None:
        raise ValueError(f"{where}: {before!r} without {after!r} after it")
    if needed and not spans:
        raise ValueError(
            f"{where}: the prompt has no words between {before!r} and {after!r} for the positions `given` to edit"
        )
    recorded = {**example.recorded, "marked_prompt": example.prompt} if spans else example.recorded
    return replace(example, prompt=text, marked=tuple(spans) if needed else (), recorded=recorded)
