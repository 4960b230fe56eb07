"""``reft-search``: search the settings of several methods with equal budgets, then test the winner of each once.

Workers run the trials of one study (:mod:`.study`), each in its own process (:mod:`.trial`), and then retrain the
winners with every seed of the plan (:mod:`.search_plan`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.overrides import key_of
from ..storage.atomic import new_folder
from ..suggest import no_such_folder
from .ledger import test_reads
from .process import Lock, failure, start, stop
from .search_plan import PRUNERS, SAMPLERS, Plan, change_plan, read_plan
from .study import Study, open_storage, read_study, write_study
from .study_files import LOCKS, PLAN, SUMMARY, WORKERS
from .summary import print_summary, summarize
from .watching import watched
from .worker import TRUSTED, Worker

log = logging.getLogger(__name__)
USAGE = """reft-search search=NAME|FILE [folder=FOLDER] [workers=N] [storage=URL] [key=value ...]
       reft-search folder=FOLDER [workers=N] [budget.amount=N] [trust_code=true]   continues"""
HELP = f"""\
reft-search: search the settings of several methods with equal budgets, then test each winner once
usage: {USAGE}
  search    a file in conf/search, or your own YAML file: base, methods, space, budget, seeds
  folder    folder of the study; default: outputs/search/NAME
  workers   number of processes, each with its own GPU if there are several
  storage   an Optuna database, such as postgresql://HOST/NAME, instead of a file in the folder
  trust_code  when continuing, also import code named in the study from its directory
  keys      budget.unit, budget.amount, sampler ({", ".join(SAMPLERS)}), sampler_seed, startup_trials,
            pruner ({", ".join(PRUNERS)}), seeds, methods; any other is an argument of
            reft-train for all runs
examples:
  reft-search search=small_stsb data.path=FOLDER
  reft-search search=mine.yaml budget.amount=20 workers=2
  reft-search folder=outputs/search/small_stsb               # continue a stopped study
  reft-report outputs/search/small_stsb                      # tables and plots of a study
