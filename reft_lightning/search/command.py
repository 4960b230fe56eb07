"""``reft-search``: search the settings of several methods on one budget, then test the winner of each once.

Workers take trials from one study (:mod:`.study`) and run each in a process of its own (:mod:`.trial`). When no
trial is left they train the winners again, with every seed of the plan (:mod:`.plan`).
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .process import end_with_parent, interruptible, last_lines, said_of, start, stop
from .search_plan import Plan, key_of, parse_plan, read_argument, read_plan
from .space import override, quiet_optuna

log = logging.getLogger(__name__)
USAGE = """reft-search search=NAME|FILE [folder=FOLDER] [workers=N] [key=value ...]
       reft-search folder=FOLDER [workers=N] [budget.amount=N]      goes on with a study
       reft-search search=NAME multirun=METHOD                      prints a method's grid for reft-train
keys:  budget.unit, budget.amount, sampler, sampler_seed, startup_trials, pruner, seeds, methods;
       every other one is an argument of reft-train for all runs"""
PLAN_FILE = "study.yaml"
WAIT = 0.5  # seconds between two looks for a trial, while others run the last ones
Runner = Callable[[Any], str]


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: for arguments, a plan or a study that do not fit.
    """
    own = {key_of(text): text.partition("=")[2] for text in argv if key_of(text) in ("search", "folder", "workers",
                                                                                   "multirun")}  # fmt: skip
    rest = [text for text in argv if key_of(text) not in own]
    if any("=" not in text for text in argv):
        raise ValueError(
            f"arguments are written key=value; got {next(t for t in argv if '=' not in t)!r}\n{USAGE}"
        )
    workers = own.get("workers", "1")
    if not workers.isdecimal() or int(workers) < 1:
        raise ValueError(f"workers must be an integer, 1 or more; got {workers!r}")
    if "multirun" in own:
        sys.stdout.write(multirun_command(read_plan(own.get("search", ""), rest), own["multirun"]) + "\n")
        return
    since = time.time()
    folder = prepare(own, rest)
    with interruptible():
        try:
            run(folder, int(workers), since)
        except KeyboardInterrupt:
            sys.stderr.write(f"stopped; go on with: reft-search folder={folder}\n")
            sys.exit(130)
    _report(folder, since)


def prepare(own: Mapping[str, str], rest: Sequence[str]) -> Path:
    """Check a new study and write its plan, or find one to go on with; return the folder."""
    folder = Path(own["folder"]) if "folder" in own else None
    exists = folder is not None and (folder / PLAN_FILE).is_file()
    if "search" not in own:
        if folder is not None and not folder.is_dir():
            from ..suggest import did_you_mean

            beside = [str(p) for p in folder.parent.glob("*") if p.is_dir()]
            raise ValueError(
                f"folder={folder}: no such folder{did_you_mean(str(folder), beside)}; to begin a study there, add "
                "search=NAME"
            )
        if folder is not None and not exists:
            raise ValueError(
                f"folder={folder} holds no study: it has no {PLAN_FILE}; to begin one there, add search=NAME"
            )
        if not exists:
            raise ValueError(f"search=NAME is missing, or folder=FOLDER of a study that has begun\n{USAGE}")
        go_on(folder, rest)
        return folder
    plan = read_plan(own["search"], rest)
    if exists:
        _check_same(plan, folder)
        return folder
    from .preflight import check_corners, check_rows, compose_corners

    corners = compose_corners(plan)
    monitor, mode = check_corners(plan, corners)
    check_rows(plan, corners)
    if folder is None:
        from ..storage.atomic import new_folder

        folder = new_folder(Path("outputs") / "search" / Path(plan.name).name)
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, plan, monitor, mode, os.getcwd())
    return folder


def write_plan(folder: Path, plan: Plan, monitor: str, mode: str, directory: str) -> None:
    """Write ``study.yaml``: the plan, the score that decides, and where its runs start."""
    version = quiet_optuna().__version__
    more = {"monitor": monitor, "mode": mode, "directory": directory, "optuna": version}
    values = {"name": plan.name, **more, **plan.to_dict()}
    partial = folder / f"{PLAN_FILE}.partial"
    partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.replace(folder / PLAN_FILE)


