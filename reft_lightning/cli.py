"""The commands: ``reft-train`` and the others that ``pyproject.toml`` names.

Torch and transformers are imported after the arguments have been checked, so that a typo is answered at once, and
under :func:`heavy_imports`.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from .config import compose
from .runs import sweep
from .suggest import did_you_mean, names_of_a_stranger, no_such_folder
from .terminal.bars import Bar, is_first_process
from .terminal.log_lines import LogHandler

EVAL_USAGE = "reft-eval run=FOLDER [split=validation|test] [limit=N] [trust_code=true]"
RESUME_USAGE = "reft-train resume=FOLDER [trust_code=true]"
CHAT_USAGE = "reft-chat run=FOLDER [max_new_tokens=N] [template=plain|alpaca|chat] [trust_code=true]"
REPORT_USAGE = (
    "reft-report FOLDER [FOLDER ...] [out=DIR] [split=test|validation] [resamples=N]\n"
    "                   [seed=N] [wandb=true] [project=NAME]\n       reft-report paper [folder=outputs] [table=N]"
)
INSPECT_USAGE = (
    "reft-inspect FOLDER [FOLDER ...] [rows=32] [forget=NAME [data.KEY=VALUE ...]]\n"
    "             [text=FILE] [out=DIR] [trust_code=true]\n"
    "       reft-inspect plan [prompt=N [target=N]] [gpu=NAME] KEY=VALUE ..."
)
SERVE_USAGE = (
    "reft-serve FOLDER [FOLDER ...] [adapters.NAME=FOLDER ...] [model=NAME] [host=127.0.0.1]\n"
    "             [port=8000] [max_batch=16] [trust_code=true]"
)
DASHBOARD_USAGE = (
    "reft-dashboard FOLDER [FOLDER ...] [entity=NAME] [project=NAME] [out=DIR]\n"
    "       reft-dashboard FILE.json"
)
CONVERT_USAGE = (
    "reft-convert FOLDER to=reft|pyreft|easysteer [out=DIR] [base=MODEL] [positions=SPEC]\n"
    "             [act_fn=NAME] [method=noreft|direft]"
)
EVAL_HELP = f"""\
reft-eval: evaluate the adapter of a run again, on its validation rows or its test rows
usage: {EVAL_USAGE}
  split         validation, or test: each read of test rows is recorded in the run
  limit         at most this many rows (of each test task)
  trust_code    import names that the folder holds from the present directory, too
examples:
  reft-eval run=outputs/quickstart/2026-11-29_10-00-00
  reft-eval run=outputs/quickstart/2026-11-29_10-00-00 split=test limit=100
Scores and predictions are written to evaluations/ inside the run folder.
"""
SERVE_HELP = f"""\
reft-serve: answer requests as OpenAI's API does, with many adapters on one base model
usage: {SERVE_USAGE}
  FOLDER         a run or an adapter; its last part is its name in requests
  adapters.NAME  the folder of an adapter under a name of your choice
  model          the base model, a file of conf/model; that of the first run unless given
  host, port     where to listen; beyond this machine only with a token in REFT_SERVE_TOKEN
  max_batch      requests that are generated together, whichever adapters they use
  trust_code     import names that the folders hold from the present directory, too
examples:
  reft-serve outputs/quickstart/2026-11-29_10-00-00
  reft-serve adapters.polite=outputs/a adapters.short=outputs/b/adapter port=9000
  curl localhost:8000/v1/completions -H 'content-type: application/json' \\
       -d '{{"model": "polite", "prompt": "4 * 8 =", "max_tokens": 4, "temperature": 0}}'
The model `base` is the frozen one. "strength": 0.5 in a request halves the edits.
"""
CHAT_HELP = f"""\
reft-chat: talk to the frozen base and the adapted model of a run, side by side
usage: {CHAT_USAGE}
  max_new_tokens  of each answer, 64 unless given
  template        the format of each prompt; that of the training rows unless given
  trust_code      import names that the folder holds from the present directory, too
examples:
  reft-chat run=outputs/quickstart/2026-11-29_10-00-00
  echo "Is water wet?" | reft-chat run=outputs/quickstart/2026-11-29_10-00-00 max_new_tokens=8
