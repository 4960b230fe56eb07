"""One run: configuration -> objects -> (base) -> fit -> validate -> test -> ``results.json``.

Everything that can be wrong is checked before weights are loaded: the configuration, the interventions on a model
without weights, then the data.
"""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import WandbLogger

from ..config.identity import config_hash, differences
from ..config.schema import AUTO, Config
from ..storage.atomic import now, release_folder, write_json
from ..terminal.ranks import is_first_process
from ..training.best_checkpoint import BestCheckpoint
from ..training.checkpoint_files import read_checkpoint
from ..training.evaluation import evaluate
from ..training.module import check_precision
from ..training.wandb import finish_wandb
from .arguments import method_of
from .build import Objects, build, prepare
from .card import write_card
from .changed_answers import print_changed_answers
from .checks import check_batches, check_strategy
from .console import print_table
from .ddp_launch import leaving_no_ranks
from .devices import check_accelerator
from .environment import begin_peak_memory, environment, peak_memory_bytes, peak_reserved_bytes
from .results import Results, has_scores, read_results, write_predictions
from .run_folder import (
    at_commit,
    begun,
    hold,
    is_complete,
    last_checkpoint,
    load_run_config,
    make_room,
    other_base,
    write_run_config,
)
from .stopping import check_told_to_stop, signal_of, trouble_of, until_sigterm
from .trainer import build_trainer, check_ranks, log_settings, quiet_lightning
from .wandb_names import logs_adapter

if TYPE_CHECKING:
    from .shared_base import Lane

log = logging.getLogger(__name__)


class SetupError(ValueError):
    """A run cannot start as configured; the message says why. Nothing has been trained."""


class Halted(RuntimeError):
    """A callback ends the run on purpose: a search pruned it, or its budget is used up.

    Args:
        status: status in ``results.json``, such as ``pruned``.
        reason: why the run ends.
        values: additional values for ``results.json``.
    """

    def __init__(self, status: str, reason: str, **values: Any) -> None:
        super().__init__(reason)
        self.status, self.values = status, values


def run(
    config: Config,
    folder: Path,
    experiment: str | None = None,
    callbacks: Sequence[Callback] = (),
    command: Sequence[str] = (),
    lane: Lane | None = None,
) -> dict[str, Any]:
    """Train and evaluate as the configuration says; return the contents of ``results.json``.

    Args:
        config: a checked configuration.
        folder: the run folder, which is created. With ``resume`` the earlier run's folder is used instead; with
            ``resume=auto`` this folder is resumed if it holds a run, and a complete run's results are returned.
        experiment: the file in ``conf/experiment`` that the configuration was composed from; recorded.
        callbacks: Lightning callbacks in addition to those of the configuration. One that raises :class:`Halted`
            ends the run without an error.
        command: the command that repeats the run; recorded.
        lane: the lane of a run that shares its base model with others.

    Raises:
        SetupError: for a configuration that cannot work, before weights are loaded, or if the model does not fit
            into memory.
    """
    with leaving_no_ranks():
        if config.resume == AUTO:
            config = replace(config, resume=str(folder) if begun(folder) else None)
            if config.resume and is_complete(folder):
                earlier = load_run_config(folder)
                if not differences(earlier, config):
                    tests = shlex.join(["reft-eval", f"run={folder}", "split=test"])
                    rest = f" except to test it: {tests}" if config.test and not earlier.test else ""
                    log.info("%s is complete: nothing is left to do%s", folder, rest)
                    return read_results(folder)
        target = Path(config.resume) if config.resume else Path(folder)
        try:
            return _run(config, target, experiment, callbacks, command, lane)
        finally:
            release_folder(target)
            gc.collect()  # hooks make reference cycles of model and interventions; a sweep's next job needs the memory


