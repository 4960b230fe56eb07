"""Write `curves.txt`: the loss of each step of some small runs, to the last digit.

    PYTHONPATH=tests python tests/golden/make_curves.py

Run it where a change is meant to move losses, and say so in CHANGELOG.md under "Changes results".
"""

import platform
import tempfile
from pathlib import Path

import short_runs
import torch

FILE = Path(__file__).with_name("curves.txt")
RUNS = {
    "loreft": (),
    "direft, accumulated": ("intervention=direft", "trainer.accumulate_grad_batches=2", "data.batch_size=2"),
    "loreft, dropout": ("intervention.dropout=0.2", "optimizer.weight_decay=0.1", "intervention.tied=position"),
    "lora": ("intervention=peft/lora", "intervention.options.target_modules=[q_proj,v_proj]"),
    "bfloat16 base": ("model.dtype=bfloat16", "intervention.positions=l3"),
}  # fmt: skip


def build():
    """Return what the last digits depend on: the build of torch, and the kind of processor that it chooses code for."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else [platform.processor()]
    vendor = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), lines[0]
    )
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {vendor}"


def losses(folder, *overrides):
    """Return step -> loss of a run on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        common = [text for text in overrides if text.startswith("intervention=peft")]
        data = short_runs.write_rows(Path(folder) / "rows")
        arguments = [a for a in short_runs.arguments(data) if not (common and a.startswith("intervention."))]
        config = short_runs.compose.compose([*arguments, *overrides, "test=false"])
        short_runs.experiment.run(config, Path(folder) / "run")
    finally:
        torch.set_num_threads(threads)
    return short_runs.logged(Path(folder) / "run", "train/loss")


def read():
    """Return (build, name -> step -> loss) of the file."""
    first, *lines = FILE.read_text().splitlines()
    found = {}
    for line in lines:
        name, step, loss = line.split("\t")
        found.setdefault(name, {})[int(step)] = float(loss)
    return first, found


def main():
    lines = [build()]
    for name, overrides in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            lines += [f"{name}\t{step}\t{loss!r}" for step, loss in losses(folder, *overrides).items()]
    FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