In the conversation: /plain, /alpaca and /chat choose the template, /image FILE shows a picture to a
model that reads them, /new begins another conversation, /quit ends.
"""
INSPECT_HELP = f"""\
reft-inspect: what the adapter of a run does, on its own validation rows
usage: {INSPECT_USAGE}
  FOLDER        a run of reft-train, or an adapter; several: how far their subspaces lie apart
  rows          validation rows that are read
  forget        another family's rows, a name of conf/data: the score on them before and after
  data.KEY      of these rows, such as data.path=FOLDER or data.tasks=[piqa]
  text          a text file, whose perplexity is measured before and after; one of ours without it
  out           where files are written; FOLDER/inspection without it
  trust_code    import names that the folder holds from the present directory, too
examples:
  reft-inspect outputs/quickstart/2026-11-29_10-00-00
  reft-inspect outputs/quickstart/2026-11-29_10-00-00 rows=64 \\
      forget=commonsense_wheel data.tasks=[boolq]
  reft-inspect plan experiment=quickstart intervention.rank=4 gpu=h100
It writes inspect.json, PNG and SVG. `plan` says what a run of reft-train will cost, before weights
are read: KEY=VALUE as there; prompt and target give lengths of rows instead of the data's; gpu, on
which GPU the run takes how long at least, such as h100, a100_80gb or rtx_4090.
"""
DASHBOARD_HELP = f"""\
reft-dashboard: a workspace and a report page in W&B of runs that were logged there
usage: {DASHBOARD_USAGE}
  FOLDER        run folders, multiruns, studies of reft-search, or what holds them
  FILE.json     what an earlier command wrote, to send it
  entity        of W&B; project: that of the runs unless given
  out           where dashboard.json is written without a key of W&B: dashboard/ unless given
examples:
  reft-dashboard outputs/quickstart
  reft-dashboard dashboard/dashboard.json entity=NAME
"""
CONVERT_HELP = f"""\
reft-convert: an adapter of reft_lightning, pyreft or adapters, written for another
usage: {CONVERT_USAGE}
  FOLDER        an adapter of any of the three, or a run of reft-train
  to            reft (ours), pyreft, or easysteer (steering.json of its vLLM)
  out           a new folder; FOLDER-TO without it
  base          the model it was trained on, where FOLDER does not name it
  positions     of an adapter of pyreft, whose files hold none, such as f7+l7
  act_fn        of an adapter of pyreft that was trained with one
  method        of an adapter of adapters without orthogonality: noreft or direft
examples:
  reft-convert outputs/quickstart/2026-11-29_10-00-00 to=pyreft out=for-pyreft
  reft-convert theirs to=reft base=meta-llama/Llama-2-7b-hf positions=f5+l5
What the other library cannot hold is said, and what it does not have is refused.
"""
REPORT_HELP = f"""\
reft-report: compare runs: tables, intervals, paired tests, plots, one HTML page
usage: {REPORT_USAGE}
  FOLDER        run folders, multiruns, studies of reft-search, or what holds them
  out           where the report is written: report/ unless given
  split         the scores to compare: test where a run has it, else validation
  resamples     of the bootstrap and of the sign flips; seed: of their draws
  wandb         log tables and page to W&B (project), offline unless WANDB_MODE=online
examples:
  reft-report outputs
  reft-report outputs/run/multirun_2026-11-29_10-00-00 out=report
  reft-report paper table=2         the paper's numbers next to those of your runs
"""
SPLITS = ("validation", "test")
TEMPLATES = ("plain", "alpaca", "chat")
LIBRARIES = ("reft", "pyreft", "easysteer")


class UsageError(ValueError):
    """An argument of a command other than ``reft-train`` does not fit."""


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and what needs it without looking for garbage, which takes a sixth of the time and finds none.

    What was imported stays as long as the process does: later searches leave it out.
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
def _interruptible() -> Iterator[None]:
    """Answer Ctrl-C with its exit status and a word, wherever it comes; a run that has begun has said more."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


@contextmanager
def _told() -> Iterator[None]:
    """Leave with status 1 where the log has said in one line what stopped a run; what it has not said is raised."""
    try:
        yield
    except Exception as error:
        from .runs.experiment import SetupError
        from .runs.stopping import trouble_of

        if isinstance(error, SetupError) or trouble_of(error) is None:
            raise
        sys.exit(1)


@_interruptible()
def train() -> Any:
    """Train, validate and test one configuration, or each one of a ``--multirun``.

    ``resume=FOLDER`` alone goes on with that run, under the configuration that it keeps.
    """
    keys = sorted(text.partition("=")[0] for text in sys.argv[1:])
    if keys in (["resume"], ["resume", "trust_code"]):
        return _command(_resume, RESUME_USAGE, RESUME_USAGE)
    _import_from_here()  # intervention.method=my_module.RED finds my_module.py here
    # Hydra's parser reads no argument after a flag that follows one
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda text: text not in ("-m", "--multirun"))
    asked = compose.preflight(sys.argv[1:])
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


