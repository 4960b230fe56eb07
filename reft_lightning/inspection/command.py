"""``reft-inspect FOLDER [FOLDER ...]``: look inside the adapter of a run, and compare it with others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..adapters.methods import method_named
from ..adapters.reft.config import CONFIG_FILE
from ..adapters.reft.measuring import saved_interventions
from ..adapters.reft.sites import HEAD
from ..config.schema import Config
from ..interventions import intervention_class, method_name
from ..runs.arguments import method_of, needs_marks, untrained
from ..runs.build import Objects, prepare
from ..runs.evaluate import evaluating_trainer, load_run
from ..runs.kinds import kind_of
from ..runs.other_rows import on_other_rows
from ..runs.run_folder import at_commit, load_run_config
from ..storage.atomic import write_json
from ..storage.reading import read_json
from ..suggest import needs_extra
from ..terminal.bars import Bar
from ..terminal.lines import plain_console, say
from . import findings
from .figures import draw
from .perplexity import OWN, windows
from .view import show

log = logging.getLogger(__name__)


def main(
    folders: Sequence[Path],
    rows: int = 32,
    forget: Sequence[str] = (),
    text: Path | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Inspect the first folder, compare the others with it, write JSON and figures, and print the findings.

    Folders are runs or adapters; an adapter without its run has only subspaces. ``forget`` is ``data=NAME`` and
    overrides of its keys, for rows of another family. ``text`` is a file to measure perplexity on; None for the
    built-in passage.

    Raises:
        ValueError, OSError: before weights are loaded, for folders, rows or a text that cannot be used.
    """
    with needs_extra("report", "the figures need matplotlib"):
        import matplotlib  # noqa: F401
    console = console or plain_console()
    runs = [_run_of(folder) for folder in folders]
    out = out or runs[0] / "inspection"
    angles = _compare(runs)
    if (runs[0] / "config.yaml").is_file():
        inside = _inspect(runs[0], rows, forget, text, out)
    else:
        why = (
            f"{runs[0]} is an adapter without its run, whose config.yaml names model and rows: only its subspaces are "
            "compared"
        )
        inside = {"not_inspected": [why]}
    said = [*inside["not_inspected"], *angles["not_inspected"]]
    found = {"folder": str(runs[0]), **inside, **angles, "not_inspected": said}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "inspect.json", found)
    pictures = draw(found, out)
    show(found, console)
    for path in (out / "inspect.json", *pictures):
        say(console, str(path))
    return found


def _run_of(folder: Path) -> Path:
    """Return the run folder of a run or its adapter, or the folder of an adapter without a run."""
    for place in (folder, folder.parent):
        if (place / "config.yaml").is_file() and (place / "adapter").is_dir():
            return place
    if (folder / CONFIG_FILE).is_file():
        return folder
    raise ValueError(
        f"{folder} must be a finished run (config.yaml and adapter/) or an adapter ({CONFIG_FILE})"
    )


def _compare(runs: Sequence[Path]) -> dict[str, Any]:
    """Return the angles within and between adapters; reads neither weights nor rows."""
    own, *others = ((run, run if (run / CONFIG_FILE).is_file() else run / "adapter") for run in runs)
    spaces = {str(run): _subspaces(run, adapter) for run, adapter in others}
    if not (own[1] / CONFIG_FILE).is_file():  # a method without interventions, which has no subspaces
        return {"not_inspected": []}
    return findings.compare(str(own[0]), _subspaces(*own), spaces)


def _subspaces(run: Path, adapter: Path) -> findings.Subspaces:
    """Return the subspaces of a saved adapter; a custom intervention is imported by its name in the run.

    Layers that edit attention heads are left out, as each head has its own space.
    """
    saved: dict[str, Any] = read_json(adapter / CONFIG_FILE)
    if run == adapter:
        method, layers = saved.get("method", ""), saved.get("per_layer")
    else:
        intervention = load_run_config(run).intervention
        method, layers = intervention.method, intervention.layers
    each = layers.values() if isinstance(layers, Mapping) else ()
    for name in (method, *(own["method"] for own in each if own and "method" in own)):
        if method_named(name).takes_settings:
            method_name(intervention_class(name))  # registers it in the table used to load saved adapters
    found, own = saved_interventions(adapter), saved.get("per_layer") or {}
    where = {layer: {**saved, **own.get(str(layer), {})}.get("component", "") for layer in found}
    return findings.subspaces(
        {layer: group for layer, group in found.items() if not where[layer].startswith(HEAD)}
    )


def _with_rows(config: Config, rows: int) -> Config:
    """Read so many validation rows, and train rows only as far as the validation split needs them."""
    return replace(config, data=replace(config.data, limit_validation=rows, limit_train=1))


def _inspect(folder: Path, rows: int, forget: Sequence[str], text: Path | None, out: Path) -> dict[str, Any]:
    config = load_run_config(folder)
    config = replace(_with_rows(config, rows), test=False, evaluate_base=False)
    other = prepared = None
    if forget:
        other = _with_rows(on_other_rows(config, forget, forget[0].replace("data=", "forget=")), rows)
        prepared = prepare(untrained(at_commit(other, folder)))
    plan = prepare(untrained(at_commit(config, folder)))
    if not plan.data.val_tasks:
        raise ValueError(f"{folder} has no validation rows, which inspection needs")
    reads_on = kind_of(plan.family).generates and plan.source["task"] != "seq2seq_lm"
    batch = (
        windows(plan.tokenizer, text or OWN) if reads_on and not needs_marks(config.intervention) else None
    )
    objects = load_run(folder, config, plan)
    trainer = evaluating_trainer(config, out, progress_bar=False)
    also = None
    if prepared and other:
        module = kind_of(prepared.family).module(other, prepared, objects.model, None)
        also = Objects(prepared, objects.model, module, objects.name)
    run = findings.Inspected(objects, trainer, batch, also)
    with Bar("inspecting", findings.steps_of(objects.model, also is not None)) as bar:
        found = findings.find(run, lambda what: bar.show(bar.done + 1, what))
    return {
        "model": config.model.name, "method": method_of(config),
        "trainable_parameters": objects.prepared.count.trainable, "seed": config.seed,
        "family": config.data.family, "tasks": list(objects.data.val_tasks),
        "rows": sum(len(loader.dataset) for loader in objects.data.val_dataloader()),  # pyright: ignore
        "other_family": other.data.family if other else None, "text": str(text) if text else "of our own", **found,
    }  # fmt: skip
