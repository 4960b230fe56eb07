r"""Code: HumanEval and MBPP, with completion prompts, scored by running the programs.

HumanEval (Chen et al. 2021, arXiv:2107.03374; https://github.com/openai/human-eval, MIT): 164 problems, test only.
The prompt is the row's as is, with imports, signature and docstring; the model writes the body::

    {"task_id": "HumanEval/7", "entry_point": "double", "prompt": "def double(x):\n    \"\"\" Twice x. \"\"\"\n",
     "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(2) == 4\n"}

The text is cut at the first of the published stop sequences; the program is prompt + text + test +
`check(entry_point)`: https://github.com/openai/human-eval/blob/master/human_eval/execution.py.

MBPP (Austin et al. 2021, arXiv:2108.07732; https://github.com/google-research/google-research/tree/master/mbpp,
CC BY 4.0): rows 11-510 are test, 511-600 validation, 601-974 train; `mbpp_sanitized` is its hand-verified subset::

    {"task_id": 601, "text": "Write a function to double a number.", "code": "def double(x):\r\n  return 2 * x",
     "test_setup_code": "", "test_list": ["assert double(2) == 4", ...], "challenge_test_list": []}

The prompt is the published one without the authors' three solved examples; [BEGIN] and [DONE] delimit the code, each on
a line of its own here. The code is learnt with "\n" instead of "\r\n". As published, only `test_list` decides, not
`challenge_test_list`.

| task | train rows | test rows |
|---|---|---|
| humaneval | none: set `train_tasks` | 164 |
| mbpp | 374 | 500 |
| mbpp_validation (to choose settings without the test rows) | 374 | 90 |
| mbpp_sanitized | 120 | 257 |

Differences from the published scorer, for every task: the time limit is 3 s of processor time instead of wall-clock
time, and programs have access only to the standard library, in a fresh interpreter without threads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from ..example import Example, Judgement, Row, column, text_in, texts_in
from ..family import Family, Task
from ..rows import HubRows, any_of, by_name

KS = (1, 10, 100)  # Chen et al. 2021; values above the number of samples are skipped
DONE = "[DONE]"
# Chen et al. 2021, section 3.2: beginnings of lines that follow the function's body
AFTER_BODY = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP = "google-research-datasets/mbpp"
# first and last task_id of each split; 1-10 are for the prompt
TEST, VALIDATION, TRAIN = (11, 510), (511, 600), (601, 974)


def cut(text: str, stop_strings: Sequence[str]) -> str:
    r"""Return the text up to the first of the stop strings.

    >>> cut("    return 1\n\ndef g():", ("\nclass", "\ndef"))
    '    return 1\n'
    """
    return text[: min((text.find(stop) for stop in stop_strings if stop in text), default=len(text))]


def _answer(before: str, after: str) -> str:
    """Return as JSON the code before and after a completion that makes it a program with tests."""
    return json.dumps({"before": before, "after": after}, ensure_ascii=False)


def program(text: str, example: Example) -> str:
    """Return the program of one generated text: the code before it, the text up to a stop string, and the tests."""
    parts = json.loads(example.answer)
    return parts["before"] + cut(text, TASKS[example.task].stop_strings) + "\n" + parts["after"]


def score(texts: Sequence[str], example: Example) -> Judgement:
    """Run the programs of all texts and estimate pass@k for each k of `KS` up to their number.

    The answer is the code of the first text; if it is blank, None, which counts as missing.
    """
    # imported here because it takes a second, and no other family needs it
    from ...evaluation import pass_at_k, run_programs

    outcomes = run_programs([program(text, example) for text in texts])
    passed = sum(outcome.passed for outcome in outcomes)
    first = cut(texts[0], TASKS[example.task].stop_strings)
    scores = {f"pass@{k}": pass_at_k(len(texts), passed, k) for k in KS if k <= len(texts)}
    return Judgement(first if first.strip() else None, scores)


def humaneval(row: Row) -> Example:
    """Return the example of a HumanEval row; raise ValueError if its test does not define `check`."""
    prompt, test = text_in(row, "prompt"), text_in(row, "test")
    if "def check(" not in test:
        raise ValueError("the test must define a function check(candidate), or every program would pass")
    answer = _answer(prompt, f"{test}\ncheck({text_in(row, 'entry_point')})\n")
    return Example("humaneval", prompt, text_in(row, "canonical_solution"), answer)


def mbpp(task: str, row: Row) -> Example:
    """Return the example of a row of MBPP {text, test_setup_code} or of its sanitized part {prompt, test_imports}."""
    text = text_in(row, "prompt" if "prompt" in row else "text")
    tests = [test.strip() for test in texts_in(row, "test_list")]
    if not any(tests):
        raise ValueError("test_list is empty, so every program would pass")
    listed = "\n".join(tests)
    prompt = (
        f"You are an expert Python programmer, and here is your task: {text.strip()} "
        f"Your code should pass these tests:\n\n{listed}\n[BEGIN]\n"
    )
    code = text_in(row, "code").replace("\r\n", "\n").rstrip()
    imports = "\n".join(texts_in(row, "test_imports")) if "test_imports" in row else ""
    # the set-up creates objects of classes that the code defines, so it comes after the code
    setup = text_in(row, "test_setup_code").replace("\r\n", "\n") if "test_setup_code" in row else ""
    answer = _answer(f"{imports}\n" if imports else "", f"{setup}\n{listed}\n" if setup else f"{listed}\n")
    return Example(task, prompt, f"{code}\n{DONE}", answer)


def in_span(test: tuple[int, int], row: Row, split: str) -> bool:
    """Return whether the task_id of an MBPP row is that of a train row or, for the test split, in the range `test`."""
    number, (first, last) = column(row, "task_id"), TRAIN if split == "train" else test
    if not isinstance(number, int):
        raise ValueError(f"task_id must be an integer; got {number!r:.80}")
    return first <= number <= last


# files of several splits; the others are exported from the hub
_ALL, _OPEN, _SANITIZED = "mbpp/mbpp.jsonl", "mbpp/prompt_validation_train.jsonl", "mbpp/sanitized-mbpp.json"
_TRAIN = any_of("mbpp/train.jsonl", _ALL, _OPEN)

TASKS = by_name(
    Task(
        "humaneval",
        humaneval,
        stop_strings=AFTER_BODY,
        hub={"test": (HubRows("openai/openai_humaneval", None, "test"),)},
        local={"test": any_of("humaneval/HumanEval.jsonl", "humaneval/test.jsonl")},
    ),
    Task(
        "mbpp",
        partial(mbpp, "mbpp"),
        stop_strings=(DONE,),
        hub=HubRows.splits(MBPP, "full"),
        local={"train": _TRAIN, "test": any_of("mbpp/test.jsonl", _ALL)},
        keep=partial(in_span, TEST),
    ),
    Task(
        "mbpp_validation",
        partial(mbpp, "mbpp_validation"),
        stop_strings=(DONE,),
        hub=HubRows.splits(MBPP, "full", test="validation"),
        local={"train": _TRAIN, "test": any_of("mbpp/validation.jsonl", _ALL, _OPEN)},
        keep=partial(in_span, VALIDATION),
    ),
    Task(
        "mbpp_sanitized",
        partial(mbpp, "mbpp_sanitized"),
        stop_strings=(DONE,),
        hub=HubRows.splits(MBPP, "sanitized"),
        local={
            "train": any_of("mbpp/sanitized_train.jsonl", _SANITIZED, "mbpp/sanitized.non_test.json"),
            "test": any_of("mbpp/sanitized_test.jsonl", _SANITIZED),
        },
        keep=partial(in_span, TEST),
    ),
)

FAMILY = Family(
    name="code",
    version=1,
    tasks=TASKS,
    score=score,
    measures=tuple(f"pass@{k}" for k in KS),
    literal=False,
    max_new_tokens=512,
)
