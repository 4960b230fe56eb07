"""Inject faults into runs of `reft-train`, give the same command again with `resume=auto`, and count what was lost.

A plan is a list of faults, `{"fault": "kill", "point": 0.41, "seed": 3}`: what happens, and where in the run, as a part
of its events (writes below the run folder, and batches), of its training batches or of its seconds. The adapter, the
predictions and the scores of a run that was stopped and resumed must be those of a run without a fault, bit for bit.

Every run is a child of this process, forked once everything is imported: it takes about a second.

    python experiments/reliability/inject.py --make 40 --seed 0 --plan plan.json     # draw a plan
    python experiments/reliability/inject.py --plan plan.json --out results.json     # and run it
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRIES = 4  # commands after the fault: one that was killed while it cleaned up may need another
WAIT = 120  # seconds
DISK = 24  # MiB of the disk that fills up
RUN = (
    "data=custom", "data.path=rows.jsonl", "data.test_path=test.jsonl", "data.prompt=q", "data.target=a",
    "data.options=o", "data.validation_size=6", "data.batch_size=3", "data.eval_batch_size=4",
    "decoding.max_new_tokens=3", "intervention.rank=2", "intervention.dropout=0.3", "optimizer.weight_decay=0.1",
    "trainer=cpu", "trainer.max_epochs=2", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3",
    "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "checkpoint.every_n_steps=1",
    "evaluate_base=true",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and where."""

    fault: str
    point: float  # part of the run
    seed: int = 42  # of the run


class Counters:
    """Numbers that a process and its forked children share, also after a kill."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * 3)

    def __getitem__(self, index: int) -> int:
        return struct.unpack_from("q", self._memory, 8 * index)[0]

    def __setitem__(self, index: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * index, value)

    def add(self, index: int) -> int:
        """Count one more; return how many there were."""
        before = self[index]
        self[index] = before + 1
        return before


EVENTS, BEGUN, DONE = range(3)  # writes and batches; training batches that began; those that were completed


# --- what happens -------------------------------------------------------------------------------------------------


def kill() -> None:
    """End this process as `kill -9` and the kernel's out-of-memory killer do."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_worker() -> None:
    """Kill a worker process of the data loader."""
    for worker in multiprocessing.active_children()[:1]:
        os.kill(worker.pid or 0, signal.SIGKILL)


def fill_disk() -> None:
    """Leave no byte free on the disk of the present folder."""
    with open("ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def read_only_cache() -> None:
    """Let nothing be written to the cache any more."""
    subprocess.run(["mount", "-o", "remount,ro", os.environ["REFT_CACHE"]], check=True)


AT_EVENTS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "ctrl_c": lambda: os.kill(os.getpid(), signal.SIGINT),
    "full_disk": fill_disk,
    "read_only_cache": read_only_cache,
}
AT_BATCHES = (
    "out_of_memory", "nan_loss", "nan_gradient", "loader_worker_killed", "rank_0_killed", "rank_1_killed",
)  # fmt: skip
AT_TIMES = ("kill_anytime",)
KINDS = (*AT_EVENTS, *AT_BATCHES, *AT_TIMES)
# How a command may end in which the fault happened: 0 where the run goes on, or the fault came after all was done
STATUS = {
    "kill": (0, -9), "kill_anytime": (0, -9), "sigterm": (0, 143, -15), "ctrl_c": (0, 130, -2), "read_only_cache": (0,),
    "rank_0_killed": (0, -9), "rank_1_killed": (0, 1, 137, -9),
}  # fmt: skip


def settings_of(kind: str) -> list[str]:
    """Return the overrides without which a fault cannot happen; none of them makes another run."""
    if kind == "loader_worker_killed":
        return ["data.num_workers=2"]
    return ["trainer.devices=2", "trainer.strategy=ddp"] if kind.startswith("rank") else []


# --- inside a run -------------------------------------------------------------------------------------------------


