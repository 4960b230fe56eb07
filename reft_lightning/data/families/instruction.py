r"""Instruction tuning: learn to follow instructions, answer those of AlpacaEval, and let a judge compare the answers.

There are no correct answers here, so the family has no score: runs log the validation loss and sample generations, and
the outputs for the 805 AlpacaEval instructions go to a judge (`reft-judge`).

A row of Alpaca, Dolly and UltraFeedback in the paper authors' format::

    {"instruction": "Rewrite the sentence.", "input": "He went.", "output": "He left."}

Other formats: Dolly's own columns {instruction, context, response}, preference pairs {prompt, chosen, rejected} (text
or messages; the chosen answer is learnt, the rejected one is for pairwise objectives), conversations {messages}, and
Self-Instruct's {instruction, instances}.

| task | rows | licence |
|---|---|---|
| alpaca | train: yahma/alpaca-cleaned (Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca) | CC BY-NC 4.0 |
| ultrafeedback | train: frankaging/ultrafeedback-dataset, the paper's (arXiv:2404.03592, app. C) | MIT |
| ultrafeedback_binarized | train: argilla/ultrafeedback-binarized-preferences-cleaned, the source of those | MIT |
| dolly | train: databricks/databricks-dolly-15k | CC BY-SA 3.0 |
| self_instruct | train: 175 seed tasks; test: 252 user-oriented ones (yizhongw/self-instruct) | Apache-2.0 |
| alpaca_eval | test: 805 instructions, https://github.com/tatsu-lab/alpaca_eval | CC BY-NC 4.0 |

The answers in AlpacaEval are those of a reference model (text_davinci_003 in AlpacaEval 1); they are the targets of the
test loss, and the judge compares against them. Two of them are empty in the published file and are replaced by
`NO_ANSWER`.

Train rows with an empty output are skipped and counted in `data_versions`; Stanford's own alpaca_data.json has 28
(https://github.com/tatsu-lab/stanford_alpaca/issues/265).

The paper's prompts, decoding and judge: `prompts.alpaca`, conf/decoding/instruction_paper.yaml, GPT-4 against
text_davinci_003 (https://github.com/stanfordnlp/pyreft/tree/dafd0995a366/examples/loreft).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from ..columns import exchange_of
from ..example import Example, Row, as_text, column, list_in
from ..family import Family, Prediction, Task
from ..rows import HubRows, LocalRows, any_of, by_name

NO_ANSWER = "(no answer)"
AUTHORS_1K = "the 1,000 rows that the paper's authors ship."


def _instruction(task: str, row: Row) -> Example:
    """Return the example of {instruction, input or context, output or response}; input and context are optional."""
    context = row.get("input", row.get("context"))
    output = row["response"] if "response" in row else column(row, "output")
    return _example(task, column(row, "instruction"), output, context)


def _instances(task: str, row: Row) -> Example:
    """Return the example of the first instance in Self-Instruct's {instruction, instances: [{input, output}, ...]}."""
    instances = list_in(row, "instances")
    if not instances:
        raise ValueError("instances is empty")
    first = instances[0]
    output = column(first, "output")
    return _example(task, column(row, "instruction"), output, first.get("input"))


def _chosen(task: str, row: Row) -> Example:
    """Return the example of a preference pair {prompt, chosen, rejected}; the chosen answer is learnt."""
    chosen, other = row["chosen"], row.get("rejected")
    as_is = isinstance(chosen, str)
    example = _example(task, column(row, "prompt"), chosen) if as_is else _conversation(task, chosen)
    if not other:  # without a rejected answer, only the chosen one is learnt
        return example
    other = as_text(other, "rejected") if isinstance(other, str) else exchange_of(other)[2]
    return replace(example, options=(example.target, other))


def _conversation(task: str, messages: Any) -> Example:
    """Return the example of messages {role, content}; the last answer is learnt, everything before it is read."""
    turns, prompt, answer = exchange_of(messages)
    return _example(task, prompt, answer, turns=turns)


def _example(
    task: str,
    instruction: str,
    output: str,
    context: str | None = None,
    turns: tuple[tuple[str, str], ...] = (),
) -> Example:
    context = "" if context is None else context
    parts = {"instruction": instruction, "output": output, "input or context": context}
    instruction, output, context = (as_text(value, name) for name, value in parts.items())
    context = context if context.strip() else ""
    return Example(task, instruction, output, output, context=context, turns=turns)


def example_of(task: str, row: Row) -> Example:
    """Return the example of a row in any of the formats described above."""
    if "messages" in row:
        return _conversation(task, row["messages"])
    if "chosen" in row:
        return _chosen(task, row)
    if "instances" in row:
        return _instances(task, row)
    return _instruction(task, row)


