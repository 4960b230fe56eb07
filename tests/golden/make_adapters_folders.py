"""Write adapters_folders/: adapters that AdapterHub's ``adapters`` saved itself, and what they compute on a tiny Llama.

Run by hand, in an environment of its own; the tests only read the files. Environment of the stored files:

    python3 -m venv adapters-venv
    adapters-venv/bin/pip install adapters==1.3.0 torch==2.13.0      # it brings transformers 4.57.6
    HF_HUB_OFFLINE=1 adapters-venv/bin/python tests/golden/make_adapters_folders.py

Not 1.2.0, whose Llama and Mistral are not the models: ``adapters.init`` alone moves their logits (by 6 here), as its
attention transposes what transformers 4.51 has transposed already.

The base model is the one in pyreft.safetensors. Each case is a folder, written by ``save_adapter``, and
``<case>/logits`` (rows, V) at the last token of each row in adapters_folders.safetensors; ``input_ids`` is padded on
the right. Gradients are of the mean logit: ``<case>/gradients/<name>`` of the first unit of the first layer.
"""

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 3
LENGTHS = [6, 9, 12]
FOLDER = Path(__file__).parent
OUT = FOLDER / "adapters_folders"
CASES = {
    "loreft": ("LoReftConfig", {"layers": [0, 2], "r": 4, "prefix_positions": 3}),
    "loreft_both_ends_relu": (
        "LoReftConfig",
        {"layers": [1], "r": 4, "prefix_positions": 2, "suffix_positions": 3, "non_linearity": "relu"},
    ),
    "loreft_tied": (
        "LoReftConfig",
        {"layers": "all", "r": 2, "prefix_positions": 2, "suffix_positions": 3, "tied_weights": True},
    ),
    "noreft": ("NoReftConfig", {"layers": [0, 2], "r": 4, "prefix_positions": 3}),
    "direft": ("DiReftConfig", {"layers": [1], "r": 4, "prefix_positions": 2, "suffix_positions": 3}),
}


def run(case: str, facts: dict, ids: torch.Tensor, safetensors: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**facts["base_config"]))
    stored = load_file(FOLDER / "pyreft.safetensors")
    weights = {n.removeprefix("base/"): t for n, t in stored.items() if n.startswith("base/")}
    model.load_state_dict(weights, strict=False)  # the head is tied to the embeddings
    adapters.init(model)
    kind, settings = CASES[case]
    model.add_adapter("mine", config=getattr(adapters, kind)(**settings))
    model.train_adapter("mine")
    model.eval()
    learned = {n: p for n, p in model.named_parameters() if "reft" in n}
    with torch.no_grad():  # as training leaves them; the diagonal of torch's map is a sign
        for name, parameter in learned.items():
            noise = 0.5 * torch.randn_like(parameter)
            # torch's map works on the transpose, as (r, d) is wide
            parameter.add_(noise.triu(1) if name.endswith("original") else noise)
    shutil.rmtree(OUT / case, ignore_errors=True)
    OUT.mkdir(exist_ok=True)
    model.save_adapter(str(OUT / case), "mine", use_safetensors=safetensors, with_head=False)
    mask = (ids != 0).long()
    logits = model(input_ids=ids, attention_mask=mask).logits[torch.arange(len(ids)), mask.sum(-1) - 1]
    logits.mean().backward()
    tensors = {f"{case}/logits": logits.detach()}
    unit = (
        f"layers.{0 if settings['layers'] == 'all' else settings['layers'][0]}.reft_layer.refts.mine.units.0."
    )
    for name, parameter in learned.items():
        if unit in name and not name.endswith("original"):
            tensors[f"{case}/gradients/{name.partition('units.0.')[2]}"] = parameter.grad.clone()
    return tensors


def main() -> None:
    facts = json.loads((FOLDER / "pyreft.json").read_text())
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        ids[row, :n] = torch.randint(1, facts["base_config"]["vocab_size"], (n,), generator=generator)
    tensors = {"input_ids": ids}
    for number, case in enumerate(CASES):
        tensors |= run(case, facts, ids, safetensors=number % 2 == 0)
    for written in OUT.rglob("*"):
        written.chmod(0o755 if written.is_dir() else 0o644)
    save_file({n: t.contiguous() for n, t in tensors.items()}, FOLDER / "adapters_folders.safetensors")
    (FOLDER / "adapters_folders.safetensors").chmod(0o644)
    packages = ["adapters", "torch", "transformers", "safetensors"]
    versions = {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in packages}
    values = {
        "script": "tests/golden/make_adapters_folders.py",
        "versions": versions,
        "seed": SEED,
        "cases": CASES,
    }
    (FOLDER / "adapters_folders.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