def watch(fault: Fault | None, at: int, counters: Counters) -> None:
    """Count events in this process, and let a fault happen at one of them.

    Args:
        fault: or None.
        at: the number of the event, or of the training batch.
        counters: shared with whoever counts.
    """
    import torch

    from reft_lightning.data import encoding_cache
    from reft_lightning.training.generation import GenerationModule
    from reft_lightning.training.last_checkpoint import LastCheckpoint

    place, busy = os.getcwd(), []
    encoding_cache.SMALL = 0  # small runs keep their encoded rows, too

    def event() -> None:
        if counters.add(EVENTS) == at and fault is not None and fault.fault in AT_EVENTS and not busy:
            busy.append(True)
            AT_EVENTS[fault.fault]()

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        opened = name == "open" and isinstance(arguments[2], int) and arguments[2] & writes
        if opened or name in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree"):
            path = arguments[0]
            if isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(place):
                event()

    def counted(name: str) -> None:
        original = getattr(GenerationModule, name)

        def step(self: Any, batch: Any, *rest: Any) -> Any:
            event()
            return original(self, batch, *rest)

        setattr(GenerationModule, name, step)

    def loss_of(self: Any, batch: Any) -> Any:
        loss = original_loss(self, batch)
        if not (torch.is_grad_enabled() and self.trainer.training):
            return loss
        here = counters.add(BEGUN) == at and fault is not None
        kind = fault.fault if fault is not None and here else ""
        if kind == "out_of_memory":
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB in use"
            )
        if kind == "loader_worker_killed":
            kill_worker()
        if kind.startswith("rank"):
            kill()
        if kind == "nan_gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss * float("nan") if kind == "nan_loss" else loss

    def done(self: Any, *arguments: Any) -> None:
        counters.add(DONE)
        original_done(self, *arguments)

    original_loss, original_done = GenerationModule.loss_of, LastCheckpoint.on_train_batch_end
    GenerationModule.loss_of, LastCheckpoint.on_train_batch_end = loss_of, done  # type: ignore[method-assign]
    for name in ("training_step", "validation_step", "test_step"):
        counted(name)
    sys.addaudithook(audit)


def command(arguments: list[str], fault: Fault | None, at: int, counters: Counters) -> None:
    """Be `reft-train`."""
    from reft_lightning import cli

    other = fault if fault is not None and fault.fault == "rank_1_killed" else None
    os.environ["FAULT"] = json.dumps([other and asdict(other), at])  # for rank.py, which another rank runs
    own = None if other else fault
    watch(own, at, counters)
    sys.argv = [str(HERE / "rank.py"), *arguments]
    cli.train()


# --- outside ------------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a command ended."""

    status: int
    said: str
    seconds: float


def call(
    folder: Path, arguments: list[str], counters: Counters, fault: Fault | None = None, at: float = -1
) -> Ended:
    """Run `reft-train` in a folder as a child of this process, as the leader of a group that ends with it."""
    timed = fault is not None and fault.fault in AT_TIMES
    said, began = folder / "said.txt", time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            command(arguments, fault, -1 if timed else int(at), counters)
            status = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    until = began + (at if timed else WAIT)
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.005)
    seconds = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, 0)  # a rank or a loader's worker may be left for a moment
        time.sleep(6)
        os.killpg(child, signal.SIGKILL)
    return Ended(os.waitstatus_to_exitcode(found[1]), said.read_text(errors="replace"), seconds)