def read_study_plan(folder: Path) -> tuple[Plan, dict[str, str]]:
    """Read ``study.yaml``; return the plan, and monitor, mode, directory and Optuna's version."""
    path = folder / PLAN_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} is no study: it has no {PLAN_FILE}; begin one with reft-search search=NAME"
        )
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    more = {key: values.pop(key) for key in ("monitor", "mode", "directory", "optuna")}
    return parse_plan(values.pop("name"), values, where=str(path)), more


def go_on(folder: Path, rest: Sequence[str]) -> None:
    """Raise the budget of a study, where asked for; nothing else of it can change.

    Raises:
        ValueError: for another change, or once a test split was read.
    """
    plan, more = read_study_plan(folder)
    for text in rest:
        key = key_of(text)
        if key != "budget.amount":
            raise ValueError(
                f"{text}: {folder} has its plan; only budget.amount can be raised, or begin another study"
            )
        values = plan.to_dict()
        values["budget"] |= read_argument(key, text.partition("=")[2])["budget"]
        raised = parse_plan(plan.name, values, where=text)
        if raised.amount < plan.amount:
            raise ValueError(
                f"{text}: the study has a budget of {plan.amount} {plan.unit}, which can only be raised"
            )
        if raised.amount > plan.amount and (folder / "test_reads.jsonl").is_file():
            raise ValueError(
                f"{text}: test rows of this study have been read; more trials would select knowing them. Begin another "
                "study"
            )
        write_plan(folder, raised, more["monitor"], more["mode"], more["directory"])


def _check_same(plan: Plan, folder: Path) -> None:
    earlier = read_study_plan(folder)[0].to_dict()
    differ = [key for key, value in plan.to_dict().items() if earlier[key] != value]
    if differ:
        raise ValueError(
            f"{folder} holds a study with another plan: {', '.join(differ)} differ; go on with it as it is by "
            f"reft-search folder={folder}, or give another folder"
        )


# --- workers ------------------------------------------------------------------------------------------------