def alpaca_eval_example(row: Row) -> Example:
    """Return the example of {instruction, output, generator, dataset}; the output is the reference model's."""
    output = column(row, "output")
    return _example("alpaca_eval", column(row, "instruction"), output or NO_ANSWER)


def _for_a_judge(example: Callable[[Row], Example]) -> Callable[[Row], Example]:
    """Also record the instruction without a template, and the dataset that it comes from."""

    def recorded(row: Row) -> Example:
        made = example(row)
        instruction = f"{made.prompt}\n\n{made.context}" if made.context else made.prompt
        dataset = row.get("dataset", made.task)
        return replace(made, recorded={"instruction": instruction, "dataset": dataset})

    return recorded


def alpaca_eval_outputs(predictions: Iterable[Prediction], generator: str) -> list[dict[str, str]]:
    """Return generated texts in AlpacaEval's format: [{instruction, output, generator, dataset}, ...].

    Args:
        predictions: {source, instruction, dataset, generated} of each row; the result is ordered by source.
        generator: the model name.
    """
    outputs = []
    for row in sorted(predictions, key=lambda row: _with_numbers(row["source"])):
        if not isinstance(row["generated"], str):
            raise ValueError(
                f"{row['source']}: a judge reads one output per instruction; got {len(row['generated'])} samples: set "
                "decoding.samples=1"
            )
        outputs.append(
            {
                "instruction": row["instruction"],
                "output": row["generated"].strip(),
                "generator": generator,
                "dataset": row["dataset"],
            }
        )
    return outputs


def _with_numbers(source: str) -> list[str | int]:  # sorts row 10 after row 9
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", source)]


def _train(hub: str, *layouts: LocalRows) -> dict[str, Any]:
    return {"hub": {"train": (HubRows(hub),)}, "local": {"train": layouts}}


TASKS = by_name(
    Task(
        "alpaca",
        partial(example_of, "alpaca"),
        **_train(
            "yahma/alpaca-cleaned",
            *any_of("alpaca/train.json", "alpaca/alpaca_data_cleaned.json", "alpaca/alpaca_data.json"),
            LocalRows(("alpaca/train_2k_subset.json",), note="2,000 of the 52,002 rows of Stanford Alpaca."),
            LocalRows(
                ("alpaca/alpaca_en_demo.json",), note="999 rows in Alpaca's format, with longer outputs."
            ),
        ),
    ),
    Task(
        "ultrafeedback",
        partial(example_of, "ultrafeedback"),
        **_train(
            "frankaging/ultrafeedback-dataset",
            LocalRows(("ultrafeedback/train.json",)),
            LocalRows(("ultrafeedback/ultrafeedback_1k.json",), note=AUTHORS_1K),
            LocalRows(("ultrafeedback/ultrafeedback_1k.jsonl",), note=AUTHORS_1K),
        ),
    ),
    Task(
        "ultrafeedback_binarized",
        partial(example_of, "ultrafeedback_binarized"),
        **_train(
            "argilla/ultrafeedback-binarized-preferences-cleaned",
            *any_of("ultrafeedback_binarized/train.json", "ultrafeedback_binarized/train.jsonl"),
        ),
    ),
    Task(
        "dolly",
        partial(example_of, "dolly"),
        **_train(
            "databricks/databricks-dolly-15k",
            *any_of("dolly/databricks-dolly-15k.jsonl", "dolly/train.json"),
            LocalRows(("dolly/train_2k_subset.json",), note="2,000 of the 15,011 rows of Dolly."),
        ),
    ),
    Task(
        "self_instruct",
        _for_a_judge(partial(example_of, "self_instruct")),
        local={
            "train": any_of("self_instruct/seed_tasks.jsonl"),
            "test": any_of("self_instruct/user_oriented_instructions.jsonl"),
        },
    ),
    Task(
        "alpaca_eval",
        _for_a_judge(alpaca_eval_example),
        # the branch's folder is called eval, which datasets treats as a test split
        hub={"test": (HubRows("tatsu-lab/alpaca_eval", split="test", file="alpaca_eval.json"),)},
        local={
            "test": any_of("alpaca_eval/alpaca_eval.json", "alpaca_eval/text_davinci_003.model_outputs.json")
        },
    ),
)

FAMILY = Family(
    name="instruction",
    version=1,
    tasks=TASKS,
    score=None,
    skip_empty=True,
    literal=False,
    template="alpaca",
    export=alpaca_eval_outputs,
    max_new_tokens=1024,  # AlpacaEval's reference outputs have 300 (davinci) to 2,000 (GPT-4) characters on average
)
