r"""Custom rows: a file, a folder or a hub dataset, and the meaning of its columns.

    reft-train model=smollm2_135m data=custom data.path=mine.csv data.prompt=question data.target=reply

| setting | meaning |
|---|---|
| `path` | a file (`files.py` lists the formats), or a folder with `train.*` and optionally `validation.*` (or `valid.*`, `val.*`, `dev.*`) and `test.*`; with source `hub`, `owner/name`, `owner/name:config` or `owner/name:config:split`, each optionally followed by `@revision` |
| `validation_path` | a file with the validation rows; with source `hub`, the name of their split, or another dataset like `path`. If there are none, they are held out from the train rows |
| `test_path` | the same for the test rows. If there are none, nothing is tested |
| `prompt`, `target` | what is read and what is learnt: each a column name, or a text with column names in braces, such as `"{question}\n{choices}"`. `target` without `prompt` is a text, see below |
| `answer` | the column in braces within `target` that is the gold answer, if the target contains more than that |
| `context` | a column name or text like `prompt`: what the prompt refers to (Alpaca's "### Input:") |
| `source_prompt` | a column name or text like `prompt`: the other prompt of an interchange intervention (`intervention=das`), whose hidden states are inserted into this one; the target is then the counterfactual answer |
| `options` | the answers to choose from: a column with a list (in a CSV file as JSON, `["red", "blue"]`) or comma-separated text, or a list of columns, `[opa,opb,opc,opd]` |
| `marks` | `["<<",">>"]`: the texts before and after words of a prompt that the positions `given` edit; marks are always removed, whatever the positions |
| `answer_form` | how the answer names one of the options: `text`, `letter` (A, B, ...), `index` (from 0) or `number` (from 1). The text of the option is what is learnt |
| `delimiter` | the delimiter of a CSV file, if its header does not reveal it (comma, semicolon and tab are recognised) |
| `messages` | instead of all these: a column of conversations, `[{"role": "user", "content": "..."}, ...]`, or ShareGPT's `[{"from": "human", "value": "..."}, ...]` |

A conversation is one example: the last answer is learnt, the question before it is the prompt, and everything before
that is earlier turns (including a system message). The default template is `chat` for conversations, otherwise `plain`,
which puts a line break between prompt and target unless the prompt ends in white space.

**Texts.** With `target` and no `prompt`, every token is learnt, including eos, in pieces of `data.max_length` tokens. The first
token of a text is learnt only if the tokenizer puts a token before it (BOS). Nothing is generated: checkpoints are selected by the
loss, and the table shows it with the perplexity, the exponential of the mean loss per token. There is no prompt to edit, so
positions must be `all` (or `decode`). In a `.txt` file each line is a text, in the column `text`; use another format for texts with
line breaks.

A generated text is correct if it equals the answer, ignoring surrounding white space. This is not informative for free-form
texts. Therefore, with the templates `chat` and `alpaca` and no `answer`, checkpoints are selected by the accuracy over the
`options` or, without options, by the loss; the loss is then also measured on the test rows, as is ROUGE-L.

Changes: version 6 measures ROUGE-L with an emoji of several characters as one word, other symbols as none, and accents joined with their letters, and compares questions without `marks`; version 5 measures it by characters for scripts without blanks, and does not break words at vowel signs;
version 4 reads lists of options given as JSON in a cell, and the hub's columns of mixed types, as values;
version 3 measures ROUGE-L of free-form texts; version 2 validates on a folder's validation rows, and holds out conversations whose last questions are the
same (what precedes the question is part of it); version 1, first version.
"""  # noqa: E501

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import regex

from ...storage.reading import naming
from ..columns import TASK, Columns, Conversations, Texts
from ..example import Example, Judgement, Score, column, exact_match
from ..family import Family, Task
from ..files import READERS, Rows, ending, is_saved, listing, read_file
from ..marks import as_marks
from ..rows import HubRows, LocalRows, Located
from ..splits import Carved, Stratum, by_task, carve_validation, distinct

log = logging.getLogger(__name__)

# split -> possible names of its file in a folder, as recognised by the hub
FILE_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
VERSION = 6
A_TENTH = -1  # validation_size
MOST_VALIDATION = 100  # upper limit of the tenth, in rows
MAX_NEW_TOKENS = 128
LOOKED_AT = 100  # rows at the beginning of each file that are searched for columns
_WITHOUT_BLANKS = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # scripts without blanks
)
# shown as a picture by itself, or with the selector U+FE0F; \X includes skin tones, whole flags and joined emoji
_EMOJI = r"(?=\p{Emoji_Presentation}|\p{Emoji}\uFE0F)\X"
_WORDS = regex.compile(
    rf"{_EMOJI}|[{_WITHOUT_BLANKS}]\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}_]--[{_WITHOUT_BLANKS}]][[\p{{L}}\p{{M}}\p{{N}}_]--[{_WITHOUT_BLANKS}]]*",
    regex.V1,
)