def _check_folder(asked: compose.Asked) -> None:
    """Leave a complete run alone before Hydra writes into its folder."""
    from .runs.run_folder import check_free

    first = next(iter(asked.runs.values()), None)
    if asked.folder is None or first is None or first.resume:
        return
    try:
        for folder in (asked.folder, *(asked.folder.glob("[0-9]*_*/") if asked.sweep else ())):
            check_free(folder, first.overwrite)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def _find_unfinished(asked: compose.Asked) -> None:
    """Let Hydra write into the folder of the run that ``resume=auto`` goes on with.

    A sweep finds its jobs, and ranks that a cluster started find each other, in a folder that is named only.
    """
    from .runs.run_folder import find_unfinished

    if asked.folder is not None:
        return
    ranks = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    if asked.sweep or ranks > 1:
        name, who = ("sweep", "a sweep finds its jobs") if asked.sweep else ("run", "ranks find each other")
        sys.stderr.write(f"resume=auto: {who} in a folder that you name: add hydra.{name}.dir=FOLDER\n")
        sys.exit(2)
    if found := find_unfinished(asked.parent, next(iter(asked.runs.values()))):
        sys.argv.append(compose.run_dir(found))


def _check_jobs(asked: compose.Asked) -> None:
    """Check the jobs of a sweep before the first one, as far as neither rows nor weights are needed."""
    with heavy_imports():
        from .runs.build import check_jobs

        try:
            check_jobs(asked.runs)
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(2)


def _resume(argv: Sequence[str]) -> None:
    options = _options(argv, ("resume", "trust_code"))
    run_dir = _run_dir(options, "resume")
    with _names_of(options) as trusted:
        with heavy_imports():
            from .runs import experiment

        with _told():
            experiment.resume(run_dir, trusted)


def _import_from_here() -> None:
    """Let import paths name modules of the present directory, as only the user's own commands may."""
    sys.path.insert(0, os.getcwd())


@contextmanager
def _names_of(options: dict[str, str]) -> Iterator[bool]:
    """Read the folder of another person: its names are imported from installed packages only, unless it is trusted."""
    trusted = _choice(options, "trust_code", ("false", "true")) == "true"
    if trusted:
        _import_from_here()
    with names_of_a_stranger(trusted):
        yield trusted


def _train(config: DictConfig, job: sweep.Job) -> float | None:
    results = _results(config, Path(HydraConfig.get().runtime.output_dir), job)
    # Sweepers maximise or minimise what a job returns; a run without validation has nothing to return.
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

        try:
            check_accelerator(config.trainer.accelerator)  # torch alone takes a fifth of what follows
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(2)
        from .runs import experiment
        from .runs.shared_base import present_lane
        from .runs.wandb_names import filed, label

    lane = present_lane()
    try:
        command = ["reft-train", *own_process.job_arguments(sys.argv[1:])]
        run = compose.to_config(config)
        run = filed(run, name=label(run, compose.differing(HydraConfig.get().overrides.task)))
        if lane is not None:
            run = filed(run, reinit="create_new")  # one W&B run a job, though others are open
        with nullcontext() if own_process.in_sweep() else _told():
            return experiment.run(run, run_dir, _experiment(), command=command, lane=lane)
    except experiment.SetupError as error:
        if own_process.in_sweep():
            raise  # the other jobs go on
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def _experiment() -> str | None:
    return HydraConfig.get().runtime.choices.get("experiment")


def evaluate() -> None:
    """Evaluate the adapter of a finished run again."""
    _command(_evaluate, EVAL_USAGE, EVAL_HELP)


def _evaluate(argv: Sequence[str]) -> None:
    options = _options(argv, ("run", "split", "limit", "trust_code"))
    run_dir = _run_dir(options)
    split = _choice(options, "split", SPLITS)
    limit = _count(options, "limit")
    with heavy_imports():
        from .runs.evaluate import evaluate as evaluate_run

    with _names_of(options):
        evaluate_run(run_dir, split, limit)


def chat() -> None:
    """Talk to the model of a finished run."""
    _command(_chat, CHAT_USAGE, CHAT_HELP)


def _chat(argv: Sequence[str]) -> None:
    options = _options(argv, ("run", "max_new_tokens", "template", "trust_code"))
    run_dir = _run_dir(options)
    template = _choice(options, "template", TEMPLATES) if "template" in options else None
    max_new_tokens = _count(options, "max_new_tokens") or 64
    with heavy_imports():
        from .runs import chat as conversation

    with _names_of(options):
        conversation.main(run_dir, max_new_tokens, template)