def write_rows(folder: Path) -> None:
    """Write sums as questions."""
    rng = random.Random(7)
    for name, count in (("rows", 24), ("test", 6)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                a, b = rng.randint(0, 9), rng.randint(0, 9)
                row = {
                    "q": f"{name} {number}: {a} + {b} =",
                    "a": str(a + b),
                    "o": [str(a + b), str(a + b + 1)],
                }
                file.write(json.dumps(row) + "\n")


def only_run(folder: Path) -> Path:
    """Return the run folder that commands in a folder wrote; there must be one."""
    (found,) = {path.parent for path in folder.glob("outputs/*/*/config.yaml")}
    return found


TIMES = ("seconds", "per_second")


def results_of(run: Path) -> dict[str, Any]:
    """Return what a run is about: scores, counts, digests of its adapter and of its predictions."""
    values = json.loads((run / "results.json").read_text())
    files = [*sorted(run.glob("predictions/*.jsonl")), run / "adapter" / "reft.safetensors"]
    metrics = {k: v for k, v in values["metrics"].items() if not any(word in k for word in TIMES)}
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
    facts = {name: values.get(name) for name in ("status", "best_step", "steps", "tokens", "counts")}
    return facts | {"metrics": metrics, "files": digests, "losses": losses_of(run)}


def losses_of(run: Path) -> dict[int, str]:
    """Return step -> logged loss, of all parts of a run."""
    import csv

    found = {}
    for part in sorted(run.glob("csv*/metrics.csv")):
        with part.open(newline="") as file:
            found |= {
                int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")
            }
    return found


@dataclass
class Outcome:
    """What became of a run with a fault."""

    fault: str
    point: float
    seed: int
    at: float  # the event, the batch or the second
    status: int  # of the command in which it happened
    commands: int = 1
    recovered: bool = False
    batches_again: int = 0  # training batches that were computed twice
    lost: tuple[
        str, ...
    ] = ()  # results that stood in the folder before and not after, or that differ from the whole run's
    problems: tuple[str, ...] = ()
    last_line: str = ""


class Reference:
    """Runs without a fault, one for each seed and number of ranks."""

    def __init__(self, model: list[str], place: Path) -> None:
        self.model, self.place = model, place
        self._known: dict[tuple[int, bool], tuple[dict[str, Any], Counters, float]] = {}

    def of(self, fault: Fault) -> tuple[dict[str, Any], Counters, float]:
        """Return results, counts and seconds of the run that a fault will meet."""
        ranks = fault.fault.startswith("rank")
        if (fault.seed, ranks) not in self._known:
            folder = new_place(self.place / f"whole_{fault.seed}_{ranks}" / "run")
            counters = Counters()
            os.environ["REFT_CACHE"] = str(folder.parent / "cache")
            ended = call(folder, arguments_of(fault, self.model), counters)
            if ended.status:
                raise RuntimeError(
                    f"a run without a fault ended with status {ended.status}:\n{ended.said[-3000:]}"
                )
            self._known[fault.seed, ranks] = results_of(only_run(folder)), counters, ended.seconds
        return self._known[fault.seed, ranks]


def new_place(folder: Path) -> Path:
    """Make a folder with rows."""
    folder.mkdir(parents=True)
    write_rows(folder)
    return folder


def arguments_of(fault: Fault, model: list[str]) -> list[str]:
    """Return the arguments of the command, which is the same before and after a fault."""
    return [*model, *RUN, *settings_of(fault.fault), f"seed={fault.seed}", "resume=auto"]


@contextlib.contextmanager
def disks(fault: Fault, place: Path) -> Iterator[Path]:
    """Yield a folder to run in, and a cache: on a small disk where that is to be filled, or cannot be written."""
    folder, cache = place / "run", place / "cache"
    folder.mkdir(parents=True)
    cache.mkdir()
    os.environ["REFT_CACHE"] = str(cache)
    mounted = {"full_disk": folder, "read_only_cache": cache}.get(fault.fault)
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(mounted)], check=True)
    try:
        write_rows(folder)
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(mounted)], check=True)
        shutil.rmtree(place)


def lost(
    before: dict[str, Any], after: dict[str, Any], whole: dict[str, Any], obtained: dict[str, Any]
) -> list[str]:
    """Return what a run has lost: what its results.json held after the fault, or what a run without a fault has.

    Args:
        before: results.json after the fault.
        after: results.json at the end.
        whole: results of a run without a fault, see `results_of`.
        obtained: those of this one.
    """
    found = [name for name, value in whole.items() if obtained[name] != value]
    found += [
        name for name, value in before.get("metrics", {}).items()
        if after["metrics"].get(name) != value and not any(word in name for word in TIMES)
    ]  # fmt: skip
    reads = before.get("test_reads", [])
    return [*found, *(["test_reads"] if after["test_reads"][: len(reads)] != reads else [])]


