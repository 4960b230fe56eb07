"""Questions about passages: how a prompt holds both, and validation rows that are whole passages.

A passage has many questions (QuAIL 18, SQuAD about 5). Rows held out question by question would leave nearly every
validation passage among the train rows, read and answered there, so that the validation score is too good.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from ..example import Example
from ..splits import Carved, Stratum, by_task, distinct

_BEFORE, _REQUEST = "Passage: ", "\n\nPlease "


def prompt_about(passage: str, request: str, question: str) -> str:
    r"""Return the passage and, after it, the request that ends in the question, both stripped.

    >>> prompt_about("It rained.", "answer the question: ", "What did it do?")
    'Passage: It rained.\n\nPlease answer the question: What did it do?'
    """
    for text, what in ((passage, "passage"), (question, "question")):
        if not text.strip():
            raise ValueError(f"the {what} is empty")
    return f"{_BEFORE}{passage.strip()}{_REQUEST}{request}{question.strip()}"


def passage_of(example: Example) -> str:
    r"""Return the passage of a prompt that `prompt_about` began.

    Of a passage that holds "\n\nPlease " itself it is the beginning: still the same for all of its questions.
    """
    return example.prompt.partition(_REQUEST)[0].removeprefix(_BEFORE)


def carve_passages(examples: Sequence[Example], size: int, seed: int, stratum: Stratum = by_task) -> Carved:
    """Take whole passages out of the train rows, as many as it takes to hold out `size` questions.

    Arguments and result are those of `carve_validation`; the stratum of a passage is its first row's. No passage is in
    both parts, no validation prompt occurs twice.

    Passages are drawn in random order, each from the stratum that is furthest behind its share of the rows, until
    `size` is reached; the last one stays whole, so there may be more rows than `size`, by less than one passage.
    The choice depends only on `seed` and the rows.
    """
    if size < 0:
        raise ValueError(f"data.validation_size must be 0 or more; got {size}")
    if size == 0:
        return list(examples), []
    first = distinct(examples)
    questions = Counter(map(passage_of, first))
    owner: dict[str, Hashable] = {}
    for example in first:
        owner.setdefault(passage_of(example), stratum(example))
    waiting: dict[Hashable, list[str]] = defaultdict(list)
    behind: dict[Hashable, float] = defaultdict(float)  # how many rows a stratum's share still lacks
    for passage, key in owner.items():
        waiting[key].append(passage)
        behind[key] += size * questions[passage] / len(first)
    rng = random.Random(seed)
    for passages in waiting.values():
        rng.shuffle(passages)
    held_out: set[str] = set()
    lacking = size
    while lacking > 0 and len(held_out) < len(questions):
        key = max((key for key, passages in waiting.items() if passages), key=behind.__getitem__)
        passage = waiting[key].pop()
        held_out.add(passage)
        behind[key] -= questions[passage]
        lacking -= questions[passage]
    if len(held_out) == len(questions):
        raise ValueError(
            f"data.validation_size={size} needs all {len(questions)} passages of the {len(first)} distinct train rows, "
            "as passages are held out whole: choose a smaller one"
        )
    train = [example for example in examples if passage_of(example) not in held_out]
    return train, [example for example in first if passage_of(example) in held_out]