def inspect() -> None:
    """Show what the adapter of a run does inside its model."""
    _command(_inspect, INSPECT_USAGE, INSPECT_HELP)


def _is_folder(text: str) -> bool:
    """Whether an argument is a folder and no option; the jobs of a sweep are called 0_seed=1."""
    return "=" not in text or Path(text).is_dir()


def _plan(argv: Sequence[str]) -> None:
    own = ("prompt", "target", "gpu")
    mine = [text for text in argv if text.partition("=")[0] in own]
    options = _options(mine, own)
    if "target" in options and "prompt" not in options:
        raise UsageError("target=N is the length of what follows a prompt: add prompt=N")
    _import_from_here()
    counts = {name: _count(options, name) for name in ("prompt", "target")}
    with heavy_imports():
        from .inspection import plan
    plan.main([text for text in argv if text not in mine], gpu=options.get("gpu"), **counts)


def _inspect(argv: Sequence[str]) -> None:
    if argv[0] == "plan":
        _plan(argv[1:])
        return
    folders = [Path(text) for text in argv if _is_folder(text)]
    data = [text for text in argv if text.startswith("data.")]
    rest = [text for text in argv if not _is_folder(text) and text not in data]
    options = _options(rest, ("rows", "forget", "text", "out", "trust_code"))
    if not folders:
        raise UsageError(
            "FOLDER is missing: the folder that reft-train wrote, such as outputs/quickstart/..."
        )
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(no_such_folder(folder))
    if data and "forget" not in options:
        raise UsageError(f"{data[0]} is a key of the rows that forget=NAME names; add forget=NAME")
    forget = [f"data={options['forget']}", *data] if "forget" in options else []
    given: dict[str, Any] = {name: Path(options[name]) for name in ("text", "out") if name in options}
    if (rows := _count(options, "rows")) is not None:
        given["rows"] = rows
    with heavy_imports():
        from .inspection import command

    with _names_of(options):
        command.main(folders, forget=forget, **given)


def serve() -> None:
    """Answer requests with the adapters of some runs."""
    _command(_serve, SERVE_USAGE, SERVE_HELP)


def _serve(argv: Sequence[str]) -> None:
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
            raise UsageError(f"base is the frozen model: give {folder} another name, adapters.NAME={folder}")
        if name in folders:
            raise UsageError(f"two folders are called {name!r}: name one of them, adapters.NAME={folder}")
        folders[name] = folder
    options = _options(rest, ("model", "host", "port", "max_batch", "trust_code"))
    if not folders:
        raise UsageError(
            "FOLDER is missing: the folder that reft-train wrote, such as outputs/quickstart/..."
        )
    given: dict[str, Any] = {name: options[name] for name in ("model", "host") if name in options}
    given |= {name: _count(options, name) for name in ("port", "max_batch") if name in options}
    if given.get("port", 1) > 65535:
        raise UsageError(f"port must be at most 65535; got {given['port']}")
    with heavy_imports():
        from .serving import command

    with _names_of(options):
        command.main(folders, **given)


def judge() -> None:
    """Compare a model's outputs with those of a reference model, and print the win rate."""
    from .reporting.judging import command as judging

    _command(lambda argv: judging.main(_options(argv, judging.OPTIONS)), judging.USAGE, judging.HELP)


def search() -> None:
    """Search the settings of several methods on one budget, and test the winners once."""
    from .search import command as searching

    _import_from_here()  # the methods of a search may be the user's own
    _command(searching.main, searching.USAGE, searching.HELP)


def report() -> None:
    """Compare runs with each other; or, as ``reft-report paper``, with what the paper prints."""
    _command(_report, REPORT_USAGE, REPORT_HELP)


def _report(argv: Sequence[str]) -> None:
    what, *rest = argv
    if what == "paper":
        options = _options(rest, ("folder", "table"))
        from .reporting.paper import table

        table.main(options)
        return
    folders = [Path(text) for text in argv if _is_folder(text)]
    known = ("out", "split", "resamples", "seed", "wandb", "project")
    options = _options([text for text in argv if not _is_folder(text)], known)
    if not folders:
        raise UsageError("FOLDER is missing: runs, multiruns, studies, or what holds them")
    given: dict[str, Any] = {name: options[name] for name in ("project",) if name in options}
    given |= {"out": Path(options["out"])} if "out" in options else {}
    given |= {"split": _choice(options, "split", SPLITS)} if "split" in options else {}
    for name, least in (("resamples", 1), ("seed", 0)):
        given |= {name: _count(options, name, least)} if name in options else {}
    given["wandb"] = _choice(options, "wandb", ("false", "true")) == "true"
    from .reporting import command

    command.main(folders, **given)


