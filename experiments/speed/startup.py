"""How long `reft-train` takes from the shell to the first training batch, next to the least any start can take.

Every start is a fresh process; the two kinds take turns. `reft` is the command itself, stopped after its first step.
`floor` imports torch, lightning and transformers and loads tokenizer and weights of the same model with
`from_pretrained`, and does nothing else. The model lies in the cache: one start that is not timed sees to that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve()
ARGUMENTS = (
    "experiment=small/boolq",
    "evaluate_base=false",
    "test=false",
    "trainer.enable_progress_bar=false",
)
# What a start does, in its order; each stage lasts from the end of the one before it.
STAGES = {
    "python": "the interpreter",
    "command": "hydra and the command",
    "composition": "composing and checking the configuration, twice",
    "imports": "torch, lightning, transformers, this package",
    "checks": "configuration and interventions against a model without weights",
    "tokenizer": "the tokenizer",
    "data": "reading, splitting and encoding the rows",
    "weights": "the weights",
    "objects": "interventions, LightningModule, counts",
    "trainer": "to the first training batch",
    "step": "the first step",
}
log = logging.getLogger("speed")


def start(kind: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Start a process of a kind; return the seconds of its stages, of the whole, and of the processor.

    Raises:
        RuntimeError: if it fails; says what it said.
    """
    from processes import own_waiting  # here: what is imported above counts in what is timed

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "stages.json"
        more = {"STARTED": str(time.time()), "OUT": str(out), "PYTHONPATH": str(HERE.parents[2])}
        command = [sys.executable, str(HERE), "--inside", kind, *arguments, f"hydra.run.dir={scratch}/run"]
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "WANDB_MODE": "offline"}
        done = subprocess.run(
            command, env={**own_waiting(), **quiet, **more}, capture_output=True, text=True, check=False
        )
        if done.returncode or not out.is_file():
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


# --- inside the process ------------------------------------------------------------------------------------------


class Marks:
    """The ends of the stages, in seconds since the process was asked for."""

    def __init__(self) -> None:
        self.ends: dict[str, float] = {}
        self("python")

    def __call__(self, stage: str) -> None:
        self.ends.setdefault(stage, time.time() - float(os.environ["STARTED"]))

    def leave(self, whole: str, **more: Any) -> None:
        """Write the stages and end the process: what would follow is not measured."""
        ends = list(self.ends.items())
        stages = {
            name: end - before for (name, end), before in zip(ends, [0, *self.ends.values()], strict=False)
        }
        found = {"stages": stages, "wall": self.ends[whole], **more}
        Path(os.environ["OUT"]).write_text(json.dumps(found), encoding="utf-8")
        sys.stderr.flush()
        os._exit(0)


def reft(marks: Marks) -> None:
    """Be `reft-train` with the arguments of this process."""
    from reft_lightning import cli

    marks("command")
    imports = cli.heavy_imports

    @contextlib.contextmanager
    def timed() -> Iterator[None]:
        marks("composition")
        with imports():
            yield
        marks("imports")
        watch(marks)

    cli.heavy_imports = timed
    cli.train()


def watch(marks: Marks) -> None:
    """Mark the stages of building, and stop after the first step."""
    from lightning import Callback

    from reft_lightning.runs import build, experiment

    class First(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            marks("trainer")
            self.cpu = time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            marks("step")
            marks.leave("trainer", cpu=self.cpu)

    def between(owner: Any, name: str, before: str | None, after: str) -> None:
        original = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                marks(before)
            result = original(*args, **kwargs)
            marks(after)
            return result

        setattr(owner, name, called)

    between(build, "load_tokenizer", "checks", "tokenizer")
    between(build, "load_base_model", "data", "weights")
    between(experiment, "build", None, "objects")
    run = experiment.run
    experiment.run = lambda *args, **kwargs: run(*args, **kwargs, callbacks=[First()])


def floor(marks: Marks) -> None:
    """Import what every start needs, and load the model as transformers does."""
    import lightning  # noqa: F401  it is imported for its time
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    marks("imports")
    AutoTokenizer.from_pretrained(os.environ["FLOOR_MODEL"])
    marks("tokenizer")
    AutoModelForCausalLM.from_pretrained(
        os.environ["FLOOR_MODEL"], dtype=getattr(torch, os.environ["FLOOR_DTYPE"])
    )
    marks("weights")
    marks.leave("weights", cpu=time.process_time())


# --- the measurement ---------------------------------------------------------------------------------------------


def main() -> None:
    """Measure."""
    import argparse

    import figures

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    figures.add_arguments(parser, HERE.with_suffix(""), rounds=4, warmup=None, model=False)
    parser.add_argument("overrides", nargs="*", help=f"of reft-train, in addition to {' '.join(ARGUMENTS)}")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = (*ARGUMENTS, *args.overrides)
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), **place_of(arguments)}
    start("reft", arguments)  # fills the caches of the operating system, of Python and of this package
    kinds = {"reft": "trainer", "floor": "weights"}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in sorted(kinds, reverse=number % 2 == 0):
            found[kind].append(start(kind, arguments))
            log.info("round %d, %s: %.2f s", number + 1, kind, found[kind][-1]["wall"])
    wall, cpu = ({kind: [one[clock] for one in found[kind]] for kind in kinds} for clock in ("wall", "cpu"))
    what = "shell to the first training batch, SmolLM2, quickstart"
    rows = [
        figures.fastest(what, wall["reft"], goal=10, unit="s"),
        figures.ratio(f"{what} / importing and loading alone", wall["reft"], wall["floor"]),
        figures.ratio(f"{what} / importing and loading alone, processor time", cpu["reft"], cpu["floor"]),
    ]
    facts = figures.header(str(__doc__).splitlines()[0], args, arguments=" ".join(arguments))
    figures.write(args.out, facts, found, rows, stages_table(found))
    log.info("%s", args.out.with_suffix(".md").read_text(encoding="utf-8"))


def place_of(arguments: tuple[str, ...]) -> dict[str, str]:
    """Return where the floor finds the model, converted and in the cache, and its precision."""
    code = (
        "import sys, dataclasses\n"
        "from reft_lightning.config.compose import compose\n"
        "from reft_lightning.base_models.places import ModelPlace\n"
        "model = compose(sys.argv[1:]).model\n"
        "names = [field.name for field in dataclasses.fields(ModelPlace)]\n"
        "print(ModelPlace(**{name: getattr(model, name) for name in names}).folder(), model.dtype, sep='\\n')\n"
    )
    path = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}
    said = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=path, capture_output=True, text=True, check=True
    )
    folder, dtype = said.stdout.strip().splitlines()[-2:]
    return {"FLOOR_MODEL": folder, "FLOOR_DTYPE": dtype}


def stages_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return best and median of each stage, in seconds."""
    lines = ["| stage | best s | median s | floor: best s | what |", "|---|---|---|---|---|"]
    for name, words in STAGES.items():
        ours, least = (
            [one["stages"][name] for one in found[kind] if name in one["stages"]] for kind in found
        )
        below = f"{min(least):.2f}" if least else ""
        lines.append(f"| {name} | {min(ours):.2f} | {median(ours):.2f} | {below} | {words} |")
    whole = {kind: [one["wall"] for one in found[kind]] for kind in found}
    lines.append(
        f"| to the first batch | {min(whole['reft']):.2f} | {median(whole['reft']):.2f} | {min(whole['floor']):.2f} "
        "| without the first step |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        ends = Marks()
        kind = {"reft": reft, "floor": floor}[sys.argv[2]]
        sys.argv[:] = ["reft-train", *sys.argv[3:]]
        kind(ends)
    else:
        main()