def _run(
    config: Config,
    folder: Path,
    experiment: str | None,
    callbacks: Sequence[Callback],
    command: Sequence[str],
    lane: Lane | None,
) -> dict[str, Any]:
    quiet_lightning()
    begin_peak_memory(shared=lane is not None)
    seed_everything(config.seed, workers=True, verbose=False)
    try:
        trainer, objects = _set_up(config, folder, callbacks, lane)
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        raise SetupError(str(error)) from error
    except Exception as error:
        if reason := trouble_of(error, loaded=False):
            raise SetupError(reason) from error
        raise
    if trainer.is_global_zero and not config.resume:
        write_run_config(folder, config)
    results = _begin(config, folder, experiment, objects, writes=trainer.is_global_zero)
    if command and not config.resume:
        results.update(command=shlex.join(command))
    if lane is not None:
        results.update(shared_base=lane.runs)
    if runs := [logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)]:
        results.update(wandb_run=runs[0])  # so that a resumed run can continue it
    log.info("run folder: %s", folder)
    if trainer.world_size > 1:
        batch, parts = config.data.batch_size, config.trainer.accumulate_grad_batches
        log.info(
            "effective batch size %d: data.batch_size=%d x trainer.accumulate_grad_batches=%d x %d devices",
            batch * parts * trainer.world_size, batch, parts, trainer.world_size,
        )  # fmt: skip
    try:
        torch.set_float32_matmul_precision(config.matmul_precision)
        results.update(matmul_precision=config.matmul_precision)
        log_settings(trainer.loggers, config)
        with until_sigterm(trainer):
            _stages(config, folder, objects, trainer, results)
    except Halted as halt:
        results.update(status=halt.status, reason=str(halt), stopped=now(), **halt.values)
        _finish_wandb(trainer, results, None)
        log.info("%s: %s", halt.status, halt)
        return results.values
    except BaseException as error:
        ending = signal_of(error, trainer)
        _stopped(error, trainer, folder, results)
        # Lightning kills rank 0 if another rank fails
        if ending and trainer.is_global_zero:
            raise SystemExit(128 + ending) from error
        raise
    results.update(status="complete", finished=now())
    if trainer.is_global_zero:
        write_card(folder / "adapter", results.values, config)
        print_table(results.values)
        print_changed_answers(folder, results.values["method"])
    _finish_wandb(trainer, results, folder / "adapter" if logs_adapter(config) else None)
    return results.values


def _set_up(
    config: Config, folder: Path, callbacks: Sequence[Callback], lane: Lane | None
) -> tuple[Trainer, Objects]:
    """Check everything that can be wrong before weights are loaded, claim the run folder, and build the objects."""
    random_state = torch.get_rng_state()
    check_accelerator(config.trainer.accelerator)
    # a run that was killed after its test does not read test rows again
    tested = bool(config.resume) and _check_resume(config, folder)
    begins = config.intervention
    if config.resume and last_checkpoint(folder).is_file():
        begins = replace(begins, init_from=None)  # training starts from the checkpoint
    started = at_commit(config, folder) if config.resume else config
    plan = prepare(replace(started, test=config.test and not tested, intervention=begins))
    if config.resume:
        _check_same_rows(folder, plan.data.data_versions)
    trainer = build_trainer(
        config, folder, plan.monitor, random_state, [*([lane] if lane else []), *callbacks],
        validated=bool(plan.data.val_tasks),
    )  # fmt: skip
    check_ranks(trainer)
    check_precision(trainer.precision_plugin)
    check_strategy(config, trainer)
    if trainer.is_global_zero and not config.resume:
        folder.mkdir(parents=True, exist_ok=True)
        hold(folder)
        make_room(folder, config.overwrite)
    trainer.accelerator.setup_device(trainer.strategy.root_device)  # the device a quantized base is loaded to
    check_batches(config, plan.data, trainer.world_size)
    objects = build(config, plan, lane)
    if config.resume and (changed := other_base(folder, objects.fingerprint)):
        raise ValueError(f"resume={folder}: {changed}")
    return trainer, objects


def _stopped(error: BaseException, trainer: Trainer, folder: Path, results: Results) -> None:
    """Record what stopped a run, and log how to continue it."""
    ending = signal_of(error, trainer)
    said = f"{ending.name}: the process was asked to stop" if ending else f"{type(error).__name__}: {error}"
    try:
        values = {"signal": ending.name} if ending else {}
        results.update(status="stopped", error=said, stopped=now(), **values)
    except OSError as also:  # perhaps the same full disk that stopped the run
        log.error("cannot write %s, which still says that the run is running: %s", results.path, also)
    _finish_wandb(trainer, results, None, exit_code=128 + ending if ending else 1)
    if trainer.is_global_zero:
        go_on = shlex.join(["reft-train", f"resume={folder}"])
        reason = (None if ending else trouble_of(error)) or said.splitlines()[0]
        log.error("stopped: %s; the results so far are in %s; to continue: %s", reason, folder, go_on)