def dashboard() -> None:
    """Make a workspace and a report page in W&B of runs that were logged there."""
    _command(_dashboard, DASHBOARD_USAGE, DASHBOARD_HELP)


def _dashboard(argv: Sequence[str]) -> None:
    folders = [Path(text) for text in argv if _is_folder(text)]
    options = _options([text for text in argv if not _is_folder(text)], ("entity", "project", "out"))
    if not folders:
        raise UsageError("FOLDER is missing: a run, a sweep, or a study")
    for folder in folders:
        if not folder.exists():
            siblings = [str(path) for path in folder.parent.glob("*")]  # a file of views, too
            raise UsageError(f"{folder}: no such folder{did_you_mean(str(folder), siblings)}")
    from .reporting import dashboard as making

    making.main(folders, Path(options.get("out", "dashboard")), options.get("entity"), options.get("project"))


def convert() -> None:
    """Write an adapter of one library for another."""
    _command(_convert, CONVERT_USAGE, CONVERT_HELP)


def _convert(argv: Sequence[str]) -> None:
    folders = [Path(text) for text in argv if _is_folder(text)]
    names = ("to", "out", "base", "positions", "act_fn", "method")
    options = _options([text for text in argv if not _is_folder(text)], names)
    if len(folders) != 1 or not folders[0].is_dir():
        siblings = [str(path) for folder in folders for path in folder.parent.glob("*/")]
        given = " ".join(map(str, folders))
        raise UsageError(
            "FOLDER must be one folder of an adapter or a run; got "
            + (f"{given}{did_you_mean(given, siblings)}" if given else "none")
        )
    if "to" not in options:
        raise UsageError(f"to=... is missing: one of {', '.join(LIBRARIES)}")
    to = _choice(options, "to", LIBRARIES)
    out = Path(options.get("out", f"{folders[0].resolve().name}-{to}"))
    with heavy_imports():
        from .exchange import command

    given = {name: options[name] for name in ("base", "positions", "act_fn", "method") if name in options}
    command.main(folders[0], to, out, **given)


@_interruptible()
def _command(action: Callable[[Sequence[str]], Any], usage: str, help_text: str) -> None:
    argv = sys.argv[1:]
    if not argv or {"-h", "--help"} & set(argv):
        (sys.stdout if argv else sys.stderr).write(help_text)
        sys.exit(0 if argv else 2)
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", handlers=[LogHandler()]
    )
    try:
        action(argv)
    except UsageError as error:
        sys.stderr.write(f"{error}\nusage: {usage}\n")
        sys.exit(2)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def _options(argv: Sequence[str], allowed: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for argument in argv:
        name, equals, value = argument.partition("=")
        if not equals:
            hint = f"; for a folder write {allowed[0]}={argument}" if Path(argument).is_dir() else ""
            raise UsageError(f"arguments are written key=value; got {argument!r}{hint}")
        if name not in allowed:
            raise UsageError(
                f"unknown argument {name!r}; known are {', '.join(allowed)}{did_you_mean(name, allowed)}"
            )
        options[name] = value
    return options


def _choice(options: dict[str, str], name: str, allowed: Sequence[str]) -> str:
    value = options.get(name, allowed[0])
    if value not in allowed:
        hint = did_you_mean(value, allowed)
        raise UsageError(f"{name} must be one of {', '.join(allowed)}; got {value!r}{hint}")
    return value


def _count(options: dict[str, str], name: str, least: int = 1) -> int | None:
    value = options.get(name)
    if value is not None and not (value.isdecimal() and int(value) >= least):
        raise UsageError(f"{name} must be an integer, {least} or more; got {value!r}")
    return None if value is None else int(value)


def _run_dir(options: dict[str, str], key: str = "run") -> Path:
    if not options.get(key):
        raise UsageError(
            f"{key}=FOLDER is missing: the folder that reft-train wrote, such as outputs/quickstart/..."
        )
    folder = Path(options[key])
    if not folder.is_dir():
        raise UsageError(f"{key}={no_such_folder(folder)}")
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{key}={folder} is not a run folder: it has no config.yaml")
    return folder


if __name__ == "__main__":
    train()
