"""The answer in a chain of thought: the last number, the first capital A to E, or the stated letter.

Pure functions of a text, shared by the arithmetic families; `arithmetic.py` lists what each rule gets wrong.
"""

from __future__ import annotations

import math
import re

TOLERANCE = 1e-3  # pyreft, examples/loreft/compute_metrics.py
LETTERS = ("A", "B", "C", "D", "E")
_NUMBER = re.compile(r"-?\d+\.?\d*")
# "answer is (B)", "Answer: B.", "the correct option is: **B**"; a bare letter must end there: not "answer is A train"
_STATED = re.compile(
    r"(?i:\b(?:answer|correct\s+(?:option|choice))(?:\s+(?:choice|option))?[\s:=*-]*(?:\bis\b|\bwould\s+be\b)?[\s:*-]*"
    r"(?:(?:option|choice)\s+)?)(?:\(([A-E])\)|([A-E])(?=\)|[.,;:!*]|\s*\n|\s*$))"
)
_CLOSING = re.compile(r"\(([A-E])\)\W*$|^\W*([A-E])\W*$")


def last_number(text: str) -> str | None:
    """Return the last number of a text as published: without thousands commas, with its minus sign.

    Source: pyreft, `extract_answer_number`, after LLM-Adapters' evaluate.py.

    >>> last_number("4 of them cost $1,234.")
    '1234'
    >>> last_number("none") is None
    True
    """
    found = _NUMBER.findall(text.replace(",", ""))
    return found[-1].removesuffix(".") if found else None


def first_letter(text: str) -> str | None:
    """Return the first capital A to E anywhere in a text, as published.

    Source: pyreft, `extract_answer_letter`, after LLM-Adapters' evaluate.py.

    >>> first_letter("The answer is (B).")
    'B'
    >>> first_letter("Every train. The answer is (B).")
    'E'
    """
    found = re.search("[A-E]", text)
    return found.group() if found else None


def stated_letter(text: str) -> str | None:
    """Return the letter that a text states as its answer; the last one if there are several.

    >>> stated_letter("Every train. The answer is (B).")
    'B'
    >>> stated_letter("The answer is A train") is None
    True
    """
    found = _STATED.findall(text) or _CLOSING.findall(text.strip())
    return "".join(found[-1]) if found else None


def is_number(text: str) -> bool:
    """Return whether a gold answer is a finite number; nan and inf do not count, because no text can equal them."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def equals(found: str | None, gold: str) -> bool:
    """Return whether a number was found and is within 1e-3 of the gold number."""
    return found is not None and abs(float(gold) - float(found)) <= TOLERANCE
