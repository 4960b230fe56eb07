r"""Arithmetic word problems: seven benchmarks answered by a chain of thought, as LLM-Adapters renders them.

Test rows: LLM-Adapters (arXiv:2304.01933), https://github.com/AGI-Edgerunners/LLM-Adapters,
`dataset/<task>/test.json` (ODC-By 1.0). The paper's evaluation (arXiv:2404.03592) reads the same files:
https://github.com/stanfordnlp/pyreft/blob/dafd0995a366/examples/loreft/compute_metrics.py

A rendered row; `output` is what a model once said, right or wrong, and empty for MAWPS::

    {"instruction": "There are 7 crayons in the drawer . Mary took 3 crayons out of the drawer . How many
     crayons are there now ? ", "input": "", "output": "\nA: There were 7 crayons ... The answer is 4.",
     "answer": "4"}

The model reads the instruction under Alpaca's header and learns to say a rationale that ends in the answer.

| task | test rows | in the paper's tables | licence |
|---|---|---|---|
| AQuA | 254 | yes | Apache-2.0 |
| gsm8k | 1,319 | yes | MIT |
| mawps | 238 | yes | ODC-By in LLM-Adapters |
| SVAMP | 1,000 | yes | MIT |
| AddSub | 395 | no: math_10k contains its questions | ODC-By in LLM-Adapters |
| MultiArith | 600 (580 distinct) | no, likewise | ODC-By in LLM-Adapters |
| SingleEq | 508 | no, likewise | ODC-By in LLM-Adapters |

These sets overlap one another, and every training file drawn from MAWPS overlaps the last three: the data module
counts the test questions that occur in what is trained on, and warns. MAWPS' own train rows hold 327 of the 395
AddSub questions; GSM8K train holds none of any test set.

Training rows:

- `mixture`: math_10k.json, whose `output` (a model's rationale) is learnt as it stands, as the authors do.
- gsm8k train (7,473): the rationale without its calculator annotations (`<<48/2=24>>`: the text that follows repeats
  the result, and no calculator runs while decoding), then "The answer is 24."
- AQuA train (97,467, or dev: 254): the rationale, then "The answer is (B)." Two changes: a closing "Answer: B" is cut,
  being said by the last sentence, and the capitals A to E become small ("Distance" -> "distance", "ABC" -> "abc").
  Otherwise the published rule would read the gold answer wrong: 245 of the 254 dev rationales hold such a capital.
  A model trained on these rows therefore escapes most of the noise of that rule: its AQuA figure is not the one
  that training on math_10k gives.
- mawps train (1,898): the equation, then the answer; there is no rationale.

Test targets are the bare sentence "The answer is 4.", because the rendered outputs are often wrong.

Scores of what is generated after "### Response:" (where the authors' code finds no such trigger, as after a cut prompt,
it scores an empty text: wrong; here the prompt never belongs to the text):

- `accuracy`, as published. A number: the last match of `-?\d+\.?\d*` once commas are gone, within 1e-3 of the gold
  answer; so "8-3" ends in -3, "1e5" in 5, and 50% is 50. A letter: the first capital A to E anywhere, so that
  "Cost" answers C, and "A train" answers A: noise on top of five choices (chance is 20 %, the paper prints 14 to 25 %,
  one standard error is 2.6 points). Of the 254 gold rationales of AQuA dev the rule reads 85 right.
- `strict_accuracy`: a letter counts where it is stated ("the answer is (B)", "Answer: B", "correct option is B"; the
  last such statement), or ends the text in parentheses, or is the whole text. It reads 210 of those rationales right
  and finds nothing in the others. Numbers count as published.

Decoding: the paper's text says temperature 0.3 (conf/decoding/arithmetic_paper.yaml), the authors' README command is
greedy; both are configurations, and results name theirs.

Changes: version 1, first version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..example import Example, Judgement, Row, column, text_in, texts_in
from ..family import Family, Task
from ..rows import HubRows, LocalRows
from .extraction import LETTERS, equals, first_letter, is_number, last_number, stated_letter

VERSION = 1
NO_HUB = (
    "No hub data set is known to hold the LLM-Adapters test split: take dataset/ of the LLM-Adapters repository "
    "as data.path with data.source=local."
)
ORIGINAL_AQUA = (
    "AQuA in its original form: in 10 of 254 test rows LLM-Adapters' file has other blanks in the choices."
)
DEV_FOR_TRAIN = "AQuA dev (254 rows) stands in for train (97,467)."
HUB_MULTIARITH = "MultiArith from the hub: train and test joined (600), not compared with LLM-Adapters' file."
HUB_SVAMP = "SVAMP from the hub: train and test joined (1,000), in another order than LLM-Adapters' file."
ORIGINAL_GSM8K = (
    "GSM8K test in its original form: the questions and answers of LLM-Adapters, in another order."
)

_ANNOTATION = re.compile(r"<<.*?>>")
_SAYS_LETTER = re.compile(
    r"(?i)\W*\b(?:(?:hence|so|therefore|thus|the|correct|answer|ans|option|choice|is)\b\W*)+\(?[A-E]\)?\W*$"
)


def score(texts: Sequence[str], example: Example) -> Judgement:
    """Score generated texts by both rules; whether letters or numbers count is read from the gold answer."""
    if is_number(example.answer):
        found = [last_number(text) for text in texts]
        right = sum(equals(number, example.answer) for number in found) / len(texts)
        return Judgement(found[0], {"accuracy": right, "strict_accuracy": right})
    found = [first_letter(text) for text in texts]
    right = sum(letter == example.answer for letter in found) / len(texts)
    strict = sum(stated_letter(text) == example.answer for text in texts) / len(texts)
    return Judgement(found[0], {"accuracy": right, "strict_accuracy": strict})


# ------------------------------------------------------------------------------------------------ rows


def gold_number(value: object, where: str) -> str:
    """Return a gold number as text without thousands commas.

    Raises:
        ValueError: if it is no finite number; names the row.
    """
    text = str(value).strip().replace(",", "")
    if not is_number(text):
        raise ValueError(f"{where}: the answer must be a finite number; got {value!r}")
    return text


def gold_letter(value: object, where: str) -> str:
    """Return a gold letter.

    Raises:
        ValueError: if it is none of A to E; names the row.
    """
    text = str(value).strip()
    if text not in LETTERS:
        raise ValueError(f"{where}: the answer must be one of {', '.join(LETTERS)}; got {value!r}")
    return text


def says(answer: str) -> str:
    """Return the sentence that ends every target; 6.0 is written 6.

    >>> says("6.0"), says("B")
    ('The answer is 6.', 'The answer is (B).')
    """
    if answer in LETTERS:
        return f"The answer is ({answer})."
    number = float(answer)
    return f"The answer is {int(number) if number.is_integer() else answer}."


def split_gsm8k(row: Row, where: str) -> tuple[str, str]:
    r"""Return rationale and gold number of GSM8K's {question, answer: "rationale\n#### number"}.

    Raises:
        ValueError: if the answer has no "####".
    """
    text = text_in(row, "answer", where)
    rationale, found, number = text.rpartition("####")
    if not found:
        raise ValueError(f"{where}: the answer has no '####' before its number: {text!r:.80}")
    return rationale.rstrip("\n"), gold_number(number, where)


def gsm8k(row: Row, where: str) -> tuple[str, str, str]:
    """Make of {question, answer with ####} the instruction, the rationale without annotations, and the answer."""
    rationale, number = split_gsm8k(row, where)
    return text_in(row, "question", where), _ANNOTATION.sub("", rationale), number


def aqua(row: Row, where: str) -> tuple[str, str, str]:
    """Make of {question, options: ["A)21", ...], rationale, correct} instruction, rationale and letter.

    Raises:
        ValueError: if an option begins with the letter of another.
    """
    options = texts_in(row, "options", where)
    choices = " ".join(f"({x}) {_choice(x, y, where)}" for x, y in zip(LETTERS, options, strict=False))
    rationale = _SAYS_LETTER.sub("", text_in(row, "rationale", where).strip())
    rationale = re.sub("[A-E]", lambda capital: capital.group().lower(), rationale)
    letter = gold_letter(column(row, "correct", where), where)
    return f"{text_in(row, 'question', where)} Answer Choices: {choices}", rationale, letter


def _choice(letter: str, option: str, where: str) -> str:
    """Return the text of an option, which begins with its letter in the files; one without any letter is whole."""
    if option[:1] in LETTERS and option[1:2] == ")":
        if option[0] != letter:
            raise ValueError(f"{where}: option {letter} must begin with '{letter})'; got {option!r:.60}")
        return option[2:]
    return option


def svamp(row: Row, where: str) -> tuple[str, str, str]:
    """Make of {Body, Question, Answer} one text; LLM-Adapters closes a body that lacks its full stop."""
    body = text_in(row, "Body", where)
    question = f"{body if body.endswith('.') else body + '.'} {text_in(row, 'Question', where)}"
    return question, "", gold_number(column(row, "Answer", where), where)


def multiarith(row: Row, where: str) -> tuple[str, str, str]:
    """Read {question, final_ans}, the hub's form."""
    return text_in(row, "question", where), "", gold_number(column(row, "final_ans", where), where)


def mawps(row: Row, where: str) -> tuple[str, str, str]:
    """Read {original_text, equation, ans}: the equation stands for a rationale."""
    equation = text_in(row, "equation", where)
    return text_in(row, "original_text", where), equation, gold_number(column(row, "ans", where), where)


def rendered(task: str, row: Row, where: str) -> Example:
    """Return the example of a test row in the LLM-Adapters schema; its output is not used.

    Raises:
        ValueError: if a column is missing, the answer has another form than the task's, or there is an input.
    """
    instruction = _instruction(row, where)
    gold = gold_letter if task == "AQuA" else gold_number
    answer = gold(column(row, "answer", where), where)
    return Example(task, instruction, says(answer), answer, source=where)


def mixture(row: Row, where: str) -> Example:
    """Return the example of a row of math_10k.json: its output is learnt as it stands, as published.

    Its gold answer counts for validation rows only, and is not compared with what the output concludes.

    Raises:
        ValueError: if a column is missing, the output is empty, or there is an input.
    """
    instruction, output = _instruction(row, where), text_in(row, "output", where)
    if not output.strip():
        raise ValueError(f"{where}: the row has no output to learn")
    return Example("mixture", instruction, output, str(column(row, "answer", where)).strip(), source=where)


def _instruction(row: Row, where: str) -> str:
    if row.get("input"):
        raise ValueError(f"{where}: the template has no place for input {row['input']!r:.60}")
    return text_in(row, "instruction", where)


Parse = Callable[[Row, str], tuple[str, str, str]]


def _make(name: str, parse: Parse | None = None) -> Callable[[Row, str], Example]:
    """Return row -> Example for LLM-Adapters' rows and, where `parse` reads them, original rows."""

    def example(row: Row, where: str) -> Example:
        if parse is None or "instruction" in row:
            return rendered(name, row, where)
        question, rationale, answer = parse(row, where)
        target = f"{rationale}\n{says(answer)}" if rationale else says(answer)
        return Example(name, question, target, answer, source=where)

    return example


def _test(name: str, *others: LocalRows) -> tuple[LocalRows, ...]:
    return LocalRows((f"{name}/test.json",)), *others


TASKS = {
    task.name: task
    for task in (
        Task(
            "AQuA",
            _make("AQuA", aqua),
            hub={
                "train": (HubRows("deepmind/aqua_rat", "raw", "train"),),
                "test": (HubRows("deepmind/aqua_rat", "raw", "test"),),
            },
            local={
                "train": (
                    LocalRows(("AQuA/train.jsonl",)),
                    LocalRows(("AQuA/dev.jsonl",), note=DEV_FOR_TRAIN),
                ),
                "test": _test("AQuA", LocalRows(("AQuA/test.jsonl",), note=ORIGINAL_AQUA)),
            },
            notes={"hub": ORIGINAL_AQUA},
        ),
        Task(
            "gsm8k",
            _make("gsm8k", gsm8k),
            hub={split: (HubRows("openai/gsm8k", "main", split),) for split in ("train", "test")},
            local={
                "train": (LocalRows(("gsm8k/train.jsonl",)),),
                "test": _test(
                    "gsm8k",
                    LocalRows(("gsm8k/test.llm_adapters.json",)),
                    LocalRows(("gsm8k/test.jsonl",), note=ORIGINAL_GSM8K),
                ),
            },
            notes={"hub": ORIGINAL_GSM8K},
        ),
        Task(
            "mawps",
            _make("mawps", mawps),
            local={
                "train": (LocalRows(("mawps/trainset.json",)),),
                "test": _test("mawps", LocalRows(("mawps/testset.json",))),
            },
            notes={"hub": NO_HUB},
        ),
        Task(
            "SVAMP",
            _make("SVAMP", svamp),
            hub={"test": (HubRows("ChilleD/SVAMP", None, "train"), HubRows("ChilleD/SVAMP", None, "test"))},
            local={"test": _test("SVAMP", LocalRows(("SVAMP/SVAMP.json",)))},
            notes={"hub": HUB_SVAMP},
        ),
        Task("AddSub", _make("AddSub"), local={"test": _test("AddSub")}, notes={"hub": NO_HUB}),
        Task(
            "MultiArith",
            _make("MultiArith", multiarith),
            hub={
                "test": (
                    HubRows("ChilleD/MultiArith", None, "train"),
                    HubRows("ChilleD/MultiArith", None, "test"),
                )
            },
            local={"test": _test("MultiArith")},
            notes={"hub": HUB_MULTIARITH},
        ),
        Task("SingleEq", _make("SingleEq"), local={"test": _test("SingleEq")}, notes={"hub": NO_HUB}),
    )
}

FAMILY = Family(
    name="arithmetic",
    version=VERSION,
    tasks=TASKS,
    score=score,
    measures=("accuracy", "strict_accuracy"),
    literal=False,
    max_new_tokens=512,  # pyreft, examples/loreft/task_config.py
    template="alpaca",
    mixture_example=mixture,
)
