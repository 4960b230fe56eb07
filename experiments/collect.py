"""Copy the results of run folders into one results.jsonl, without the paths of the machine.

python experiments/collect.py experiments/quickstart/results.jsonl RUN_FOLDER ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

# Places on the machine; the second holds what the user wrote, which may be absolute where a link or ~ stands in it.
PLACES = ("run_dir", "places_as_written")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="file to write; one that is there is replaced")
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="folder", help="a complete run of reft-train"
    )
    arguments = parser.parse_args(argv)
    lines = [_line(folder, parser) for folder in arguments.folders]  # all are read before anything is written
    arguments.target.write_text("".join(lines), encoding="utf-8")


def _line(folder: Path, parser: argparse.ArgumentParser) -> str:
    path = folder / "results.json"
    if not path.is_file():
        parser.error(f"{folder} is no run folder: it has no results.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["status"] != "complete":
        parser.error(f"{folder} is not complete: {values['status']}")
    return json.dumps({k: v for k, v in values.items() if k not in PLACES}, sort_keys=True) + "\n"


if __name__ == "__main__":
    main()