def run(folder: Path, workers: int = 1, since: float | None = None) -> None:
    """Run what is left of a study, with as many workers, each with a GPU of its own where there are several.

    Args:
        folder: of the study.
        workers: processes.
        since: when the command was started; None: now.
    """
    plan, _ = read_study_plan(folder)
    since = time.time() if since is None else since
    if workers == 1:
        work(open_study(folder, since=since), in_process_of_its_own(folder, {}))
        return
    devices = _devices()
    threads = {} if "OMP_NUM_THREADS" in os.environ else {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))
    }  # fmt: skip
    started = []
    try:
        for i in range(workers):
            device = {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {}
            arguments = [
                "reft_lightning.search",
                str(folder),
                repr(since),
                *(f"{k}={v}" for k, v in threads.items()),
            ]
            started.append(start(arguments, folder / "workers" / f"{i}.log", device))
        log.info("search %s: %d workers; their logs are in %s", plan.name, workers, folder / "workers")
        for i, process in enumerate(started):
            code = process.wait()
            if code:
                ending = last_lines(folder / "workers" / f"{i}.log")
                log.error("worker %d ended with %s; the others go on:\n%s", i, said_of(code), ending)
    finally:
        for process in started:
            process.stdin.close()  # all end at the same time
        for process in started:
            stop(process, patience=30)  # each ends its trial first


def run_worker(argv: Sequence[str]) -> None:
    """Be one of several workers: ``python -m reft_lightning.search FOLDER SINCE [VARIABLE=VALUE ...]``."""
    end_with_parent(signal.SIGTERM)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    folder, since = Path(argv[0]), float(argv[1])
    environment = dict(text.split("=", 1) for text in argv[2:])
    with interruptible():
        try:
            work(open_study(folder, environment, since), in_process_of_its_own(folder, environment))
        except KeyboardInterrupt:
            sys.exit(130)


def open_study(folder: Path, environment: Mapping[str, str] | None = None, since: float | None = None) -> Any:
    """Return the :class:`~reft_lightning.search.command.study.Study` of a folder."""
    from .study import Study

    plan, more = read_study_plan(folder)
    if more["optuna"] != quiet_optuna().__version__:
        log.warning(
            "%s was begun with Optuna %s, and this is %s: the trials to come may be others than they would have been",
            folder, more["optuna"], quiet_optuna().__version__,
        )  # fmt: skip
    return Study(folder, plan, more["monitor"], more["mode"] == "max", environment, since)


def work(study: Any, runner: Runner) -> None:
    """Take trials until none is left, then runs of the winners.

    Args:
        study: several processes may work on one.
        runner: runs a job; returns how it failed, or nothing.
    """
    from .summary import summarize

    while True:
        job = study.take_trial()
        if job is None:
            with study.lock:  # one look: a trial that ends between two could leave room for another
                searched = study.searched()
            if searched:
                break
            time.sleep(WAIT)
            continue
        try:
            ended = ""
            if not study.finished_before(job):
                study.prepare(job)
                log.info("trial %s: %s", job.name, " ".join(override(k, v) for k, v in job.params.items()))
                ended = runner(job)
            outcome = study.tell_trial(job, ended)
        finally:
            job.lock.release()
        log.log(logging.ERROR if ended else logging.INFO, "trial %s: %s %s", job.name, outcome, ended)
        summarize(study)
    while (job := study.take_winner()) is not None:
        try:
            study.prepare(job)
            log.info("winner %s: trained again, and tested", job.name)
            ended = runner(job)
            outcome = study.tell_winner(job, ended)
        finally:
            job.lock.release()
        level = logging.ERROR if outcome == "failed" else logging.INFO
        log.log(level, "winner %s: %s %s", job.name, outcome, ended)
        summarize(study)


def in_process_of_its_own(folder: Path, environment: Mapping[str, str]) -> Runner:
    """Return what runs a job in a process, so that neither an error nor the want of memory ends the study."""
    directory = Path(read_study_plan(folder)[1]["directory"])

    def run_job(job: Any) -> str:
        output = job.folder / "log.txt"
        process = start(
            ["reft_lightning.search.trial", str(job.folder)], output, environment, directory, job.lock
        )
        try:
            code = process.wait()
        finally:
            stop(process)
        return f"{said_of(code)}\n{last_lines(output)}" if code else ""

    return run_job


def _devices() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


# --- what is said -------------------------------------------------------------------------------------------


def multirun_command(plan: Plan, method: str) -> str:
    """Return a method's grid as a plain Hydra multirun.

    Raises:
        ValueError: for a method that the plan lacks, or a range without ``points``.
    """
    from ..suggest import did_you_mean

    if method not in plan.methods:
        raise ValueError(f"multirun={method}: {plan.name} has {', '.join(plan.methods)}"
                         f"{did_you_mean(method, plan.methods)}")  # fmt: skip
    own = plan.methods[method]
    sweeps = []
    for dimension in own.space:
        texts = [override(dimension.name, value).partition("=")[2] for value in dimension.grid()]
        sweeps.append(f"{dimension.name}={','.join(texts)}")
    return shlex.join(["reft-train", "--multirun", *plan.base, *own.overrides, *sweeps, "sealed=true"])


def _report(folder: Path, since: float) -> None:
    from .summary import print_summary, summarize

    values = summarize(open_study(folder, since=since))
    print_summary(values, folder)
    lost = [name for name, method in values["methods"].items() if method["best"] is None]
    lost += [
        f"{name} seed {seed}" for name, method in values["methods"].items()
        for seed, winner in method["winners"].items() if winner["status"] != "complete"
    ]  # fmt: skip
    early = [name for name, method in values["methods"].items() if method["gave_up"]]
    if values["status"] != "complete" and not lost:
        log.error("the study has not ended; go on with: reft-search folder=%s", folder)
    if early:
        log.error(
            "ended before their budget: %s; mend the cause, which stands in %s, and go on with: reft-search folder=%s",
            ", ".join(early), folder / "summary.json", folder,
        )  # fmt: skip
    if lost:
        log.error("without a result: %s; the causes stand in %s", ", ".join(lost), folder / "summary.json")
    if early or lost or values["status"] != "complete":
        sys.exit(1)