def custom_family(
    *,
    path: str | None,
    source: str = "local",
    prompt: str | None = None,
    target: str | None = None,
    answer: str | None = None,
    context: str | None = None,
    options: str | Sequence[str] | None = None,
    answer_form: str = "text",
    messages: str | None = None,
    source_prompt: str | None = None,
    validation_path: str | None = None,
    test_path: str | None = None,
    delimiter: str | None = None,
    template: str | None = None,
    marks: Sequence[str] | None = None,
) -> Family:
    """Return the family of custom rows, with the single task `custom`; see the table above for the arguments.

    Raises:
        ValueError: for missing or conflicting settings, an unknown file format, or a column that none of the first rows
            has (lists the columns there are).
        FileNotFoundError: if the file or folder does not exist, or the folder has no train file.
    """
    tables = tables_of(path, source, validation_path, test_path, _reader(delimiter))
    begun = beginnings(tables)
    as_marks(marks)
    template = template or default_template(messages)
    given = {
        "prompt": prompt, "target": target, "answer": answer, "context": context, "options": options,
        "source_prompt": source_prompt,
    }  # fmt: skip
    make = _maker(given, messages, answer_form, bool(marks), template, begun)
    check_columns(make.names, begun)
    if isinstance(make, Texts):
        scored: dict[str, Any] = {"kind": "text", "score": None, "measures": ()}
    else:
        scored = _scored(make.find, answer, options, template)
    places: dict[str, Any] = {source: tables}
    return Family(
        name="custom",
        version=VERSION,
        tasks={TASK: Task(TASK, make, **places)},
        max_new_tokens=MAX_NEW_TOKENS,
        template=template,
        carve=carve,
        **scored,
    )


def _maker(
    given: Mapping[str, Any],  # the columns that `messages` replaces
    messages: str | None,
    answer_form: str,
    marked: bool,
    template: str,
    begun: Sequence[Located],
) -> Columns | Conversations | Texts:
    """Return what turns rows into examples; raise ValueError for missing or conflicting settings."""
    columns = [name for name, value in given.items() if value]
    if messages:
        if columns:
            also = ", ".join(f"data.{name}" for name in columns)
            raise ValueError(f"data.messages replaces {also}; set only one or the other")
        return Conversations(messages, line_break=template == "plain")
    if columns == ["target"] and answer_form == "text" and not marked:
        if template != "plain":
            raise ValueError(
                f"data.template={template} needs a prompt, and data.target without data.prompt is a text without one: "
                "set data.prompt, or remove the template"
            )
        return Texts(given["target"])
    missing = [f"data.{name}" for name in ("prompt", "target") if name not in columns]
    if missing:
        there = f"; the columns are {', '.join(begun[0][0][0])}" if begun else ""
        alone = ", or only data.target for texts without a prompt" if len(missing) == 2 else ""
        raise ValueError(f"data=custom needs {' and '.join(missing)}, or data.messages{alone}{there}")
    return Columns(**given, answer_form=answer_form, line_break=template == "plain")


def _scored(
    find: Callable[[str], str | None], answer: str | None, options: str | Sequence[str] | None, template: str
) -> dict[str, Any]:
    """Return the scorer, and the measures if they are not the defaults."""
    score = exact_match(find)
    if answer or template == "plain":
        return {"score": score}
    if options:
        return {"score": score, "main": "option_accuracy"}
    return {"score": with_rouge_l(score), "measures": ("accuracy", "rouge_l"), "main": "loss"}


def default_template(messages: str | None) -> str:
    """Return the default template of custom rows: `chat` for conversations, otherwise `plain`."""
    return "chat" if messages else "plain"


def with_rouge_l(score: Score) -> Score:
    r"""Return a scorer that also measures ROUGE-L of the texts against the answer, 0..1.

    .. math:: F = 2 L / (m + n)

    for texts of m and n words with longest common subsequence L (Lin 2004, "ROUGE"), averaged over the texts of a row.
    Words are runs of letters and digits of any alphabet, in lower case and without stemming. In Chinese, Japanese, Thai
    and other scripts without blanks each character is a word, and so is an emoji with its skin tone, a flag, or several
    emoji joined into one picture; other symbols, such as ° and ©, are not words. Combining accents are joined with
    their letters (NFC).

    >>> score = with_rouge_l(exact_match(str.strip))
    >>> score(["a red boat"], Example("t", "p", "A red house.", "A red house.")).scores
    {'accuracy': 0.0, 'rouge_l': 0.6666666865348816}
    """

    def both(texts: Sequence[str], example: Example) -> Judgement:
        from torchmetrics.functional.text import rouge_score

        found = score(texts, example)
        golds = [example.answer] * len(texts)
        rouge = rouge_score(texts, golds, rouge_keys="rougeL", normalizer=_lower, tokenizer=_WORDS.findall)
        return Judgement(found.answer, found.scores | {"rouge_l": float(rouge["rougeL_fmeasure"])})

    return both