def _check_resume(config: Config, folder: Path) -> bool:
    """Refuse to resume a run that is complete, that is running, or that has another configuration.

    Returns:
        Whether it has been tested.
    """
    if not begun(folder):
        raise ValueError(f"resume={folder}: there is no run to continue, as the folder has no config.yaml")
    if is_first_process():
        hold(folder)
    changed = differences(load_run_config(folder), config)
    if changed:  # optimizer and schedule come from the checkpoint
        listed = "; ".join(f"{name}: {then!r} then, {today!r} now" for name, (then, today) in changed.items())
        raise ValueError(
            f"resume={folder} continues that run, so settings that affect its result must not change; {listed}"
        )
    began = read_results(folder)
    if "evaluation_dir" in began:
        raise ValueError(f"resume={folder} is an evaluation of {began['run_dir']}, not a run")
    if began.get("status") == "complete":
        # resuming would read the test split once more for the same scores
        raise ValueError(
            f"resume={folder}: the run is already complete; to evaluate its adapter again: "
            f"{shlex.join(['reft-eval', f'run={folder}'])}"
        )
    today = environment()
    # another version of the code may compute another hash
    same_code = all(began.get(name) == today[name] for name in ("versions", "git_commit"))
    if same_code and began.get("config_hash") != config_hash(config):
        raise ValueError(
            f"resume={folder} continues that run, but its config.yaml was changed after it started, in a setting that "
            "affects its result; undo the change, or start a new run"
        )
    if last_checkpoint(folder).is_file():
        read_checkpoint(last_checkpoint(folder), config.trust_code)
    return has_scores(began, "test/")


def _check_same_rows(folder: Path, versions: dict[str, Any]) -> None:
    """Refuse to continue a run with rows other than those it started with."""
    earlier = read_results(folder).get("data_versions", {})
    for split in ("train", "validation"):
        for name, facts in earlier.get(split, {}).items():
            if facts.get("fingerprint") != versions[split].get(name, {}).get("fingerprint"):
                raise ValueError(
                    f"resume={folder} continues that run, but the {split} rows of {name} have changed since it started"
                )


def _begin(config: Config, folder: Path, experiment: str | None, objects: Objects, writes: bool) -> Results:
    results = Results(
        folder,
        writes=writes,
        config_hash=config_hash(config),
        seed=config.seed,
        run_dir=str(folder),
        **environment(),
    )
    if config.resume:
        results.resume()
        if results.has("test/"):  # its rows are not read again
            objects.data.data_versions["test"].update(results.values["data_versions"]["test"])
    results.update(
        method=method_of(config), model=config.model.name, monitor=objects.prepared.monitor.name, **objects.facts(),
        **({"experiment": experiment} if experiment else {}),
    )  # fmt: skip
    return results


def _finish_wandb(trainer: Trainer, results: Results, adapter: Path | None, exit_code: int = 0) -> None:
    if trainer.is_global_zero:
        finish_wandb(trainer.loggers, results.values, adapter, exit_code)


def _stages(config: Config, folder: Path, objects: Objects, trainer: Trainer, results: Results) -> None:
    data = objects.data
    # with zero batches, as with trainer.limit_test_batches=0, nothing is read, and no read is recorded
    validates = bool(data.val_tasks and trainer.limit_val_batches)
    tests = bool(config.test and not config.sealed and data.test_tasks and trainer.limit_test_batches)
    split = "test" if tests else "validation"
    if config.evaluate_base and not results.has("base/") and (tests or validates):
        with objects.model.disabled():
            evaluate_split(trainer, objects, split, folder, results, base=True)
    if any(objects.model.parameter_roles().values()):
        last = last_checkpoint(folder) if config.resume else None
        if last and not last.is_file():
            log.info("the run stopped before it wrote a checkpoint: training starts at step 0")
            last = None
        _train(config, objects, trainer, results, last)
    else:
        log.info("%s trains nothing", method_of(config))
        results.update(train_seconds=0.0, steps=0, tokens=0, tokens_per_second=0.0)
    if trainer.is_global_zero:
        objects.model.save_pretrained(folder / "adapter")
    if validates:
        evaluate_split(trainer, objects, "validation", folder, results)
    # a run that was killed after its test does not read the rows again
    if tests and not results.has("test/"):
        evaluate_split(trainer, objects, "test", folder, results)
    results.update(peak_memory_bytes=peak_memory_bytes(), peak_reserved_bytes=peak_reserved_bytes())


