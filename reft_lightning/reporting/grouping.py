"""Group runs into comparisons, and the runs of a comparison into methods.

Runs are compared if model, family, tasks, rows and split are the same; any other difference, except in seeds, file
locations and logging, makes another method. Runs on other data make another comparison, never another line.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from .comparisons import AVERAGE, BASE, LOSS, Comparison, Method, Score, lower_is_better
from .runs import ALL, Run
from .scores import MAJORITY

UNEQUAL = 0.01  # budgets that differ by a larger fraction are reported
BUDGETS = ("steps", "tokens")
SHOWN = 4  # settings in a label
FEW = 10  # with fewer seeds their deviation is estimated badly


def compare(runs: Sequence[Run], split: str | None) -> list[Comparison]:
    """Return the comparisons of complete runs, without intervals and pairs; see :func:`used_split`."""
    groups: dict[str, list[tuple[Run, dict[str, str], str]]] = defaultdict(list)
    for run in runs:
        used = used_split(run, split)
        if used is None:
            continue
        facts, key = facts_of(run, used)
        groups[key].append((run, facts, used))
    found = [_comparison([run for run, *_ in group], *group[0][1:]) for group in groups.values()]
    for comparison, title in zip(found, _titles([c.facts for c in found]), strict=True):
        comparison.title = title
    return sorted(found, key=lambda comparison: comparison.title)


def used_split(run: Run, split: str | None) -> str | None:
    """Return the split a run is compared on: the given one, or ``test``, or ``validation``; None without a score."""
    allowed = (split,) if split else ("test", "validation")
    return next((name for name in allowed if _scores(run, name)), None)


def _scores(run: Run, split: str, base: bool = False) -> dict[str, dict[str, float]]:
    """Return task -> measure -> value; with the loss if nothing was scored, if it was monitored, or if all is 0."""
    scores, loss = run.scores(split, base), run.metrics(split, base).get(LOSS)
    if not scores and loss is not None:
        return {ALL: {LOSS: loss}}
    if len(scores) == 1 and loss is not None:
        (task, measures), *_ = scores.items()
        chose = str(run.results.get("monitor")).endswith(LOSS)
        if chose or not any(value for name, value in measures.items() if name != MAJORITY):
            return {task: {**measures, LOSS: loss}}
    return scores


def facts_of(run: Run, split: str) -> tuple[dict[str, str], str]:
    """Return what must be the same within a comparison: in words, and as one string to compare."""
    data: Mapping[str, Any] = run.results["data_versions"]
    kept = ("fingerprint", "test_fingerprint", "test_rows")
    prints = {
        part: {task: {k: facts.get(k) for k in kept} for task, facts in data.get(part, {}).items()}
        for part in ("train", "validation", "test") if part != "test" or split == "test"
    }  # fmt: skip
    limit = run.config.get("data.limit_test" if split == "test" else "data.limit_validation")
    carved: Mapping[str, Any] = data.get("split", {})
    # split_seed=null holds out different rows for each seed, so their fingerprint is not shared by seeds
    by_seed = run.config.get("data.split_seed") is None
    if by_seed and split == "test" and limit is None:
        carved = {k: v for k, v in carved.items() if not k.endswith("fingerprint")}
    seed = data.get("split_seed") if limit is not None or split == "validation" else None
    tasks = sorted(_scores(run, split))
    facts = {
        "model": str(run.results["model"]),
        "tasks": ", ".join(tasks),
        "split": split,
        "family": f"{data.get('family', '?')}, version {data.get('version', '?')}",
        "train rows": f"{carved.get('train_rows', '?'):,}" if "train_rows" in carved else "?",
        "evaluated rows": "all" if limit is None else f"at most {limit:,} per task",
        "template": str(data.get("template") or "none"),
    }
    for name, value in (
        ("revision", run.results.get("model_commit") or run.config.get("model.revision")),
        ("weights", run.results.get("model_fingerprint")),
    ):
        if value:
            facts[name] = str(value)
    return facts, json.dumps([facts, prints, carved, seed], sort_keys=True, default=str)


def _titles(all_facts: Sequence[Mapping[str, str]]) -> list[str]:
    """Return one title per comparison: model, tasks and split, with the facts that distinguish equal titles."""
    base = [f"{f['model']}, {f['tasks']} ({f['split']})" for f in all_facts]
    titles: list[str] = []
    for facts, title in zip(all_facts, base, strict=True):
        twins = [other for other, same in zip(all_facts, base, strict=True) if same == title]
        differing = [k for k in facts if len({twin.get(k) for twin in twins}) > 1]
        told = ", ".join(f"{k} {facts[k]}" for k in differing)
        titles.append(f"{title}, {told}" if told else title)
    return _numbered(titles, "{name}, data {number} of {of}")


def _numbered(names: Sequence[str], form: str) -> list[str]:
    """Return the names; those that occur several times are numbered."""
    counts, seen = Counter(names), Counter[str]()
    found: list[str] = []
    for name in names:
        seen[name] += 1
        found.append(form.format(name=name, number=seen[name], of=counts[name]) if counts[name] > 1 else name)
    return found


def _comparison(runs: Sequence[Run], facts: dict[str, str], split: str) -> Comparison:
    notes: list[str] = []
    by_settings: dict[str, dict[int, Run]] = defaultdict(dict)
    by_end = sorted(runs, key=lambda run: (run.seed, str(run.results.get("finished", "")), str(run.folder)))
    for run in by_end:
        seeds = by_settings[run.configuration]
        if run.seed in seeds:
            notes.append(f"{run.method}: seed {run.seed} ran more than once; the last complete run counts")
        seeds[run.seed] = run
    groups = [list(seeds.values()) for seeds in by_settings.values()]
    methods = [
        Method(label, group, scores=_collect(group, split))
        for label, group in zip(labels(groups), groups, strict=True)
    ]
    methods += _base(runs, split, notes)
    main = _telling(methods, _main(runs[0], split), notes)
    comparison = Comparison("", facts, split, methods, main, notes=list(dict.fromkeys(notes)))
    _average(comparison)
    comparison.unequal = unequal_budgets(methods)
    comparison.notes += _remarks(comparison)
    head = comparison.head
    sign = 1 if lower_is_better(head[1]) else -1
    means = {m: m.scores[head].mean if head in m.scores else math.nan for m in methods}
    methods.sort(key=lambda m: sign * means[m] if math.isfinite(means[m]) else math.inf)
    return comparison


def _collect(runs: Sequence[Run], split: str, base: bool = False) -> dict[tuple[str, str], Score]:
    found: dict[tuple[str, str], Score] = {}
    for run in runs:
        for task, measures in _scores(run, split, base).items():
            for measure, value in measures.items():
                score = found.setdefault((task, measure), Score(task, measure, {}))
                score.values[run.seed] = value
    return found


def _base(runs: Sequence[Run], split: str, notes: list[str]) -> list[Method]:
    """Return the frozen base, as evaluated by the first run that did so."""
    having = [run for run in runs if _scores(run, split, base=True)]
    if not having:
        return []
    first = having[0]
    values = _scores(first, split, base=True)
    for other in having[1:]:
        # as text, so that NaN equals NaN
        if json.dumps(_scores(other, split, base=True)) != json.dumps(values):
            notes.append(
                f"the frozen base has other scores in {other.folder} than in {first.folder}, which is used"
            )
    return [Method(BASE, [first], base=True, scores=_collect([first], split, base=True))]


def _main(run: Run, split: str) -> dict[str, str]:
    """Return task -> the measure by which checkpoints are chosen, or else the task's first."""
    monitored = str(run.results.get("monitor") or "").rpartition("/")[2]
    return {
        task: monitored if monitored in measures else next(iter(measures))
        for task, measures in sorted(_scores(run, split).items())
    }


