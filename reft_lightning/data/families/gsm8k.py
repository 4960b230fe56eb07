r"""GSM8K on its own, in LoftQ's template: the task on which the paper's commonsense and arithmetic settings were tuned.

Rows: https://github.com/openai/grade-school-math (MIT), `grade_school_math/data/{train,test}.jsonl`, 7,473 and 1,319::

    {"question": "Natalia sold clips to 48 of her friends ...",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n...\n#### 72"}

The model reads the question, a newline, LoftQ's sentence and a newline. It learns the answer as is, including the
calculator annotations, with "####" replaced by "The final answer is: " (so two blanks precede the number, as in the
authors' code). Template, split and scorer:
https://github.com/stanfordnlp/pyreft/blob/dafd0995a366/examples/loreft/dataset.py

The validation set is the last 300 train rows. The authors' code first limits the train set and then takes the last 300
of the remaining rows, so both of its sets change with the limit; here the split comes first.

`data.template=chat data.system_prompt="You are a helpful assistant."` applies a chat template to the same prompt. The
authors' special case for Llama-3-8B-Instruct differs: it asks the bare question and leaves "####" in the target.

Score: whether the last number of the text is within 1e-3 of the gold number, as in the arithmetic family.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..example import Example, Row, exact_match, text_in
from ..family import Family, Task
from ..rows import HubRows, any_of
from ..splits import Carved
from .arithmetic import split_gsm8k
from .extraction import equals, last_number

log = logging.getLogger(__name__)

REQUEST = "Answer the above question. First think step by step and then answer the final number."
FINAL = "The final answer is: "


def example(row: Row) -> Example:
    r"""Return the example of {question, answer: "rationale\n#### number"}."""
    _, number = split_gsm8k(row)
    prompt = f"{text_in(row, 'question')}\n{REQUEST}\n"
    target = text_in(row, "answer").replace("####", FINAL)
    return Example("gsm8k", prompt, target, number)


def carve_last(examples: Sequence[Example], size: int, seed: int = 0, stratum: Any = None) -> Carved:
    """Use the last `size` rows for validation and remove repetitions of their prompts from train; nothing is random."""
    if not 0 <= size < len(examples):
        raise ValueError(
            f"data.validation_size must be in 0..{len(examples) - 1} with {len(examples)} train rows; got {size}"
        )
    cut = len(examples) - size
    validation = list(examples[cut:])
    held_out = {row.prompt for row in validation}
    train = [row for row in examples[:cut] if row.prompt not in held_out]
    if len(train) < cut:
        log.info("%d train rows repeat a validation prompt and were removed from training", cut - len(train))
    return train, validation


TASKS = {
    "gsm8k": Task(
        "gsm8k",
        example,
        hub=HubRows.splits("openai/gsm8k", "main"),
        local={split: any_of(f"gsm8k/{split}.jsonl", f"{split}.jsonl") for split in ("train", "test")},
    )
}

FAMILY = Family(
    name="gsm8k",
    version=1,
    tasks=TASKS,
    score=exact_match(last_number, equals),
    literal=False,
    max_new_tokens=256,  # pyreft, examples/loreft/task_config.py, after LoftQ
    carve=carve_last,
)
