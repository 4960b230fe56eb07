r"""The accuracy of visual question answering, for questions on which people disagree.

.. math:: \mathrm{Acc}(a) = \frac{1}{n} \sum_{i=1}^{n} \min(c_i / 3, 1)

for the answers of n people (ten in VQA), where c_i people other than person i gave the answer a. An answer is fully
correct if three of the others gave it, and the mean is over all ways to leave one person out. With fewer than four
people, all others must have given it. Source: Antol et al. 2015, arXiv:1505.00468, and the evaluation page of
https://visualqa.org.

Answers are compared in lower case, without articles, sentence punctuation and apostrophes, and with number words as
digits. The official script does this only if people disagree, and uses a table of contractions instead of removing
apostrophes on both sides; both remove commas between digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ENOUGH = 3  # people with the same answer
ARTICLES = ("a", "an", "the")
NUMBERS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(max(i - 1, 0)) for i, word in enumerate(NUMBERS)}
_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d)")
_POINT = re.compile(r"\.(?!\d)")  # not a decimal point; .5 has one too
_APOSTROPHES = re.compile("['\u2019`]")
_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-><@,?!:]""")


def comparable(answer: str) -> str:
    """Return an answer in normalised form, for comparison.

    >>> comparable("The two dogs.")
    '2 dogs'
    >>> comparable("it's 1,000.5")
    'its 1000.5'
    """
    text = _BETWEEN_DIGITS.sub("", answer.lower())
    text = _PUNCTUATION.sub(" ", _APOSTROPHES.sub("", _POINT.sub("", text)))
    return " ".join(DIGITS.get(word, word) for word in text.split() if word not in ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the accuracy of an answer, 0..1, given the answers of people.

    >>> vqa_accuracy("Red.", ["red"] * 3 + ["pink"] * 7)
    0.9
    >>> vqa_accuracy("2", ["2", "2"])
    1.0
    """
    if not people:
        raise ValueError("VQA accuracy needs the answer of at least one person")
    given = comparable(answer)
    same = [comparable(person) == given for person in people]
    others = (sum(same) - own for own in same)
    enough = max(min(ENOUGH, len(same) - 1), 1)  # all others, if there are fewer
    return sum(min(count / enough, 1.0) for count in others) / len(same)
