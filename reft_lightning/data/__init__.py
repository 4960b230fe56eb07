"""Benchmark families, tokens and batches: rows -> prompt | target -> batches."""

from .example import Example, Judgement
from .families import FAMILIES, AnyFamily, get_family
from .family import Family, Task
from .labelled import ClassificationFamily

__all__ = [
    "FAMILIES",
    "AnyFamily",
    "ClassificationFamily",
    "Example",
    "Family",
    "Judgement",
    "Task",
    "get_family",
]
