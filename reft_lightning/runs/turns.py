"""Threads that run one at a time, and synchronise where something is done for all of them at once.

Process-wide state (random number generators, log handlers, Hydra's configuration) is saved for each thread and restored
when its turn comes, so each runs as if it had the process to itself.
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
    """Whose turn it is, and what the waiting threads have asked for.

    A thread that asks waits until every other thread has asked or ended; then all questions are answered together.

    Args:
        names: names of the threads, in the order in which they start.
        answer: questions by name -> answers, for at least some of them.

    Attributes:
        stopping: whether all threads should end.
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
        """Let the other threads run until all have asked, then return the answer, or raise it if it is an error."""
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
        """End, and let the next thread continue."""
        self._here.remove(name)
        self._asked.pop(name, None)
        if self._here:
            self._pass_on()
        else:
            self._first.restore()

    def _pass_on(self) -> None:
        free = [name for name in self._here if name not in self._asked]
        with self._changed:
            self._turn = (free or self._here)[0]  # once all have asked, the first answers them
            self._changed.notify_all()

    def _wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == name)


class _State:
    """A snapshot of process-wide state."""

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