Trials see validation rows only; summary.json has the winners and every read of test rows.
"""
OWN = ("search", "folder", "workers", "storage", "trust_code")


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    for text in argv:
        if "=" not in text:
            raise ValueError(f"arguments must have the form key=value; got {text!r}\n{USAGE}")
    own = {key_of(text): text.partition("=")[2] for text in argv if key_of(text) in OWN}
    workers = own.get("workers", "1")
    if not workers.isdecimal() or int(workers) < 1:
        raise ValueError(f"workers must be an integer, at least 1; got {workers!r}")
    trust_code = own.get("trust_code", "false")
    if trust_code not in ("true", "false"):
        raise ValueError(f"trust_code must be true or false; got {trust_code!r}")
    # with search=, the plan is the user's own, or identical to it
    trusted = "search" in own or trust_code == "true"
    folder = prepare_study(own, [text for text in argv if key_of(text) not in OWN])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    study = Study(folder)
    study.start()
    try:
        with watched(folder):
            if int(workers) == 1:
                Worker(study, trusted=trusted).work()
            else:
                start_workers(folder, int(workers), trusted)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; to continue: {_go_on(folder)}\n")
        sys.exit(130)
    _report(study)


def prepare_study(own: Mapping[str, str], rest: Sequence[str]) -> Path:
    """Check a new study and write its plan, or find a study to continue; return the folder."""
    folder = Path(own["folder"]) if "folder" in own else None
    if folder is not None and ((folder / PLAN).is_file() or "search" not in own):
        go_on(folder, own.get("search"), rest)
        return folder
    if "search" not in own:
        raise ValueError(f"search=NAME is missing, or folder=FOLDER of an existing study\n{USAGE}")
    plan = read_plan(own["search"], rest)
    from .preflight import check_corners, check_rows, compose_corners

    corners = compose_corners(plan)
    monitor = check_corners(plan, corners)
    check_rows(plan, corners)
    if "storage" in own:
        open_storage(Path(), own["storage"])
    folder = folder or new_folder(Path("outputs") / "search" / Path(plan.name).name)
    begin_study(folder, plan, *monitor, storage=own.get("storage"))
    return folder


def begin_study(folder: Path, plan: Plan, monitor: str, mode: str, storage: str | None = None) -> None:
    """Write the plan of a new study to a folder without one; its runs start in the current directory."""
    folder.mkdir(parents=True, exist_ok=True)
    study = f"{plan.name}-{secrets.token_hex(4)}"  # a database may contain other searches of this name
    more = {"monitor": monitor, "mode": mode, "directory": os.getcwd(), "storage": storage, "study": study}
    with Lock(folder / LOCKS / "turn"):
        if (folder / PLAN).is_file():
            raise ValueError(f"{folder}: another command has started a study there; give another folder")
        write_study(folder, plan, **more)


def go_on(folder: Path, search: str | None, arguments: Sequence[str]) -> None:
    """Raise the budget of a study if asked to, unless test rows were read; refuse any other change of its plan."""
    if not folder.is_dir():
        raise ValueError(f"folder={no_such_folder(folder)}; to start a study there, add search=NAME")
    earlier, more = read_study(folder)
    plan = change_plan(earlier, arguments) if search is None else read_plan(search, arguments)
    before, amount = dataclasses.asdict(earlier), plan.budget.amount
    same: dict[str, Any] = dataclasses.asdict(plan) | {"name": earlier.name}
    same["budget"]["amount"] = earlier.budget.amount
    differ = [key for key, value in same.items() if before[key] != value]
    if differ:
        raise ValueError(
            f"{folder} holds a study whose plan differs in {', '.join(differ)}; only budget.amount can be raised: "
            f"continue that study with reft-search folder={folder}, or give another folder"
        )
    if amount < earlier.budget.amount:
        raise ValueError(
            f"budget.amount={amount}: the study's budget of {earlier.budget.amount} {plan.budget.unit} can only be "
            "raised"
        )
    if amount > earlier.budget.amount:
        if test_reads(folder):
            raise ValueError(
                f"budget.amount={amount}: test rows of this study have been read, so more trials would be selected "
                "with knowledge of them. Start another study"
            )
        write_study(folder, dataclasses.replace(earlier, budget=plan.budget), **more)


# --- workers ------------------------------------------------------------------------------------------------


def start_workers(folder: Path, workers: int, trusted: bool = True) -> None:
    """Run workers as processes, each with its own GPU if there are several, and wait for them."""
    devices = _devices()
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    started = []
    try:
        for i in range(workers):
            environment = {"OMP_NUM_THREADS": threads}
            if devices:
                environment["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
            output = folder / WORKERS / f"{i}.log"
            arguments = ["reft_lightning.search.worker", str(folder), *([TRUSTED] if trusted else [])]
            started.append((start(arguments, output, environment), output))
        log.info("%d workers; their logs are in %s", workers, folder / WORKERS)
        for i, (process, output) in enumerate(started):
            code = process.wait()
            if code:
                log.error("worker %d ended early; the others continue:\n%s", i, failure(code, output))
    finally:
        for process, _ in started:
            process.stdin.close()  # so that all end at the same time
        for process, _ in started:
            stop(process, patience=30)  # each ends its trial first


def _devices() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _go_on(folder: Path) -> str:
    return shlex.join(["reft-search", f"folder={folder}"])


def _report(study: Study) -> None:
    """Print the summary; exit with status 1 if something is missing."""
    values = summarize(study)
    print_summary(values, study.folder)
    methods = values["methods"].items()
    early = [name for name, method in methods if method["gave_up"]]
    lost = [name for name, method in methods if method["best"] is None]
    lost += [
        f"{name} seed {seed}" for name, method in methods
        for seed, winner in method["winners"].items() if winner["status"] != "complete"
    ]  # fmt: skip
    if early or lost or values["status"] != "complete":
        log.error(
            "the study is not complete: ended before their budget: %s; without a result: %s; the causes are in %s; to "
            "continue: %s",
            ", ".join(early) or "none", ", ".join(lost) or "none", study.folder / SUMMARY, _go_on(study.folder),
        )  # fmt: skip
        sys.exit(1)
