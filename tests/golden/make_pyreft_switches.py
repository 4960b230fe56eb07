"""Write pyreft_switches.safetensors and .json: what pyreft computes in bfloat16, with short prompts and dropout.

Run by hand, in the environment of ``make_pyreft_golden.py``, whose base weights it takes:

    OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 pyreft-venv/bin/python tests/golden/make_pyreft_switches.py

The base model, W and b are bfloat16 and R float32: pyreft's defaults. Prompts of 3 and 5 tokens are shorter than f3+l3
asks for. Interventions are untied (one for the prefix, one for the suffix of each layer). Dropout drops the same
columns at every call, so that two implementations can be compared: a mask takes the place of pyreft's ``dropout``.

=====================================  ================================================================
``batch/input_ids``, ``..mask``        (3, s) right-padded, without the token that pyreft puts in front
``dropout/keep``                       (d,) bool, the columns that are kept
``phi/<method>/h``, ``.../out``        (n, d) bfloat16, an intervention on its own
``parameters/<method>/<layer>/<g>/*``  R (float32), W, b, W1, W2 (bfloat16); matrices (r, d), b (r,)
``logits/<method>``                    (n, V) bfloat16 at the n real tokens
``gradients/<method>/<layer>/<g>/*``   of the mean next-token loss, for W, b, W1, W2
=====================================  ================================================================
"""

import importlib.metadata
import json
import platform

import pyreft
import torch
from make_pyreft_golden import CONFIG, FOLDER, LAYERS, PAD, RANK, locations, make_model, parameters
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 7
PROMPT_LENGTHS = [3, 5, 12]
TARGET_LENGTHS = [4, 3, 5]
POSITIONS = "f3+l3"
DROPOUT = 0.25
GROUPS = ["prefix", "suffix"]
CLASSES = {
    "loreft": pyreft.LoreftIntervention,
    "noreft": pyreft.NoreftIntervention,
    "direft": pyreft.NodireftIntervention,
    "direft_orthonormal": pyreft.DireftIntervention,
}


class FixedDropout(nn.Module):
    """Dropout of the same columns at every call, scaled as torch scales: 1 / (1 - p), in the dtype of x."""

    def __init__(self, keep: torch.Tensor) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.keep, x / (1 - DROPOUT), 0.0).to(x.dtype)


def make_intervention(method: str, keep: torch.Tensor) -> torch.nn.Module:
    arguments = {"embed_dim": CONFIG["hidden_size"], "low_rank_dimension": RANK}
    if method in ("noreft", "direft"):
        arguments["add_bias"] = False  # the second bias is not in the paper's formula
    module = CLASSES[method](**arguments)  # dtype: bfloat16 unless told otherwise
    module.dropout = FixedDropout(keep)
    for parameter in parameters(method, module).values():
        if parameter.is_leaf:
            parameter.data.normal_(std=0.5)
    return module


def main() -> None:
    torch.manual_seed(SEED)
    weights = load_file(FOLDER / "pyreft.safetensors")
    weights = {name.removeprefix("base/"): t for name, t in weights.items() if name.startswith("base/")}
    keep = torch.rand(CONFIG["hidden_size"]) >= DROPOUT
    tensors = {"dropout/keep": keep}

    width = max(p + t for p, t in zip(PROMPT_LENGTHS, TARGET_LENGTHS, strict=True))
    ids = torch.full((len(PROMPT_LENGTHS), width), PAD)
    labels = torch.full_like(ids, -100)
    for row, (p, t) in enumerate(zip(PROMPT_LENGTHS, TARGET_LENGTHS, strict=True)):
        ids[row, : p + t] = torch.randint(1, CONFIG["vocab_size"], (p + t,))
        labels[row, p : p + t] = ids[row, p : p + t]
    mask = (ids != PAD).long()
    tensors |= {"batch/input_ids": ids, "batch/attention_mask": mask, "batch/labels": labels}
    sunk = torch.cat([torch.full_like(ids[:, :1], PAD), ids], dim=1)
    batch = {"input_ids": sunk, "attention_mask": (sunk != PAD).long()}
    sunk_labels = torch.cat([torch.full_like(labels[:, :1], -100), labels], dim=1)

    cases = []
    for method in CLASSES:
        base = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
        base.load_state_dict(weights, strict=False)
        base = base.bfloat16()
        layers = LAYERS * len(GROUPS)  # pyreft: all prefix interventions, then all suffix interventions
        modules = [make_intervention(method, keep) for _ in layers]
        h = torch.randn(64, CONFIG["hidden_size"]).bfloat16()
        with torch.no_grad():
            tensors |= {f"phi/{method}/h": h, f"phi/{method}/out": modules[0](h)}
        reft = make_model(base, modules, layers)
        reft.model.requires_grad_(False)
        where = locations(POSITIONS, PROMPT_LENGTHS, len(layers), False, shift=1)
        _, output = reft(batch, unit_locations={"sources->base": (None, where)}, labels=sunk_labels)
        output.loss.backward()
        tensors[f"logits/{method}"] = output.logits[:, 1:][mask.bool()].detach().clone()
        for layer, group, module in zip(layers, [g for g in GROUPS for _ in LAYERS], modules, strict=True):
            for name, value in parameters(method, module).items():
                place = f"{method}/{layer}/{group}/{name}"
                tensors[f"parameters/{place}"] = value.detach().clone()
                if name != "R":  # its gradient is that of another free parameter
                    tensors[f"gradients/{place}"] = value.grad.clone()
        cases.append({"method": method, "pyreft_class": CLASSES[method].__name__, "loss": output.loss.item()})

    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise RuntimeError(f"not finite: {broken}")
    path = FOLDER / "pyreft_switches.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    path.chmod(0o644)
    packages = ["pyreft", "pyvene", "torch", "transformers", "safetensors"]
    facts = {
        "script": "tests/golden/make_pyreft_switches.py",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "seed": SEED,
        "prompt_lengths": PROMPT_LENGTHS,
        "positions": POSITIONS,
        "dropout": DROPOUT,
        "cases": cases,
    }
    (FOLDER / "pyreft_switches.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
