"""``launcher=shared_base``: a Hydra launcher for sweeps whose jobs share a frozen base model.

:mod:`reft_lightning.runs.shared_base` decides which jobs can share, and how. Hydra finds launchers only in this
package, and imports this file each time it starts, so torch is imported only when needed.
"""

from __future__ import annotations

import contextvars
import copy
import gc
import logging
import signal
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)


# a dictionary, as dataclasses need a module in sys.modules, where Hydra does not put plugins
KEYS = {
    "_target_": "hydra_plugins.reft_shared_base.SharedBaseLauncher",
    "together": 8,  # concurrent runs on one base model, whose batches are all in memory
}
ConfigStore.instance().store(group="hydra/launcher", name="shared_base", node=KEYS, provider="reft_lightning")


class SharedBaseLauncher(Launcher):
    """Run the jobs of a sweep that share a base model concurrently, and the others one by one.

    Args:
        together: maximum number of concurrent jobs.
    """

    def __init__(self, together: int = 8) -> None:
        if together < 1:
            raise ValueError(f"hydra.launcher.together must be at least 1; got {together}")
        self.together = together

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra passes before the first job."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; return the result of each, in order."""
        from reft_lightning.config.compose import to_config
        from reft_lightning.runs.shared_base import base_of, why_alone

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = {
            number: self._composed(number, list(overrides))
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        }
        groups: dict[str, list[int]] = {}
        for number, config in jobs.items():
            HydraConfig.instance().set_config(config)  # its values may refer to ${hydra:...}
            run = to_config(_without_hydra(config))
            try:
                reason = "hydra.job.chdir=true" if self.config.hydra.job.chdir else why_alone(run)
            except ValueError as error:  # the run itself will report it
                reason = str(error)
            if reason is not None:
                log.info("#%d runs separately: %s", number, reason)
            groups.setdefault(f"apart {number}" if reason else base_of(run), []).append(number)
        returned: dict[int, JobReturn] = {}
        for group in groups.values():
            for start in range(0, len(group), self.together):
                part = {number: jobs[number] for number in group[start : start + self.together]}
                if len(part) > 1:
                    log.info("%d jobs share a base model:", len(part))
                for number, config in part.items():
                    log.info("\t#%d : %s", number, " ".join(filter_overrides(config.hydra.overrides.task)))
                if len(part) > 1:
                    returned |= self._side_by_side(part)
                else:
                    returned |= {
                        number: self._run(config, self.task_function) for number, config in part.items()
                    }
                configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
                gc.collect()  # hooks make reference cycles of the base model and its adapters
        return [returned[number] for number in jobs]

    def _composed(self, number: int, overrides: list[str]) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _side_by_side(self, jobs: Mapping[int, DictConfig]) -> dict[int, JobReturn]:
        from reft_lightning.runs.shared_base import SharedBase

        shared = SharedBase(f"job{number}" for number in jobs)
        returned: dict[int, JobReturn] = {}
        threads = [
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(self._work, shared, number, config, returned),
                name=f"job {number}",
                daemon=True,
            )
            for number, config in jobs.items()
        ]
        told: list[int] = []

        def stop(signum: int, frame: Any) -> None:
            told.append(signum)
            shared.turns.stopping = True
            signal.signal(signum, before[signum])  # a second signal ends everything at once

        main = threading.current_thread() is threading.main_thread()  # the only thread that receives signals
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT) if main}
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if told:
            raise SystemExit(128 + told[0])
        return returned

    def _run(self, config: DictConfig, task: TaskFunction) -> JobReturn:
        return run_job(
            hydra_context=self.hydra_context, task_function=task, config=config, job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )  # fmt: skip

    def _work(self, shared: Any, number: int, config: DictConfig, returned: dict[int, JobReturn]) -> None:
        """Run a job in its thread."""
        name = f"job{number}"
        shared.runs[name].enter()
        try:
            returned[number] = self._run(config, partial(_in_lane, self.task_function, number))
        except BaseException as error:  # told to stop, or an error that must not affect other jobs
            failed = error if isinstance(error, Exception) else RuntimeError(f"job {number} ended: {error!r}")
            returned[number] = JobReturn(status=JobStatus.FAILED, _return_value=failed)
        finally:
            for handler in logging.root.handlers:
                handler.close()
            shared.leave(name)


def _in_lane(task: Any, number: int, config: DictConfig) -> Any:
    for handler in logging.root.handlers:
        if handler.formatter is not None and not isinstance(handler, logging.FileHandler):
            text = f"%(asctime)s %(levelname)s #{number} %(message)s"
            handler.setFormatter(logging.Formatter(text, handler.formatter.datefmt))
    return task(config)


def _without_hydra(config: DictConfig) -> DictConfig:
    run = copy.deepcopy(config)
    with open_dict(run):
        del run["hydra"]
    return run
