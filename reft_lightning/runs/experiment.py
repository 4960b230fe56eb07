"""One run: configuration -> objects -> (base) -> fit -> validate -> test -> ``results.json``.

What can be wrong is checked before weights are loaded: the configuration, the interventions against a model
without weights, then the data. A run folder holds the resolved configuration, results.json, predictions/,
checkpoints/, adapter/ and the logs.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config.identity import check_same_run, config_hash
from ..config.schema import Config
from ..config.user_paths import as_written, make_absolute
from ..data.families.instruction import alpaca_eval_outputs
from ..speed.matmul_precision import matmul_precision
from ..storage.atomic import now, write_json
from ..training.wandb import finish_wandb
from .arguments import method_of
from .build import Objects, build, choose_monitor, shorten_training_pass
from .console import print_table
from .ddp_launch import single_job_ddp
from .devices import check_accelerator
from .environment import begin_peak_memory, environment, peak_memory_bytes, peak_reserved_bytes
from .results import Results, write_predictions
from .trainer import build_trainer, quiet_lightning

log = logging.getLogger(__name__)


class SetupError(ValueError):
    """A run cannot start as configured; the message says why, and nothing has been trained."""


class Halted(RuntimeError):
    """A callback ends the run on purpose: a search pruned it, or its budget is used up.

    Args:
        status: what ``results.json`` says, such as ``pruned``.
        reason: why.
        values: further values of ``results.json``.
    """

    def __init__(self, status: str, reason: str, **values: Any) -> None:
        super().__init__(reason)
        self.status, self.values = status, values


def run(
    config: Config, folder: Path, experiment: str | None = None, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Train and evaluate as the configuration says; return the contents of ``results.json``.

    Args:
        config: a checked configuration; a monitored score that it leaves open is filled in.
        folder: the run folder; it is created. With ``resume`` the earlier run's folder is used instead.
        experiment: the file of ``conf/experiment`` that it was composed from; recorded.
        callbacks: of Lightning, beside those of the configuration. One that raises :class:`Halted` ends the run
            without an error.

    Raises:
        SetupError: for a configuration that cannot work, before any weight is loaded.
    """
    with single_job_ddp():
        target = Path(config.resume) if config.resume else Path(folder)
        try:
            return _run(config, target, experiment, callbacks)
        finally:
            gc.collect()  # hooks tie model and interventions in a circle, and a sweep's next job needs the memory


def _run(
    config: Config, folder: Path, experiment: str | None, callbacks: Sequence[Callback]
) -> dict[str, Any]:
    try:
        check_accelerator(config.trainer.accelerator)
        choose_monitor(config)
    except (ValueError, OSError) as error:
        raise SetupError(str(error)) from error
    written = make_absolute(config)
    values = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    last = folder / "checkpoints" / "last.ckpt"
    if config.resume:
        _check_incomplete(folder)
    if config.resume and not last.is_file():
        raise SetupError(f"resume={config.resume}: there is no {last} to continue from")
    quiet_lightning()
    begin_peak_memory()
    seed_everything(config.seed, workers=True, verbose=False)
    try:
        if config.resume:
            earlier = load_run_config(folder)
            make_absolute(earlier)
            check_same_run(values, OmegaConf.to_container(OmegaConf.structured(earlier)), folder)
            written = _written(folder, written)
        trainer = build_trainer(config, folder, values)
        trainer.callbacks[:0] = callbacks
        objects = build(config)
    except (ValueError, OSError, MisconfigurationException) as error:
        raise SetupError(str(error)) from error
    main = trainer.is_global_zero
    folder.mkdir(parents=True, exist_ok=True)
    if main and not config.resume:
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8")
    results = Results(
        folder, config_hash=config_hash(as_written(values, written)), seed=config.seed, run_dir=str(folder),
        **({"places_as_written": written} if written else {}), **environment(),
    )  # fmt: skip
    results.on = main
    if config.resume:
        results.resume()
    results.update(
        method=method_of(config), model=config.model.name, data_versions=objects.data.data_versions,
        trainable_parameters=objects.count.trainable, base_parameters=objects.count.base,
        percent=objects.count.percent, head_parameters=objects.head_parameters,
        monitor=config.callbacks.monitor, commonest_answers=objects.commonest,
        **({"experiment": experiment} if experiment else {}),
        **({"decoding": objects.decoding} if objects.decoding else {}),
    )  # fmt: skip
    log.info("run folder: %s", folder)
    try:
        with matmul_precision(config.matmul_precision, trainer.strategy.root_device) as precision:
            results.update(matmul_precision=precision)
            _stages(config, folder, objects, trainer, results, last if config.resume else None)
    except Halted as halt:
        results.update(status=halt.status, reason=str(halt), stopped=now(), **halt.values)
        if main:
            finish_wandb(trainer.loggers, results.values, None)
        log.info("%s: %s", halt.status, halt)
        return results.values
    except BaseException as error:
        results.update(status="stopped", error=f"{type(error).__name__}: {error}", stopped=now())
        if main:
            finish_wandb(trainer.loggers, results.values, None, exit_code=1)
        if main and last.is_file():
            log.error("stopped; what was computed is in %s; go on with: reft-train resume=%s", folder, folder)
        raise
    results.update(status="complete", finished=now())
    if main:
        adapter = folder / "adapter" if config.logger.log_adapter else None
        finish_wandb(trainer.loggers, results.values, adapter)
        print_table(results.values)
    return results.values


