"""Copy the results of run folders into one results.jsonl, without the paths of the machine.

python experiments/collect.py experiments/quickstart/results.jsonl RUN_FOLDER ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    target, *folders = map(Path, sys.argv[1:])
    lines = []
    for folder in folders:
        values = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if values["status"] != "complete":
            raise SystemExit(f"{folder} is not complete: {values['status']}")
        del values["run_dir"]
        lines.append(json.dumps(values, sort_keys=True) + "\n")
    target.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
