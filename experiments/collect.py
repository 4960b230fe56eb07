"""Copy the results of run folders into one results.jsonl, without the paths of the machine.

python experiments/collect.py experiments/quickstart/results.jsonl RUN_FOLDER ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    kept = {k: v for k, v in values.items() if k not in PLACES}
    return json.dumps(_names(kept), sort_keys=True) + "\n"


def _names(value: Any) -> Any:
    """Return a value of JSON whose absolute paths are names of files."""
    if isinstance(value, dict):
        return {key: _names(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_names(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


if __name__ == "__main__":
    main()
