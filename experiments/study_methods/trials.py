"""Copy the validation score of every trial of a study into a file, and print them as a grid.

python experiments/study_methods/trials.py experiments/study_methods/stsb/trials.jsonl [STUDY_FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf


def read_study(folder: Path) -> list[dict]:
    """Return one line for each trial: its method, number, drawn setting and score, or why it has none."""
    monitor = OmegaConf.load(folder / "study.yaml").monitor
    lines = []
    for file in sorted(folder.glob("trials/*/*/job.json")):
        job = json.loads(file.read_text(encoding="utf-8"))
        results = json.loads((file.parent / "results.json").read_text(encoding="utf-8"))
        setting = next(text for text in reversed(job["overrides"]) if "lr=" in text)
        lines.append(
            {
                "method": job["method"],
                "number": job["number"],
                "lr": float(setting.partition("=")[2]),
                monitor: results["metrics"].get(monitor),
                "status": results["status"],
                "seed": results["seed"],
                "config_hash": results["config_hash"],
                "commit": results["git_commit"],
            }
        )
    return lines


def main() -> None:
    """Write the file where a study is given, then print methods by learning rates, scores times 100."""
    path, *studies = map(Path, sys.argv[1:])
    if studies:
        lines = [line for study in studies for line in read_study(study)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    (monitor,) = {name for line in lines for name in line if name.startswith("val/")}
    rates = sorted({line["lr"] for line in lines})
    print(f"| {monitor} | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---" * (len(rates) + 1) + "|")
    for method in dict.fromkeys(line["method"] for line in lines):
        found = {line["lr"]: line[monitor] for line in lines if line["method"] == method}
        best = max((score for score in found.values() if score is not None), default=None)
        cells = ["-" if (score := found.get(rate)) is None else f"{100 * score:.1f}" for rate in rates]
        cells = [
            f"**{c}**" if best is not None and found.get(r) == best else c
            for c, r in zip(cells, rates, strict=True)
        ]
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