def _train(config: Config, objects: Objects, trainer: Trainer, results: Results, resume: Path | None) -> None:
    """Fit, then restore the checkpoint chosen by validation."""
    trainer.fit(objects.module, objects.data, ckpt_path=resume, weights_only=not config.trust_code)
    if trainer.interrupted:
        raise KeyboardInterrupt
    check_told_to_stop(trainer)
    seconds = objects.module.train_seconds  # over all parts of a resumed run
    tokens = int(trainer.strategy.reduce(torch.tensor(objects.module.tokens, device=objects.module.device),
                                         reduce_op="sum"))  # fmt: skip
    costs = {"train_seconds": seconds, "tokens_per_second": tokens / seconds if seconds else 0.0}
    if results.values.get("shared_base"):  # the seconds include those of the other runs on that model
        costs = dict.fromkeys(costs)
    results.update(
        **costs, steps=trainer.global_step, tokens=tokens, metrics=objects.module.note_metrics()
    )  # fmt: skip
    if not config.checkpoint.restore_best:
        log.info("using the weights of the last step: checkpoint.restore_best=false")
        return
    chosen = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint) and c.best), None)
    if chosen is None:
        log.warning("no checkpoint was chosen by validation: evaluating the weights of the last step")
        results.update(best_step=None)
        return
    checkpoint = read_checkpoint(Path(chosen.path), config.trust_code)
    objects.module.load_state_dict(checkpoint["state_dict"])
    results.update(best_step=checkpoint["global_step"], chosen_by=chosen.reason())
    log.info("using the checkpoint of step %d of %d: %s",
             checkpoint["global_step"], trainer.global_step, chosen.reason())  # fmt: skip


def evaluate_split(
    trainer: Trainer, objects: Objects, split: str, folder: Path, results: Results, base: bool = False
) -> None:
    """Evaluate the model in its current state on a split, and write scores and predictions to the run folder.

    ``base`` means that the adapter is disabled. A read of the test split is recorded before it happens. Scores are
    written last: if they are there, everything else is.
    """
    if split == "test":
        objects.data.setup("test")
        facts = {"time": now(), "model": "base" if base else "adapted",
                 "config_hash": results.values.get("config_hash")}  # fmt: skip
        reads = [{"task": task, "rows": rows, **facts} for task, rows in objects.data.test_rows.items()]
        results.update(test_reads=[*results.values["test_reads"], *reads])
    found = evaluate(trainer, objects.module, objects.data, split, prefix="base/" if base else "")
    check_told_to_stop(trainer)
    if trainer.is_global_zero:
        who = "base" if base else "reft"
        write_predictions(folder / "predictions" / f"{who}_{split}.jsonl", found.predictions)
        if split == "test" and objects.data.family.export is not None:
            _export(folder, objects, found.predictions, base)
    results.update(
        metrics=found.metrics,
        counts=found.counts,
        tasks=dict.fromkeys(sorted({row["task"] for row in found.predictions}), objects.module.kind),
        seconds={f"base/{split}" if base else split: found.seconds},
    )


def _export(folder: Path, objects: Objects, rows: list[dict[str, Any]], base: bool) -> None:
    """Write the predictions of each test set in the family's format, for another program such as a judge."""
    for task in objects.data.test_tasks:
        of_task = [row for row in rows if row["task"] == task]
        generator = objects.name.partition(" ")[0] if base else objects.name
        outputs = objects.data.family.export(of_task, generator)
        path = folder / "outputs" / f"{'base' if base else 'reft'}_{task}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, outputs)
        log.info("%d outputs: %s", len(outputs), path)


def resume(folder: Path, trust_code: bool = False) -> dict[str, Any]:
    """Continue an interrupted run with the configuration saved in its folder.

    ``trust_code`` comes from the caller, since someone else may have written the configuration.
    """
    config = load_run_config(folder)
    return run(replace(config, resume=str(folder), trust_code=trust_code), folder)
