"""Questions about passages: prompts with both, and validation rows that are whole passages.

A passage has many questions (QuAIL 18, SQuAD about 5). If questions were held out individually, nearly every validation
passage would also be read and answered in training, and the validation score would be too high.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from ..example import Example
from ..splits import Carved, Stratum, by_task, distinct

_BEFORE, _REQUEST = "Passage: ", "\n\nPlease "


def prompt_about(passage: str, request: str, question: str) -> str:
    r"""Return the passage followed by the request and the question, both stripped.

    >>> prompt_about("It rained.", "answer the question: ", "What did it do?")
    'Passage: It rained.\n\nPlease answer the question: What did it do?'
    """
    for text, what in ((passage, "passage"), (question, "question")):
        if not text.strip():
            raise ValueError(f"the {what} is empty")
    return f"{_BEFORE}{passage.strip()}{_REQUEST}{request}{question.strip()}"


def passage_of(example: Example) -> str:
    r"""Return the passage of a prompt made by `prompt_about`.

    If the passage itself contains "\n\nPlease ", only its beginning is returned, which is the same for all its
    questions.
    """
    return example.prompt.partition(_REQUEST)[0].removeprefix(_BEFORE)


def carve_passages(examples: Sequence[Example], size: int, seed: int, stratum: Stratum = by_task) -> Carved:
    """Hold out whole passages from the train rows, as many as are needed for `size` questions.

    Arguments and result are those of `carve_validation`; the stratum of a passage is that of its first row. No passage
    is in both parts, and no validation prompt occurs twice.

    Passages are drawn in random order, each from the stratum that is furthest behind its share of the rows, until
    `size` is reached. The last passage is kept whole, so the number of rows can exceed `size` by less than one passage.
    The choice depends only on `seed` and the rows.
    """
    if size < 0:
        raise ValueError(f"data.validation_size must be at least 0; got {size}")
    if size == 0:
        return list(examples), []
    first = distinct(examples)
    questions = Counter(map(passage_of, first))
    owner: dict[str, Hashable] = {}
    for example in first:
        owner.setdefault(passage_of(example), stratum(example))
    waiting: dict[Hashable, list[str]] = defaultdict(list)
    shortfall: dict[Hashable, float] = defaultdict(float)  # how many rows a stratum's share still lacks
    for passage, key in owner.items():
        waiting[key].append(passage)
        shortfall[key] += size * questions[passage] / len(first)
    rng = random.Random(seed)
    for passages in waiting.values():
        rng.shuffle(passages)
    held_out: set[str] = set()
    lacking = size
    while lacking > 0 and len(held_out) < len(questions):
        key = max((key for key, passages in waiting.items() if passages), key=shortfall.__getitem__)
        passage = waiting[key].pop()
        held_out.add(passage)
        shortfall[key] -= questions[passage]
        lacking -= questions[passage]
    if len(held_out) == len(questions):
        raise ValueError(
            f"data.validation_size={size} needs all {len(questions)} passages of the {len(first)} distinct train rows, "
            "because passages are held out whole; choose a smaller value"
        )
    train = [example for example in examples if passage_of(example) not in held_out]
    return train, [example for example in first if passage_of(example) in held_out]
