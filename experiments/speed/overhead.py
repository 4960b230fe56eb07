"""What Lightning and the configuration cost a training step, over a plain PyTorch loop with the same step.

    python experiments/speed/overhead.py --random --out overhead

``Trainer.fit`` with everything that ``reft-train`` builds from the configuration (module, data module, callbacks, CSV
logger), and a plain loop: loss, backward, clip, AdamW, schedule. They share one process and one model and take turns
step by step: a callback runs the plain step before each step of Lightning and leaves it out of Lightning's time, which
runs from the end of one plain step to the start of the next, loader, hooks and logging included. Rows are all of one
length, so every step does the same. A round is ten steps of each, as the loggers write every tenth. Hydra composes the
configuration before training and costs no step anything; ``startup.py`` times the start.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from figures import add_arguments, header, ratio, seconds_table, write
from lightning import Callback
from models import model_folder
from processes import peak_memory_bytes
from runs import invented_rows, overrides

from reft_lightning.config.compose import compose
from reft_lightning.config.schema import Config
from reft_lightning.runs.build import Objects, build, prepare
from reft_lightning.runs.trainer import build_trainer, quiet_lightning

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
GOAL = 1.03
STEPS = 10  # a round


class PlainLoop:
    """A loop in PyTorch alone, one step a call, over the data module's own loader.

    Args:
        objects: model, module and data.
        config: optimizer, schedule and clipping.
        steps: optimizer steps in all, for the schedule.
    """

    def __init__(self, objects: Objects, config: Config, steps: int) -> None:
        self.objects, self.clip = objects, config.trainer.gradient_clip_val
        roles = objects.model.parameter_roles()
        self.parameters = [p for group in roles.values() for p in group]
        self.optimizer, self.schedule = objects.module.optimization.build(roles, steps)
        self.batches: Iterator[dict[str, Any]] = iter(())

    def step(self) -> None:
        """Train on the next batch."""
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.objects.data.train_dataloader())
            batch = next(self.batches)
        loss = self.objects.module.loss_of(batch)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()
        float(loss.detach())


class TakeTurns(Callback):
    """Run a plain step before each step of Lightning, and time both."""

    def __init__(self, plain: PlainLoop) -> None:
        self.plain = plain
        self.times: dict[str, dict[str, list[float]]] = {
            name: {"wall": [], "cpu": []} for name in ("plain", "lightning")
        }
        self._resumed: tuple[float, float] | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        start = _clocks()
        if self._resumed is not None:
            self._add("lightning", self._resumed, start)
        self.plain.step()
        self._resumed = _clocks()
        self._add("plain", start, self._resumed)

    def _add(self, name: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        for clock, before, after in zip(("wall", "cpu"), start, end, strict=True):
            self.times[name][clock].append(after - before)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure(folder: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train and return, for each way, the seconds of every round."""
    steps = (args.warmup + args.rounds) * STEPS + 1  # the last step of Lightning is not seen from outside
    with tempfile.TemporaryDirectory() as work:
        mixture = Path(work) / "mixture.json"
        rows = invented_rows([args.columns] * (args.batch_size * steps))
        mixture.write_text(json.dumps(rows), encoding="utf-8")
        config = compose(
            [*overrides(folder, mixture, "bytes", batch_size=args.batch_size), f"trainer.max_steps={steps}"]
        )
        quiet_lightning()
        plan = prepare(config)
        trainer = build_trainer(config, Path(work) / "run", plan.monitor, torch.random.get_rng_state())
        objects = build(config, plan)
        trainer.limit_val_batches = 0
        turns = TakeTurns(PlainLoop(objects, config, steps))
        trainer.callbacks.append(turns)
        trainer.fit(objects.module, objects.data)
    found = {}
    for name, times in turns.times.items():
        rounds = {
            clock: [sum(given[i : i + STEPS]) for i in range(args.warmup * STEPS, steps - 1, STEPS)]
            for clock, given in times.items()
        }
        found[name] = {**rounds, "peak_memory_bytes": peak_memory_bytes()}
    return found


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "overhead", rounds=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--columns", type=int, default=66, help="tokens of each prompt: the mixture's median")
    return parser.parse_args()


def main() -> None:
    """Measure and write both files."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    args = arguments()
    torch.set_num_threads(args.threads)
    with model_folder(args) as folder:
        records = measure(folder, args)
    above, below = records["lightning"]["wall"], records["plain"]["wall"]
    what = f"Lightning step / plain PyTorch step, batch {args.batch_size}"
    figures = [ratio(what, above, below, goal=GOAL)]
    extra = 1000 * (min(above) - min(below)) / STEPS
    facts = header(
        "Cost of Lightning", args, torch=torch.__version__, batch_size=args.batch_size, columns=args.columns
    )
    text = f"{extra:.2f} ms a step more. Times are of {STEPS} steps; memory is of both together."
    write(args.out, facts, records, figures, f"{seconds_table(records, 'plain')}\n\n{text}")
    log.info("wrote %s", args.out.with_suffix(".json").name)


if __name__ == "__main__":
    main()
