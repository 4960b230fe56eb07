"""Count the functions of the project that one training step calls, on the tree of a checkout.

    python experiments/house/calls.py TREE

The step is the fourth of a decoder with LoReFT on the last two prompt tokens.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

TREE = Path(sys.argv[1]).resolve()
sys.path[:0] = [str(TREE), str(TREE / "tests")]

import short_runs  # noqa: E402  # of that tree


def generation_module() -> type:
    for name in ("reft_lightning.training.generation", "reft_lightning.generation"):
        try:
            return importlib.import_module(name).GenerationModule
        except ModuleNotFoundError:
            continue
    raise SystemExit(f"{TREE} has no GenerationModule")


def main() -> None:
    module, package = generation_module(), str(TREE / "reft_lightning")
    step, count = module.training_step, 0
    calls: list[tuple[str, str]] = []

    def profile(frame, event, _) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    def counted(self, *args, **kwargs):
        nonlocal count
        count += 1
        sys.setprofile(profile if count == 4 else None)
        try:
            return step(self, *args, **kwargs)
        finally:
            sys.setprofile(None)

    module.training_step = counted
    with tempfile.TemporaryDirectory() as folder:
        data = short_runs.write_rows(Path(folder) / "rows")
        short_runs.run(data, Path(folder) / "run", "intervention.positions=l2")
    print(f"{len(set(calls))} functions in {len({file for file, _ in calls})} files, {len(calls)} calls")
    print(" -> ".join(dict.fromkeys(name for _, name in calls)))


if __name__ == "__main__":
    main()