def _lower(text: str) -> str:
    """Return a text as ROUGE-L compares it: in lower case, with combining accents joined with their letters."""
    return unicodedata.normalize("NFC", text).lower()


def carve(examples: Sequence[Example], size: int, seed: int, stratum: Stratum = by_task) -> Carved:
    """Hold out validation rows from the train rows as `carve_validation` does; a size of -1 means a tenth of them.

    This is a tenth of the distinct prompts, rounded down, and at most 100.
    """
    if size == A_TENTH:
        size = min(len(distinct(examples)) // 10, MOST_VALIDATION)
        log.info("validation_size=-1: holding out %d of %d rows", size, len(examples))
    return carve_validation(examples, size, seed, stratum)


# ------------------------------------------------------------------------------------------ where rows are


def tables_of(
    path: str | None,
    source: str,
    validation_path: str | None,
    test_path: str | None,
    read: Callable[[Path], Rows] = read_file,
) -> dict[str, tuple[Any, ...]]:
    """Return split -> its single table, see the top of this file."""
    if source not in ("local", "hub"):
        raise ValueError(f"data.source must be local or hub for custom rows; got {source!r}")
    if not path:
        raise ValueError("custom rows need data.path: a file, a folder with a train file, or a hub dataset")
    others = {"validation": validation_path, "test": test_path}
    return _hub_tables(path, others) if source == "hub" else _local_tables(path, others, read)


def _hub_tables(path: str, others: Mapping[str, str | None]) -> dict[str, tuple[HubRows, ...]]:
    if Path(path).expanduser().exists():
        raise ValueError(f"data.source=hub, but {path} is on this machine: set data.source=local")
    train = _hub_table(path, "train")
    tables = {"train": (train,)}
    for split, other in others.items():
        if other:  # another dataset, or a split of this one
            tables[split] = (_hub_table(other, split) if "/" in other else replace(train, split=other),)
    return tables


def _hub_table(path: str, split: str) -> HubRows:
    place, _, revision = path.partition("@")
    name, config, own, *_ = [*place.split(":", 2), "", ""]
    return HubRows(name, config or None, own or split, revision or None)


def _reader(delimiter: str | None) -> Callable[[Path], Rows]:
    between = "\t" if delimiter == "\\t" else delimiter  # a shell passes the two characters through
    if between is not None and (len(between) != 1 or between in '\r\n"'):
        raise ValueError(f"data.delimiter must be one character, such as ';' or '\\t'; got {delimiter!r}")
    return partial(read_file, delimiter=between)


def _local_tables(
    path: str, others: Mapping[str, str | None], read: Callable[[Path], Rows]
) -> dict[str, tuple[LocalRows, ...]]:
    place = Path(path).expanduser().absolute()
    if not place.exists() and ending(place) not in READERS:
        raise FileNotFoundError(
            f"data.path={path} is not a file or folder on this machine; {place.parent} holds "
            f"{listing(place.parent)}. For a hub dataset set data.source=hub"
        )
    files: dict[str, Path | None] = {"train": place}
    if place.is_dir() and not is_saved(place):
        files = {split: _split_file(place, split) for split in FILE_NAMES}
        if files["train"] is None:
            raise FileNotFoundError(
                f"data.path={path}: the folder must contain a file train.* in one of the formats {', '.join(READERS)}, "
                f"or a folder train of save_to_disk; it holds {listing(place)}"
            )
    files |= {split: Path(other).expanduser().absolute() for split, other in others.items() if other}
    # an absolute path is used as is, whatever the source's folder
    return {split: (LocalRows((str(file),), read=read),) for split, file in files.items() if file}


def _split_file(folder: Path, split: str) -> Path | None:
    files = [
        file
        for name in FILE_NAMES[split]
        for file in (folder / name, *sorted(folder.glob(f"{name}.*")))
        if is_saved(file) or (file.is_file() and ending(file) in READERS)
    ]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        key = "data.path" if split == "train" else f"data.{split}_path"
        raise ValueError(f"{folder} contains several files for {split}: {names}; choose one with {key}")
    return files[0] if files else None


def beginnings(tables: Mapping[str, tuple[Any, ...]]) -> list[Located]:
    """Return the first rows of each non-empty file except the test file, which a search must never open."""
    local = [t for split, (t,) in tables.items() if split != "test" and isinstance(t, LocalRows)]
    begun = (list(islice(table.read(Path(table.files[0])), LOOKED_AT)) for table in local)
    return [rows for rows in begun if rows]


def check_columns(names: Sequence[str], begun: Sequence[Located]) -> None:
    """Find wrong column names early; each must occur in at least one of a file's first rows."""
    for rows in begun:
        for name in names:
            if not any(name in row for row, _ in rows):
                with naming(rows[0][1]):
                    column(rows[0][0], name)
