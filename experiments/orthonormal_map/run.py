"""Learning curves of two maps to R: our Cholesky-QR of a free parameter, and torch's orthogonal parametrisation.

The paper's code uses `torch.nn.utils.parametrizations.orthogonal` (Householder, trivialised). Our free parameter is
scale-invariant: its norm may grow and shrink the effective step. Same seeds, data, order, initial R and W; the loss
of every step and the held-out loss at the end are compared. Further variants retract (A <- R after every step), and
start with rows of length 1/2, where a step of A turns R twice as far.

    python experiments/orthonormal_map/run.py --steps 60 --seeds 42 43 44 --out experiments/orthonormal_map/new.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import reft_lightning as rl
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.config import compose
from reft_lightning.data import FAMILIES
from reft_lightning.data.encoding import target_only
from reft_lightning.interventions.subspace import Subspace
from reft_lightning.runs.build import data_module, model_source, optimization_of


class HouseholderLoReFT(Subspace, name="experiment_householder_loreft"):
    """LoReFT with torch's orthogonal map, as the paper's code has it."""

    def build(self) -> None:
        self.rotation = nn.Linear(self.dim, self.rank, bias=False)  # (r, d): torch transposes wide matrices
        orthogonal(self.rotation)
        self.source = nn.Linear(self.dim, self.rank)

    def edit(self, h: Tensor) -> Tensor:
        R = self.rotation.weight
        return F.linear(h, self.source.weight - R, self.source.bias) @ R


def inputs(batch: dict) -> dict:
    return {k: v for k, v in target_only(batch).items() if k not in ("boundary", "examples", "rows")}


def phis(model: rl.ReftModel) -> list[nn.Module]:
    return [phi for group in model.interventions.values() for phi in group]


def train(config, base, tokenizer, variant: str, seed: int, steps: int) -> dict:
    """Train one variant with one seed; return losses, held-out loss and the growth of A."""
    torch.manual_seed(seed)
    # the hooks of variants attached before stay on the shared base and do nothing outside their own calls
    reference = rl.attach(
        base, "loreft", rank=config.intervention.rank, positions=config.intervention.positions
    )
    model = reference
    length = (
        0.5 if variant.startswith("half") else 1.0
    )  # of A's rows; R does not depend on it, the step size does
    with torch.no_grad():
        for phi in phis(reference):
            phi.basis.copy_(length * phi.R)
    if variant == "householder":
        starts = [(phi.R.detach().clone(), phi.source.state_dict()) for phi in phis(reference)]
        method = "experiment_householder_loreft"
        model = rl.attach(
            base, method, rank=config.intervention.rank, positions=config.intervention.positions
        )
        for phi, (R, source) in zip(phis(model), starts, strict=True):
            phi.rotation.weight = R  # torch's right inverse: the map starts at exactly this R
            phi.source.load_state_dict(source)
    config.seed = seed
    data = data_module(config, FAMILIES[config.data.family], tokenizer)
    data.setup("fit")
    rows = {"rotation": list(model.interventions.parameters())}  # no decay
    optimizer, schedule = optimization_of(config).build(rows, steps)
    losses: list[float] = []
    start = time.process_time()
    while len(losses) < steps:
        for batch in data.train_dataloader():
            loss = model(**inputs(batch)).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.interventions.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if variant.endswith("retracted"):
                with torch.no_grad():
                    for phi in phis(model):
                        phi.basis.copy_(length * phi.R)
            losses.append(loss.item())
            if len(losses) == steps:
                break
        data.seed += 1  # a new order every epoch, the same for every variant
    seconds = time.process_time() - start
    with torch.no_grad():
        held_out = [model(**inputs(b)).loss.item() for loader in data.val_dataloader() for b in loader]
    growth = 1.0
    if variant != "householder":
        growth = statistics.mean(phi.basis.norm().item() / phi.rank**0.5 for phi in phis(model)) / length
    return {"variant": variant, "seed": seed, "steps": steps, "held_out_loss": statistics.mean(held_out),
            "final_train_loss": statistics.mean(losses[-50:]), "basis_norm_growth": growth,
            "cpu_seconds": seconds, "losses": [round(x, 5) for x in losses]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument(
        "--variants", nargs="+", default=["qr", "householder", "retracted", "half", "half_retracted"]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="hydra overrides on top of experiment=small/boolq")
    given = parser.parse_args()
    config = compose.compose(["experiment=small/boolq", *given.overrides])
    base, tokenizer = load_base_model(**model_source(config))
    for seed in given.seeds:
        for variant in given.variants:
            result = train(config, base, tokenizer, variant, seed, given.steps)
            result |= {"model": config.model.name, "tasks": list(config.data.tasks), "dtype": config.model.dtype,
                       "batch_size": config.data.batch_size, "lr": config.optimizer.lr,
                       "rank": config.intervention.rank, "overrides": given.overrides}  # fmt: skip
            with given.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print({k: v for k, v in result.items() if k not in ("losses", "overrides")}, flush=True)


if __name__ == "__main__":
    main()
