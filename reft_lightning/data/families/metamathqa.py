r"""MetaMathQA for training, GSM8K for scoring: the data of PEFT's method comparison.

The protocol is that of https://github.com/huggingface/peft at 5d602fdbff04, `method_comparison/MetaMathQA`
(Apache-2.0; only facts are used, no code). Train rows: MetaMathQA (Yu et al. 2023, arXiv:2309.12284; MIT), 395,000
answers of a language model to rewritten questions from GSM8K and MATH::

    {"type": "GSM_Rephrased", "query": "What is ...?", "original_question": "...",
     "response": "We add ...\n#### 12\nThe answer is: 12"}

Validation and test rows: GSM8K, as in :mod:`.gsm8k`. The prompt contains the question and ends in "Answer:"; the model
learns or generates the text after it.

- Train: rows whose question and response have at most 1,300 characters together, including a blank between them. Rows
  of GSM8K train are not used for training.
- Validation: the first 50 GSM8K train rows in the order of numpy's legacy shuffle seeded with `data.split_seed` (0
  in the protocol). MetaMathQA was made from GSM8K train, so its rows repeat many of these questions. As in the
  protocol, they are kept, and their number is logged. Validation scores are therefore high; test questions occur in
  neither.
- Test: all 1,319 rows of GSM8K test.

There are two differences from the protocol. Its loss covers question and response, whereas ours covers the response
(and the end of the text). It reads the first 20,000 rows in 5,000 steps of 4, in buckets of 80; here rows are drawn.

Scores of the text generated after the prompt (in the protocol, of prompt and text together):

- `accuracy`, as published. The answer is what follows the last "The answer is: ", or else "The answer is ", "The final
  answer is: ", "The final answer is ", "#### ", up to the end of the line, without blanks and . ! ? $ % at its ends.
  Numbers and fractions ("20/14") are compared as floating-point numbers, everything else as text: "2,125" is not a
  number, so a gold answer with a comma must be matched with the comma.
- `last_number_accuracy`: whether the last number of the text, without commas, is within 1e-3 of the gold number, as in
  the gsm8k family.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from ..example import Example, Judgement, Row, normalized, text_in
from ..family import Family, Task
from ..rows import HubRows, any_of
from ..splits import Carved
from . import gsm8k as original
from .extraction import equals, last_number

log = logging.getLogger(__name__)

QUESTION, ANSWER = "Question: ", " Think step by step.\nAnswer:"
MOST_CHARACTERS = 1300  # in question, blank and response
TRIGGERS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def prompt(question: str) -> str:
    """Return what the model reads."""
    return f"{QUESTION}{question}{ANSWER}"


def metamath(row: Row) -> Example:
    """Return the example of {query, response}; the answer may be empty, because train rows are not scored."""
    query, response = text_in(row, "query"), text_in(row, "response")
    return Example("metamathqa", prompt(query), response, stated(response) or "")


def gsm8k(row: Row) -> Example:
    """Return the example of GSM8K's {question, answer with ####}, with the answer as is."""
    answer = text_in(row, "answer")
    gold = stated(answer)
    if gold is None:
        raise ValueError(f"the answer has no '#### ' before its number: {answer!r:.80}")
    return Example("gsm8k", prompt(text_in(row, "question")), answer, gold)


def stated(text: str) -> str | None:
    """Return the answer that a text states, as published.

    >>> stated("1 + 1 is 2. The answer is: $2$.")
    '2'
    >>> stated("It is 2.") is None
    True
    """
    text = text.strip().rstrip(".!?")
    for trigger in TRIGGERS:
        _, found, answer = text.rpartition(trigger)
        if found:
            return answer.strip().partition("\n")[0].strip(" .!?$%")
    return None


def number(text: str) -> float | None:
    """Return the value of a decimal number or a fraction; None for any other text.

    >>> number("3/4"), number("1,000"), number("7/0")
    (0.75, None, None)
    """
    try:
        parts = [Decimal(part.strip()) for part in text.split("/")]
        if len(parts) > 2 or (len(parts) == 2 and parts[1] == 0):
            return None
        return float(parts[0] if len(parts) == 1 else parts[0] / parts[1])
    except (ArithmeticError, ValueError):  # not a number, out of range, or a signalling NaN
        return None


def score(texts: Sequence[str], example: Example) -> Judgement:
    """Score generated texts by their stated answer, and by their last number."""
    answers = [stated(text) for text in texts]
    right = sum(_same(answer, example.answer) for answer in answers) / len(texts)
    gold = last_number(example.answer)
    lenient = sum(gold is not None and equals(last_number(text), gold) for text in texts) / len(texts)
    return Judgement(answers[0], {"accuracy": right, "last_number_accuracy": lenient})


def _same(answer: str | None, gold: str) -> bool:
    if answer is None:
        return False
    values = number(answer), number(gold)
    return answer == gold if values == (None, None) else values[0] == values[1]


def carve(examples: Sequence[Example], size: int, seed: int, stratum: Any = None) -> Carved:
    """Use `size` GSM8K rows for validation, and train on the MetaMathQA rows that are short enough."""
    theirs = [example for example in examples if example.task == "gsm8k"]
    if not 0 <= size <= len(theirs):
        raise ValueError(
            f"data.validation_size must be in 0..{len(theirs)}, the number of GSM8K train rows; got {size}. Validation "
            "needs both tasks: data.train_tasks=[metamathqa,gsm8k]"
        )
    ours = [example for example in examples if example.task == "metamathqa"]
    frame = len(QUESTION) + len(ANSWER) - 1  # the blank between question and response counts
    train = [e for e in ours if len(e.prompt) - frame + len(e.target) <= MOST_CHARACTERS]
    if not train:
        raise ValueError(
            f"none of the {len(ours)} MetaMathQA rows has at most {MOST_CHARACTERS} characters; data.train_tasks must "
            "include metamathqa"
        )
    order = np.random.RandomState(seed).permutation(len(theirs))  # the legacy generator never changes
    validation = [theirs[i] for i in order[:size]]
    asked = {normalized(example.prompt) for example in validation}
    again = sum(normalized(example.prompt) in asked for example in train)
    log.info(
        "skipped %d of %d MetaMathQA rows with more than %d characters; %d train rows repeat a validation question "
        "and are kept", len(ours) - len(train), len(ours), MOST_CHARACTERS, again,
    )  # fmt: skip
    return train, validation


TASKS = {
    "metamathqa": Task(
        "metamathqa",
        metamath,
        hub={"train": (HubRows("meta-math/MetaMathQA"),)},
        local={"train": any_of("MetaMathQA-395K.json", "metamathqa/train.json")},
    ),
    "gsm8k": Task("gsm8k", gsm8k, hub=original.TASKS["gsm8k"].hub, local=original.TASKS["gsm8k"].local),
}

FAMILY = Family(
    name="metamathqa",
    version=1,
    tasks=TASKS,
    score=score,
    measures=("accuracy", "last_number_accuracy"),
    literal=False,
    max_new_tokens=300,
    carve=carve,
)