def meet(fault: Fault, reference: Reference, place: Path) -> Outcome:
    """Let a run meet a fault, and repeat its command until it is complete."""
    whole, counts, seconds = reference.of(fault)
    total = seconds if fault.fault in AT_TIMES else counts[BEGUN if fault.fault in AT_BATCHES else EVENTS]
    at = fault.point * total
    arguments, counters, problems = arguments_of(fault, reference.model), Counters(), []
    with disks(fault, place / "now") as folder:
        ended = call(folder, arguments, counters, fault, at)
        allowed = STATUS.get(fault.fault, (0, 1))
        if ended.status not in allowed:
            problems.append(f"exit status {ended.status}, not one of {allowed}")
        if "Traceback" in ended.said:
            problems.append(f"a traceback: {ended.said[ended.said.index('Traceback') :][-1500:]}")
        last_line = (ended.said.strip().splitlines() or [""])[-1][-300:]
        outcome = Outcome(**asdict(fault), at=at, status=ended.status, last_line=last_line)
        (folder / "ballast").unlink(missing_ok=True)
        before = results_before(folder)
        while ended.status and before.get("status") != "complete" and outcome.commands < TRIES:
            outcome.commands += 1
            ended = call(folder, arguments, counters)
        outcome.recovered = ended.status == 0 or before.get("status") == "complete"
        if outcome.recovered:
            run = only_run(folder)
            after = json.loads((run / "results.json").read_text())
            outcome.lost = tuple(lost(before, after, whole, results_of(run)))
            outcome.batches_again = counters[DONE] - counts[DONE]
        else:
            problems.append(f"not recovered: {ended.said[-1500:]}")
        outcome.problems = tuple(problems)
    return outcome


def results_before(folder: Path) -> dict[str, Any]:
    """Return results.json after the fault; nothing if it was not yet written."""
    return next((json.loads(path.read_text()) for path in folder.glob("outputs/*/*/results.json")), {})


# --- plans --------------------------------------------------------------------------------------------------------


def make_plan(count: int, seed: int, kinds: list[str]) -> list[Fault]:
    """Draw so many faults of each kind, at random points of runs of five seeds."""
    rng = random.Random(seed)
    return [Fault(kind, round(rng.random(), 4), rng.randint(1, 5)) for kind in kinds for _ in range(count)]


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """Return the counts of each kind of fault."""
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(outcome.fault for outcome in outcomes):
        of_kind = [outcome for outcome in outcomes if outcome.fault == kind]
        found[kind] = {
            "tried": len(of_kind),
            "stopped the run": sum(outcome.status != 0 for outcome in of_kind),
            "recovered": sum(outcome.recovered for outcome in of_kind),
            "batches computed again": sum(outcome.batches_again for outcome in of_kind),
            "most of one run": max(outcome.batches_again for outcome in of_kind),
            "results lost": sum(bool(outcome.lost) for outcome in of_kind),
            "problems": sum(bool(outcome.problems) for outcome in of_kind),
        }
    return found


def main() -> None:
    """Draw a plan, or run one and print its counts."""
    parser = argparse.ArgumentParser(
        description="Inject faults into runs, resume them, and count what was lost."
    )
    parser.add_argument("--plan", type=Path, default=HERE / "plan.json")
    parser.add_argument(
        "--make", type=int, help="draw a plan with so many faults of each kind, and run nothing"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the plan")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--model", nargs="+", default=["model=tiny_random"], help="overrides that choose the model"
    )
    options = parser.parse_args()
    if options.make:
        plan = make_plan(options.make, options.seed, options.kinds)
        lines = ",\n".join(json.dumps(asdict(fault)) for fault in plan)
        options.plan.write_text(f"[\n{lines}\n]\n")
        return
    plan = [Fault(**values) for values in json.loads(options.plan.read_text())]
    import_everything()
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        reference = Reference(options.model, Path(name))
        for fault in (fault for fault in plan if fault.fault in options.kinds):
            outcomes.append(meet(fault, reference, Path(name)))
            bad = outcomes[-1].lost or outcomes[-1].problems
            print(json.dumps(asdict(outcomes[-1])) if bad else ".", end="\n" if bad else "", flush=True)
            if options.out:
                lines = ",\n".join(json.dumps(asdict(outcome)) for outcome in outcomes)
                options.out.write_text(
                    f'{{"summary": {json.dumps(summary(outcomes))},\n"outcomes": [\n{lines}\n]}}\n'
                )
    print()
    for kind, counts in summary(outcomes).items():
        print(kind, counts)
    sys.exit(any(outcome.lost or outcome.problems for outcome in outcomes))


def import_everything() -> None:
    """Import what a run needs, once for all children; one thread, as a fork keeps no other."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    import datasets  # noqa: F401
    import hydra._internal.hydra  # noqa: F401

    import reft_lightning.cli
    import reft_lightning.runs.experiment  # noqa: F401


if __name__ == "__main__":
    main()
