"""Threads that run one at a time, and meet where something is done for all of them at once.

What a process has only one of, random numbers, the handlers of the log and Hydra's configuration, is kept for each
thread and put back when its turn comes: each runs as if the process were its own.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig


class Turns:
    """Whose turn it is, and what those who wait have asked for.

    A thread that asks waits until every other one has asked, or has ended; then all questions are answered at once.

    Args:
        names: of the threads, in the order in which they begin.
        answer: questions by name -> answers, of some of them at least.

    Attributes:
        stopping: whether all are to end.
    """

    def __init__(self, names: Iterable[str], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._here, self._answer = list(names), answer
        self._asked: dict[str, Any] = {}
        self._answers: dict[str, Any] = {}
        self._turn = self._here[0]
        self._changed = threading.Condition()
        self._first = _State()
        self.stopping = False

    def begin(self, name: str) -> None:
        """Wait for the first turn."""
        self._wait(name)
        self._first.restore()

    def ask(self, name: str, question: Any) -> Any:
        """Return the answer, or raise it, when all others have asked; let them run until then."""
        own, self._asked[name] = _State(), question
        while name not in self._answers:
            self._pass_on()
            self._wait(name)
            if all(other in self._asked for other in self._here):
                self._answers |= (answers := self._answer(self._asked))
                self._asked = {other: asked for other, asked in self._asked.items() if other not in answers}
        own.restore()
        answer = self._answers.pop(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def leave(self, name: str) -> None:
        """End, and let the next go on."""
        self._here.remove(name)
        self._asked.pop(name, None)
        if self._here:
            self._pass_on()
        else:
            self._first.restore()

    def _pass_on(self) -> None:
        free = [name for name in self._here if name not in self._asked]
        with self._changed:
            self._turn = (free or self._here)[0]  # where all have asked, the first answers them
            self._changed.notify_all()

    def _wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == name)


class _State:
    """What a process has only one of, as it is now."""

    def __init__(self) -> None:
        self.random = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self.of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.handlers, self.hydra = list(logging.root.handlers), HydraConfig.instance().cfg

    def restore(self) -> None:
        python, numpy, cpu = self.random
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if self.of_gpus:
            torch.cuda.set_rng_state_all(self.of_gpus)
        logging.root.handlers[:] = self.handlers
        HydraConfig.instance().cfg = self.hydra
