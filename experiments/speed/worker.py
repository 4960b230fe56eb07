"""One variant of a training step in a process of its own, driven line by line through a pipe.

``step.py`` starts it: ``python worker.py VARIANT MODEL_FOLDER BATCHES THREADS``. Requests arrive on stdin,
one JSON object a line: ``{"step": i}`` trains on batch i and answers wall time, CPU time and loss;
``{"report": true}`` answers peak memory, parameter count and versions; the end of the input ends the process.
Only the packages of the variant are imported, so a variant may live in another environment than ``step.py``.

Shapes: b rows, s columns, t target columns.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

RANK, PREFIX, SUFFIX = 8, 7, 7
# an ordinary rate: the time of a step does not depend on it, and losses stay finite
LEARNING_RATE = 1e-4

Batch = dict[str, Any]
Loss = Callable[[Batch], Tensor]


def plain_inputs(batch: Batch) -> Batch:
    """What every Hugging Face model takes."""
    return {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids", "labels")}


def bare(model: nn.Module) -> tuple[Loss, list[nn.Parameter]]:
    """B: the frozen model and one trained vector at the embeddings, so that gradients pass every block."""
    vector = nn.Parameter(torch.zeros(model.config.hidden_size))
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out + vector.to(out.dtype))
    return lambda batch: model(**plain_inputs(batch)).loss, [vector]


def reft(
    model: nn.Module, *, tied: str = "all", target_logits_only: bool = False
) -> tuple[Loss, list[nn.Parameter]]:
    """LoReFT of this project on all layers."""
    import reft_lightning as rl
    from reft_lightning.data.encoding import target_only

    adapted = rl.attach(model, "loreft", rank=RANK, layers="all", positions=f"f{PREFIX}+l{SUFFIX}", tied=tied)
    adapted.train()

    def loss(batch: Batch) -> Tensor:
        inputs = target_only(batch) if target_logits_only else dict(batch)
        del inputs["boundary"]
        return adapted(**inputs).loss

    return loss, [p for p in adapted.parameters() if p.requires_grad]


def lora(model: nn.Module, rank: int, modules: list[str]) -> tuple[Loss, list[nn.Parameter]]:
    """LoRA through peft, without dropout."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).train()
    return lambda batch: adapted(**plain_inputs(batch)).loss, [
        p for p in adapted.parameters() if p.requires_grad
    ]


def pyreft(model: nn.Module, *, tied: bool) -> tuple[Loss, list[nn.Parameter]]:
    """LoReFT of pyreft on all layers, called as its trainer calls it."""
    import pyreft as peer

    layers = list(range(model.config.num_hidden_layers)) * (1 if tied else 2)
    representations = []
    for layer in layers:
        intervention = peer.LoreftIntervention(
            embed_dim=model.config.hidden_size, low_rank_dimension=RANK, dtype=torch.float32
        )
        representations.append(
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": RANK,
                "intervention": intervention,
            }
        )
    adapted = peer.get_reft_model(model, peer.ReftConfig(representations=representations))
    adapted.train()
    parameters = [p for r in representations for p in r["intervention"].parameters()]

    def loss(batch: Batch) -> Tensor:
        inputs = plain_inputs(batch)
        labels = inputs.pop("labels")
        where = batch["pyreft_locations.tied" if tied else "pyreft_locations.untied"]
        # (b, 1 or 2, slots) -> (b, interventions, slots): all prefixes, then all suffixes
        where = where.repeat_interleave(len(layers) // where.shape[1], dim=1)
        unit_locations = {"sources->base": (None, where.permute(1, 0, 2).tolist())}
        _, output = adapted(inputs, unit_locations=unit_locations, labels=labels)
        return output.loss

    return loss, parameters


LORA_SMALL = (8, ["q_proj", "v_proj"])
LORA_LARGE = (32, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
VARIANTS: dict[str, Callable[[nn.Module], tuple[Loss, list[nn.Parameter]]]] = {
    "B": bare,
    "reft": reft,
    "reft untied": lambda model: reft(model, tied="group"),
    "reft target-only": lambda model: reft(model, target_logits_only=True),
    "B bf16": bare,
    "reft bf16": reft,
    "reft bf16 target-only": lambda model: reft(model, target_logits_only=True),
    "lora r8": lambda model: lora(model, *LORA_SMALL),
    "lora r32": lambda model: lora(model, *LORA_LARGE),
    "pyreft tied": lambda model: pyreft(model, tied=True),
    "pyreft untied": lambda model: pyreft(model, tied=False),
}


def load_batches(path: str) -> list[Batch]:
    """Read the batches of ``step.py`` back: ``i.name`` tensors, where ``boundary`` is a number."""
    batches: dict[str, Batch] = {}
    for name, tensor in load_file(path).items():
        index, _, key = name.partition(".")
        batches.setdefault(index, {})[key] = int(tensor) if key == "boundary" else tensor
    return [batches[index] for index in sorted(batches, key=int)]


def peak_memory_bytes() -> int:
    """The largest resident memory of this process.

    Linux: ``VmHWM``, because ``ru_maxrss`` starts at the parent's figure after a fork.
    """
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Build the variant, say ready, answer requests."""
    variant, folder, batch_file, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    batches = load_batches(batch_file)
    dtype = torch.bfloat16 if "bf16" in variant else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.train()
    loss_of, parameters = VARIANTS[variant](model)
    if variant.startswith("reft"):  # a ReftModel finds positions in masks and numbers tokens itself
        unread = ("pyreft_locations.tied", "pyreft_locations.untied", "position_ids")
        batches = [{key: value for key, value in batch.items() if key not in unread} for batch in batches]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def step(index: int) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = loss_of(batches[index % len(batches)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "loss": float(loss.detach()),
        }

    def report() -> dict[str, Any]:
        names = ["torch", "transformers", *[n for n in ("peft", "pyreft", "pyvene") if n in sys.modules]]
        return {
            "peak_memory_bytes": peak_memory_bytes(),
            "trainable_parameters": sum(p.numel() for p in parameters),
            "versions": {name: importlib.metadata.version(name) for name in names},
        }

    answers.write(json.dumps({"ready": variant}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(step(request["step"]) if "step" in request else report()) + "\n")


if __name__ == "__main__":
    main()