def _written(folder: Path, otherwise: dict[str, str]) -> dict[str, str]:
    """Return the places as a run's first command wrote them: its hash stays, wherever later commands start."""
    if not (folder / "results.json").is_file():
        return otherwise
    return Results.read(folder).values.get("places_as_written", {})


def _check_incomplete(folder: Path) -> None:
    """Refuse to resume what is finished: the test split would be read once more for the same scores."""
    if (folder / "results.json").is_file() and Results.read(folder).values.get("status") == "complete":
        raise SetupError(
            f"resume={folder}: the run is already complete, and nothing is left to do; to evaluate its adapter again: "
            f"reft-eval run={folder}"
        )


def _stages(
    config: Config, folder: Path, objects: Objects, trainer: Trainer, results: Results, resume: Path | None
) -> None:
    split = "test" if config.test and not config.sealed and objects.data.test_tasks else "validation"
    if config.evaluate_base and not results.has("base/") and (split == "test" or objects.data.val_tasks):
        with objects.model.disabled():
            evaluate_split(trainer, objects, split, folder, results, "base")
    validated = bool(objects.data.val_tasks)
    if not validated:
        trainer.limit_val_batches = 0
    if any(objects.model.parameter_roles().values()):
        _train(config, objects, trainer, results, resume)
    else:
        log.info("%s trains nothing", method_of(config))
        results.update(train_seconds=0.0, steps=0, tokens=0, tokens_per_second=0.0)
    if trainer.is_global_zero:
        objects.model.save_pretrained(folder / "adapter")
    if validated:
        evaluate_split(trainer, objects, "validation", folder, results, "")
    if split == "test":
        evaluate_split(trainer, objects, "test", folder, results, "")
    results.update(peak_memory_bytes=peak_memory_bytes(), peak_reserved_bytes=peak_reserved_bytes())


def _train(config: Config, objects: Objects, trainer: Trainer, results: Results, resume: Path | None) -> None:
    """Fit, and go back to the checkpoint that validation chose."""
    shorten_training_pass(config, objects)
    trainer.fit(objects.module, objects.data, ckpt_path=resume, weights_only=False)
    if trainer.interrupted:
        raise KeyboardInterrupt
    seconds = objects.module.train_seconds  # over all parts of a run that was resumed
    tokens = int(trainer.strategy.reduce(torch.tensor(objects.module.tokens, device=objects.module.device),
                                         reduce_op="sum"))  # fmt: skip
    results.update(
        train_seconds=seconds, steps=trainer.global_step, tokens=tokens,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        metrics={k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")},
    )  # fmt: skip
    best = Path(trainer.checkpoint_callback.best_model_path or "none")
    if config.callbacks.restore_best and not best.is_file():
        log.warning("no validation chose a checkpoint: the weights of the last step are evaluated")
        results.update(best_step=None)
    elif config.callbacks.restore_best:
        checkpoint = torch.load(best, map_location="cpu", weights_only=False)
        objects.module.load_state_dict(checkpoint["state_dict"])
        results.update(best_step=checkpoint["global_step"])


def evaluate_split(
    trainer: Trainer, objects: Objects, split: str, folder: Path, results: Results, who: str
) -> None:
    """Evaluate the model as it is on a split; scores and predictions go to the run folder.

    Args:
        trainer: a trainer.
        objects: what is evaluated, on what.
        split: ``validation`` or ``test``; reading the test split is recorded.
        folder: the run folder.
        results: takes the scores.
        who: prefix of the names, ``base`` or nothing.
    """
    start = time.perf_counter()
    evaluate = {"validation": trainer.validate, "test": trainer.test}[split]
    prefix = objects.module.prefix = f"{who}/" if who else ""
    try:
        evaluate(objects.module, objects.data, verbose=False)
    finally:
        objects.module.prefix = ""
    names = (f"{prefix}val/", f"{prefix}test/")
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(names)}
    read = objects.data.test_rows if split == "test" else {}
    reads = [
        {
            "task": task, "rows": rows, "time": now(), "model": who or "adapted",
            "config_hash": results.values.get("config_hash"),
        }
        for task, rows in read.items()
    ]  # fmt: skip
    results.update(
        metrics=metrics,
        counts=objects.module.counts,
        seconds={f"{prefix}{split}": time.perf_counter() - start},
        test_reads=[*results.values["test_reads"], *reads],
    )
    rows = _gather(trainer, objects.module.predictions)
    if trainer.is_global_zero:
        write_predictions(folder / "predictions" / f"{who or 'reft'}_{split}.jsonl", rows)
        if split == "test" and not objects.measures:
            _write_outputs(folder, objects, rows, who)


def _write_outputs(folder: Path, objects: Objects, rows: list[dict[str, Any]], who: str) -> None:
    """Write what nothing scored in AlpacaEval's format, for `reft-judge` and for AlpacaEval itself."""
    for task in objects.data.test_tasks:
        said = [row for row in rows if row["task"] == task]
        generator = objects.name.partition(" ")[0] if who else objects.name
        outputs = alpaca_eval_outputs(said, objects.data.test_instructions(task), generator)
        path = folder / "outputs" / f"{who or 'reft'}_{task}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, outputs)
        log.info("%d outputs for a judge: %s", len(outputs), path)


def _gather(trainer: Trainer, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all processes."""
    if trainer.world_size == 1:
        return rows
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def load_run_config(folder: Path) -> Config:
    """Read the resolved configuration of a run folder.

    Raises:
        ValueError: if the folder holds none.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{folder} is no run folder: it has no config.yaml; give the folder that reft-train named"
        )
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{path} was written by another version of reft_lightning: {str(error).splitlines()[0]}"
        ) from error
