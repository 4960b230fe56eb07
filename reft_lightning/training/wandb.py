"""What W&B shows of a run: tables of predictions, the results, the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

TABLE_ROWS = 100  # predictions shown in a W&B table


class WandbReport(Callback):
    """Log a table of predictions after each validation and test; used where W&B is."""

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log rows of the validation."""
        self._table(trainer, module, "val/predictions")

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log rows of the test."""
        self._table(trainer, module, "test/predictions")

    def _table(self, trainer: Trainer, module: Any, key: str) -> None:
        from lightning.pytorch.loggers import WandbLogger

        step = max(1, len(module.predictions) // TABLE_ROWS)  # some of every task: rows come task by task
        rows = module.predictions[::step][:TABLE_ROWS]
        if trainer.sanity_checking or not rows:
            return
        columns = list(rows[0])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(
                    f"{module.prefix}{key}",
                    columns=columns,
                    data=[[str(row.get(c)) for c in columns] for row in rows],
                )


def finish_wandb(
    loggers: list[Logger], summary: dict[str, Any], adapter: Path | None, exit_code: int = 0
) -> None:
    """Write the results into the W&B summary, upload the adapter as an artifact, and close the run.

    Args:
        loggers: of the first process; W&B's may be among them.
        summary: contents of ``results.json``.
        adapter: its folder, or None not to upload it.
        exit_code: 0 for a run that is complete.
    """
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            run = logger.experiment
            run.summary.update(summary)
            if adapter is not None:
                artifact = wandb.Artifact(f"adapter-{run.id}", type="model")
                artifact.add_dir(str(adapter))
                run.log_artifact(artifact)
            run.finish(exit_code)
