"""Inspect the adapter of a run: the findings are one dictionary, the contents of ``inspect.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from ..adapters.adapt import interventions_of
from ..adapters.reft.lens import in_stream, logits_of
from ..adapters.reft.measuring import (
    EditNorms,
    interventions_by_layer,
    leaving_out,
    places_of,
    subspace,
    watching,
)
from ..adapters.reft.model import ReftModel
from ..interventions import Intervention
from ..runs.build import Objects
from ..training.evaluation import evaluate
from .angles import between, chance_angle, mean_angle
from .perplexity import perplexity

SCALES = tuple(k / 2 for k in range(-4, 5))  # strengths of the curve
TOKENS = 6  # shown for each direction of the logit lens
NO_SUBSPACE = "its edits have no subspace, or are at attention heads"
Scores = dict[str, float]
Step = Callable[[str], None]  # called with a description of the next step
Subspaces = dict[int, Tensor]  # layer -> orthonormal rows


@dataclass(frozen=True)
class Inspected:
    """A run with its adapter, and what is needed to measure it."""

    objects: Objects
    trainer: Trainer
    text: dict[str, Any] | None  # windows of a text, or None for a model that cannot continue a text
    other: Objects | None = None  # the same model on the rows of another family, or None

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.trainer.strategy.root_device

    def score(self, objects: Objects | None = None) -> Scores:
        """Return loss and scores on the validation rows, without generated texts."""
        objects = objects or self.objects
        objects.module.generates = False
        found = evaluate(self.trainer, objects.module, objects.data, "validation").metrics
        names = (name for name in found if name.count("/") == 1 and not name.endswith("majority_accuracy"))
        return {name.removeprefix("val/"): found[name] for name in names}

    def everything(self) -> Scores:
        """Return the scores, and the perplexity of the text if there is one."""
        scores = self.score()
        if self.text is None:
            return scores
        model = self.objects.module.to(self.device).eval().model
        return scores | {"perplexity": perplexity(model, self.text, self.device)}


def steps_of(model: Any, other: bool) -> int:
    """Return the number of steps that :func:`find` reports."""
    reft = interventions_of(model)
    inside = len(reft.sites) + len(places_of(reft)) + 1 + len(SCALES) + 1 if reft else 0
    return 2 + inside + 2 * other


def find(run: Inspected, step: Step = lambda what: None) -> dict[str, Any]:
    """Inspect the adapter of a run, except its subspaces (:func:`compare`); call ``step`` before each evaluation."""
    model = run.objects.model
    found: dict[str, Any] = {"not_inspected": []}
    step("the frozen base")
    with model.disabled():
        base = run.everything()
    step("the adapter")
    found["scores"] = {"base": base, "adapted": run.everything()}
    if run.other is not None:
        found["other"] = {}
        for name, context in (("base", model.disabled), ("adapted", nullcontext)):
            step(f"{run.other.data.family.name}, {name}")
            with context():
                found["other"][name] = run.score(run.other)
    if run.text is None:
        found["not_inspected"].append(
            "the model cannot continue a plain text, or needs marked words: no perplexity, no logit lens"
        )
    reft = interventions_of(model)
    if reft is None:
        found["not_inspected"].append(
            f"{model.config.method} edits no representations: no edit norms, switches or strengths"
        )
        return found
    step("edit norms")
    norms = _norms(run, reft)
    found["edit_norm"] = {
        "layers": [int(key) for key in reft.interventions],
        "positions": norms.places,
        "by_position": {layer: values.tolist() for layer, values in norms.by_place().items()},
        "by_layer": {layer: float(value) for layer, value in norms.by_layer().items()},
    }
    if run.text is not None:
        found["logit_lens"], left_out = _lens(run, reft, norms)
        found["not_inspected"] += left_out
    found["without"] = _without(run, reft, step)
    found["strength"] = _strengths(run, reft, step)
    return found


def _norms(run: Inspected, reft: ReftModel) -> EditNorms:
    """Measure the edits in one pass over prompt and gold target of each validation row."""
    norms, module, data = EditNorms(reft), run.objects.module, run.objects.data
    module.to(run.device).eval()
    with torch.no_grad(), watching(reft, norms):
        for loader in data.val_dataloader():
            for batch in loader:
                module.loss_of(data.transfer_batch_to_device(batch, run.device, 0))
    return norms


def subspaces(interventions: dict[int, list[Intervention]]) -> Subspaces:
    """Return the subspace of each layer that has one."""
    found = {layer: subspace(group) for layer, group in interventions.items()}
    return {layer: rows for layer, rows in found.items() if rows is not None and len(rows)}


def compare(name: str, own: Subspaces, others: Mapping[str, Subspaces]) -> dict[str, Any]:
    """Return the angles between the layers of an adapter, and between each layer and the same layer of others.

    Raises:
        ValueError: if another adapter edits representations of a different width.
    """
    if not own:
        return {"not_inspected": [f"{name}: {NO_SUBSPACE}, so there are no angles"]}
    runs, left_out = {}, []
    for other, theirs in others.items():
        shared = [layer for layer in own if layer in theirs]
        for layer in shared:
            width, another = own[layer].shape[1], theirs[layer].shape[1]
            if width != another:
                raise ValueError(
                    f"layer {layer} of {name} edits representations of width {width}, but that of {other} has width "
                    f"{another}: compare runs of the same model and component"
                )
        if not shared:
            why = "it does not edit the same layers" if theirs else NO_SUBSPACE
            left_out.append(f"{other}: {why}, so there are no angles to it")
        runs[other] = {
            layer: {"angle": mean_angle(P, Q), "chance": chance_angle(P, Q)}
            for layer, P, Q in ((layer, own[layer], theirs[layer]) for layer in shared)
        }
    spaces = list(own.values())
    found = {
        "layers": list(own),
        "dimensions": {layer: len(rows) for layer, rows in own.items()},
        "angle": between(spaces, mean_angle),
        "chance": between(spaces, chance_angle),
        "runs": runs,
    }
    return {"not_inspected": left_out, "subspaces": found}


def _lens(run: Inspected, reft: ReftModel, norms: EditNorms) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the tokens that the directions of each layer point to, and notes on what is left out.

    The constant is edit(0): R'b for LoReFT. The rows of R are one of many bases of the same subspace.
    """
    base, tokenizer = reft.base_model, run.objects.prepared.tokenizer
    mean, found, outside = norms.mean_edits(), [], {}
    for layer, group in interventions_by_layer(reft).items():
        if not in_stream(base, reft.sites[str(layer)]):
            outside.setdefault(reft.config.for_layer(layer).component, []).append(layer)
            continue
        named: list[tuple[str, Tensor]] = [("mean edit", mean[layer])] if layer in mean else []
        with torch.no_grad():
            for number, phi in enumerate(group):
                of = f" ({number})" if len(group) > 1 else ""
                zero = torch.zeros(1, phi.dim, device=next(phi.parameters()).device)
                named.append((f"constant{of}", reft.scale * phi.edit(zero)[0]))
                rows = phi.directions
                named += [(f"row {k}{of}", row) for k, row in enumerate([] if rows is None else rows)]
        directions = torch.stack([vector.to(base.device) for _, vector in named])
        logits = logits_of(base, torch.cat([directions, -directions]))
        tops = [[repr(tokenizer.decode([i])) for i in row] for row in logits.topk(TOKENS).indices.tolist()]
        found += [
            {"layer": layer, "direction": name, "towards": towards, "away_from": away}
            for (name, _), towards, away in zip(named, tops[: len(named)], tops[len(named) :], strict=True)
        ]
    return found, [
        f"{component} is not in the residual stream, which the output head reads: no logit lens for layers "
        f"{', '.join(map(str, layers))}"
        for component, layers in outside.items()
    ]


def _without(run: Inspected, reft: ReftModel, step: Step) -> dict[str, Any]:
    def score(what: str, context: AbstractContextManager) -> Scores:
        step(f"without {what}")
        with context:
            return run.score()

    layers = [int(key) for key in reft.interventions]
    return {
        "layer": {layer: score(f"layer {layer}", leaving_out(reft, layers=[layer])) for layer in layers},
        "position": {p: score(p, leaving_out(reft, places=[p])) for p in places_of(reft)},
        "all": score("all edits", leaving_out(reft, layers=layers)),
    }


def _strengths(run: Inspected, reft: ReftModel, step: Step) -> list[Scores]:
    trained, curve = reft.scale, []
    try:
        for scale in SCALES:
            step(f"strength {scale:g}")
            reft.scale = trained * scale
            curve.append({"scale": scale, **run.everything()})
    finally:
        reft.scale = trained
    return curve


def main_score(scores: Scores) -> str:
    """Return the score to show next to the loss: the first other than loss and perplexity, else the loss."""
    return next((name for name in scores if name not in ("loss", "perplexity")), "loss")
