"""Variants of a benchmark in processes of their own, which take turns: A B A B, one working at a time.

A benchmark script is both sides. Called by hand it starts one :class:`Worker` a variant and asks them in turn;
called as ``SCRIPT --worker VARIANT SETTINGS`` it is that variant, perhaps in another environment (``serve``). So a
script imports at its top only what every environment has: torch and transformers.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
Answer = dict[str, Any]
Build = Callable[..., Callable[[int], Answer | None]]


class Worker:
    """A variant in its own process; :meth:`ask` sends one request and waits for the answer.

    Args:
        script: a benchmark script.
        variant: one of its variants.
        settings: keyword arguments of the variant, of JSON's types.
        threads: of torch.
        python: of the environment to run in; this one unless given.
    """

    def __init__(
        self, script: str, variant: str, settings: Mapping[str, Any], threads: int, python: str | None = None
    ) -> None:
        self.variant = variant
        path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
        quiet = {
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        request = json.dumps({"threads": threads, "settings": dict(settings)})
        self.process = subprocess.Popen(
            [python or sys.executable, script, "--worker", variant, request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**own_waiting(), **quiet, "PYTHONPATH": path},
        )

    def answer(self) -> Answer:
        """Wait for the next answer.

        Raises:
            RuntimeError: if the process ended instead.
        """
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(
                f"the worker {self.variant!r} ended with code {code}; its own message stands above"
            )
        return json.loads(line)

    def ask(self, request: dict[str, Any]) -> Answer:
        """Send one request and wait for its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        return self.answer()

    def __enter__(self) -> Worker:
        self.answer()  # ready
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def own_waiting() -> dict[str, str]:
    """Return the environment in which threads wait as torch's do by default: one process works at a time, as in a run.

    ``make`` lets them sleep at once, for tests next to each other.
    """
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}


def interleaved(
    script: str,
    variants: Sequence[str],
    settings: Mapping[str, Any],
    *,
    rounds: int,
    warmup: int,
    threads: int,
    pythons: Mapping[str, str] | None = None,
    name: str = "",
    clocks: Sequence[str] = ("wall", "cpu"),
    first: int = 0,
) -> dict[str, Answer]:
    """Let variants take turns, in an order that rotates by one a round.

    All of them are alive at once. Each starts alone, so that loading has the memory and the cores to itself.

    Args:
        script: the ``__file__`` of the benchmark.
        variants: names of variants.
        settings: keyword arguments of every variant.
        rounds: timed rounds.
        warmup: rounds before them.
        threads: of torch.
        pythons: variant -> python of its environment, where it is another one.
        name: for the log.
        clocks: entries of the answers that are kept of every timed round.
        first: how far the order is rotated in the first round.

    Returns:
        variant -> what its process reports (peak memory, versions, ...), with lists of the ``clocks`` (seconds)
        and ``first``, the answer to the first request.
    """
    pythons = pythons or {}
    answers: dict[str, list[Answer]] = {variant: [] for variant in variants}
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(script, variant, settings, threads, pythons.get(variant)))
            for variant in variants
        ]
        for number in range(warmup + rounds):
            turn = (first + number) % len(workers)
            for worker in workers[turn:] + workers[:turn]:
                answers[worker.variant].append(worker.ask({"run": number}))
            log.info("%s: round %d of %d", name, number + 1, warmup + rounds)
        reports = {worker.variant: worker.ask({"report": True}) for worker in workers}
    found = {}
    for variant, given in answers.items():
        timed = given[warmup:]
        kept = {key: [answer[key] for answer in timed] for key in timed[0] if key in clocks}
        found[variant] = {**reports[variant], "first": given[0], **kept}
    return found


# --- inside the process of a variant -----------------------------------------------------------------------------


def is_worker() -> bool:
    """Whether this process was started as a worker."""
    return sys.argv[1:2] == ["--worker"]


def serve(variants: Mapping[str, Build]) -> None:
    """Be the variant that the command line names: build it, say ready, answer requests until there are no more.

    A variant takes the settings as keyword arguments and returns a function of the round's number, which is timed
    whole unless its answer holds ``wall`` and ``cpu`` itself. An attribute ``report`` of that function, a dictionary
    or a function that returns one, is added to the report.
    """
    variant, request = sys.argv[2:4]
    request = json.loads(request)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import torch

    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    run = variants[variant](**request["settings"])
    answers.write(json.dumps({"ready": variant}) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        answers.write(json.dumps(clocked(run, asked["run"]) if "run" in asked else _report(run)) + "\n")


def clocked(run: Callable[[int], Answer | None], number: int) -> Answer:
    """Run once: seconds on the clock and of the processor, and what the run returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    answer = run(number) or {}
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, **answer}


def _report(run: Callable) -> Answer:
    more = vars(run).get("report", {})
    names = ("torch", "transformers", "lightning", "peft", "pyreft", "pyvene", "adapters")
    return {
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {name: importlib.metadata.version(name) for name in names if name in sys.modules},
        **(more() if callable(more) else more),
    }


def peak_memory_bytes() -> int:
    """The largest resident memory of this process.

    Linux: ``VmHWM``, which starts anew when a program is started, whereas ``ru_maxrss`` keeps the parent's figure.
    """
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextlib.contextmanager
def stopwatch() -> Iterator[Answer]:
    """Time a part of a run: yields a dictionary that holds ``wall`` and ``cpu`` afterwards."""
    found: Answer = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