def _telling(methods: Sequence[Method], main: dict[str, str], notes: list[str]) -> dict[str, str]:
    """Return task -> measure; if all methods score 0 by the main ones, the options' accuracy or the loss instead."""

    def found(measures: Mapping[str, str]) -> list[Score | None]:
        return [method.scores.get(item) for method in methods for item in measures.items()]

    if any(value for score in found(main) if score for value in score.values.values()):
        return main
    for other in ("option_accuracy", LOSS):
        instead = dict.fromkeys(main, other)
        if instead != main and all(found(instead)):
            notes.append(f"{', '.join(dict.fromkeys(main.values()))} is 0 for every method: {other} is shown")
            return instead
    return main


def _average(comparison: Comparison) -> None:
    if not comparison.has_average:
        return
    column = comparison.columns[-1]
    for method in comparison.methods:
        parts: list[Any] = [method.scores.get(item) for item in comparison.main.items()]
        if all(part is not None and part.values.keys() == parts[0].values.keys() for part in parts):
            values = {seed: float(np.mean([part.values[seed] for part in parts])) for seed in parts[0].values}
            method.scores[column] = Score(*column, values)


def labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return one label per method: its name and, if methods share it, the settings that differ between them."""
    found: list[str] = []
    for group in groups:
        twins = [other[0].settings for other in groups if other[0].method == group[0].method]
        own = group[0].settings
        keys = sorted({k for twin in twins for k in twin.keys() | own.keys() if twin.get(k) != own.get(k)})
        short = [key.removesuffix("._target_").rpartition(".")[2] for key in keys]
        told = [
            f"{name if short.count(name) == 1 else key}={_plain(own.get(key), key)}"
            for key, name in zip(keys, short, strict=True)
        ]
        more = [f"and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
        found.append(" ".join([group[0].method, *told[:SHOWN], *more]))
    return _numbered(found, "{name} ({number})")


def _plain(value: Any, key: str) -> str:
    if key.endswith("._target_"):
        return str(value).rpartition(".")[2]  # the class of an import path
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def unequal_budgets(methods: Sequence[Method]) -> list[str]:
    """Return a sentence for each budget in which trained methods differ by more than 1 %."""
    said: list[str] = []
    for name in BUDGETS:
        spent = {method.label: method.cost(name) for method in methods if method.trains}
        known = {label: value for label, value in spent.items() if value}
        if len(known) > 1 and max(known.values()) > (1 + UNEQUAL) * min(known.values()):
            each = ", ".join(f"{label} {value:,.0f}" for label, value in known.items())
            said.append(f"unequal budget, {name}: {each}")
    return said


def _remarks(comparison: Comparison) -> list[str]:
    """Return notes for the reader on the runs of a comparison."""
    methods = [method for method in comparison.methods if not method.base]
    said = [*_on_seeds(methods), *_diverged(methods)]
    begun = [m.label for m in methods if m.runs[0].settings.get("intervention.init_from")]
    if begun:
        said.append(
            f"{', '.join(begun)} started from a saved adapter, whose training is not in these budgets"
        )
    if comparison.split == "test":
        names = Counter(method.runs[0].method for method in methods)
        several = ", ".join(f"{name} in {count} configurations" for name, count in names.items() if count > 1)
        if several:
            said.append(
                f"{several}, all scored on test rows: choosing among them here would be selection on the test split; "
                "choose by validation (split=validation)"
            )
    for name, word in (
        ("device", "devices: seconds and tokens/s cannot be compared"),
        ("git_commit", "commits"),
    ):
        values = sorted({str(run.results.get(name)) for method in methods for run in method.runs})
        if len(values) > 1:
            said.append(f"runs of {len(values)} {word} ({', '.join(value[:40] for value in values)})")
    said += _overlapping(comparison)
    constants = {
        task: score.mean for method in comparison.methods for (task, measure), score in method.scores.items()
        if measure == MAJORITY and not score.diverged
    }  # fmt: skip
    said += [
        f"{task}: the most common training answer scores {100 * share:.1f}"
        for task, share in constants.items()
    ]
    tests = [run.results["data_versions"].get("test", {}) for method in methods for run in method.runs]
    for task in comparison.main if comparison.split == "test" else ():
        if overlap := max((facts.get(task, {}).get("overlap", 0) for facts in tests), default=0):
            said.append(f"{task}: {overlap} test rows occur among the training rows")
    return said


def _on_seeds(methods: Sequence[Method]) -> list[str]:
    said: list[str] = []
    seeds = {method.label: method.seeds for method in methods}
    if len({tuple(s) for s in seeds.values()}) > 1:
        each = "; ".join(f"{label}: {', '.join(map(str, s))}" for label, s in seeds.items())
        said.append(f"the methods have different seeds: {each}")
    if any(len(s) == 1 for s in seeds.values()):
        said.append(
            "with one seed there is no deviation, intervals and tests are over rows only, and nothing is known about "
            "other seeds"
        )
    few = {label: len(s) for label, s in seeds.items() if 1 < len(s) < FEW}
    if few:
        each = ", ".join(f"{label} {count}" for label, count in few.items())
        said.append(
            f"fewer than {FEW} seeds ({each}): too few to estimate the spread well, so intervals and p-values use "
            "Student's t: they are wide, and valid if scores are normal over seeds"
        )
    return said


def _overlapping(comparison: Comparison) -> list[str]:
    """Return a sentence if runs ran at the same time, and mark the comparison for the plot of seconds."""
    spans = sorted(
        span
        for method in comparison.methods
        if not method.base
        for run in method.runs
        if (span := _span(run))
    )
    together = sum(
        any(start < other_end and other < end for k, (other, other_end) in enumerate(spans) if k != i)
        for i, (start, end) in enumerate(spans)
    )
    comparison.overlapped = together > 0
    if not together:
        return []
    return [
        f"{together} runs ran at the same time as another: on one machine they slow each other down, so seconds, "
        "tokens/s and plots against seconds cannot be compared"
    ]


def _span(run: Run) -> tuple[datetime, datetime] | None:
    """Return the start and the end of a run; None if they are not recorded."""
    try:
        # a resumed run has the start and the end of its last part
        start, end = (datetime.fromisoformat(run.results[key]) for key in ("started", "finished"))
    except (KeyError, TypeError, ValueError):  # missing, or edited by hand
        return None
    return start, end


def _diverged(methods: Sequence[Method]) -> list[str]:
    """Return a sentence for each method with scores that are not finite."""
    said: list[str] = []
    for method in methods:
        lost: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for (task, measure), score in method.scores.items():
            if score.diverged and task != AVERAGE:
                lost[tuple(score.diverged)].append(f"{task} {measure.replace('_', ' ')}")
        for seeds, names in lost.items():
            said.append(
                f"{method.label} diverged with seeds {', '.join(map(str, seeds))}: {', '.join(names)} is not a number, "
                "so it is listed last and not tested"
            )
    return said
