"""Words that two marks single out in a prompt: the tokens that the positions ``given`` edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from .example import Example

Marks = tuple[str, str]  # before the words, and after them


def as_marks(marks: Sequence[str] | None) -> Marks | None:
    """Return the setting ``data.marks`` as two texts; None where there are none.

    Raises:
        ValueError: for anything else.
    """
    if marks is None:
        return None
    texts = [] if isinstance(marks, str) else list(marks)
    if len(texts) != 2 or len(set(texts)) != 2 or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(
            f"data.marks must be two different texts, before and after the words that are edited, such as "
            f"""'data.marks=["<<",">>"]'; got {marks!r}"""
        )
    before, after = texts
    return before, after


def without_marks(example: Example, marks: Marks) -> Example:
    """Return an example without the marks in all that the model reads: prompt, context and earlier turns."""
    turns = tuple((role, "".join(_pieces(text, marks)[::2])) for role, text in example.turns)
    prompt, context = ("".join(_pieces(text, marks)[::2]) for text in (example.prompt, example.context))
    return replace(example, prompt=prompt, context=context, turns=turns)


def _pieces(text: str, marks: Marks) -> list[str]:
    """Return what stands before, between and after marks, with the marks: each second one."""
    either = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    return re.split(f"({either})", text)


def unmarked(example: Example, marks: Marks, needed: bool) -> Example:
    """Return an example without the marks in its prompt; ``marked`` says where the words between them stand.

    The prompt with its marks is recorded: rows may differ in nothing else.

    Args:
        example: whose prompt is the text that the model reads.
        marks: before and after words.
        needed: whether a prompt without marks is an error; else all of them are only taken out.

    Raises:
        ValueError: for a mark without its other, or around nothing; names the row.
    """
    before, after = marks
    where = example.source or example.task
    text, spans, start = "", [], None
    for piece in _pieces(example.prompt, marks):
        if piece not in marks:
            text += piece
        elif (piece == before) != (start is None):
            raise ValueError(f"{where}: {piece!r} without {after if piece == before else before!r} before it")
        elif piece == before:
            start = len(text)
        elif not text[start:].strip():
            raise ValueError(f"{where}: nothing stands between {before!r} and {after!r}")
        else:
            spans.append((start, len(text)))
            start = None
    if start is not None:
        raise ValueError(f"{where}: {before!r} without {after!r} after it")
    if needed and not spans:
        raise ValueError(
            f"{where}: the prompt has no words between {before!r} and {after!r}, which the positions given edit"
        )
    recorded = {**example.recorded, "marked_prompt": example.prompt} if spans else example.recorded
    return replace(example, prompt=text, marked=tuple(spans) if needed else (), recorded=recorded)
