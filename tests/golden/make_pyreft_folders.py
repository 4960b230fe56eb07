"""Write pyreft_folders/: adapters that pyreft saved itself, and what they compute on a tiny Llama.

Run by hand, once in an environment of each file-name format; the tests only read the files. pyvene 0.1.7 changed the
names of the saved files. Environments of the stored files, the first as in make_pyreft_golden.py:

    pyreft-venv/bin/pip install --no-deps pyreft==0.1.0 pyvene==0.1.8
    older-venv/bin/pip install --no-deps pyreft==0.0.8 pyvene==0.1.6
    OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 pyreft-venv/bin/python tests/golden/make_pyreft_folders.py
    OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 older-venv/bin/python tests/golden/make_pyreft_folders.py

The base model is the one in pyreft.safetensors. Each case is a folder, written by pyreft's own ``save``, and in
pyreft_folders.safetensors (or pyreft_folders_older.safetensors):

=================================  =====================================================================
``<case>/logits``                  (rows, V) at the last token of each row
``<case>/gradients/<letter>``      of R, W, b, W1, W2, b2 of the first intervention; R is the projection itself
``<case>/generate``                (new tokens,) greedy, after the longest prompt
``input_ids``                      (rows, s) padded on the right, without the token that pyreft puts in front
=================================  =====================================================================

Two of the three prompts are shorter than the positions ask for, so that pyreft's clip and its dummy token act.
"""

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path

import pyreft
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 11
PAD, IGNORED = 0, -100
PROMPT_LENGTHS = [3, 5, 9]
TARGET_LENGTHS = [4, 3, 5]
NEW_TOKENS = 8
MARGIN = 0.02  # best minus second logit of every greedy step
FOLDER = Path(__file__).parent
OLDER = importlib.metadata.version("pyvene") < "0.1.7"
OUT = FOLDER / "pyreft_folders"

LORA = {"class": "LoreftIntervention", "positions": "f2+l3"}
CASES = {
    "loreft_tied": LORA | {"layers": [0, 2]},
    "loreft_untied_relu": LORA | {"layers": [0, 2], "untied": True, "settings": {"act_fn": "relu"}},
    "loreft_bfloat16": LORA | {"layers": [1], "dtype": "bfloat16"},
    "loreft_module_path": LORA | {"layers": [1], "component": "model.layers[%d].mlp.output"},
    "noreft_untied": {"class": "NoreftIntervention", "layers": [1], "untied": True, "positions": "f2+l3",
                      "settings": {"add_bias": False}},
    "noreft_bias_gelu": {"class": "NoreftIntervention", "layers": [1], "positions": "l2",
                         "settings": {"add_bias": True, "act_fn": "gelu"}},
    "nodireft_untied": {"class": "NodireftIntervention", "layers": [1], "untied": True, "positions": "f2+l3",
                        "settings": {"add_bias": False}},
    "nodireft_bias_silu": {"class": "NodireftIntervention", "layers": [1], "positions": "f3",
                           "settings": {"add_bias": True, "act_fn": "silu"}},
    "direft_tied": {"class": "DireftIntervention", "layers": [1], "positions": "f2+l3"},
    "direft_untied_tanh": {"class": "DireftIntervention", "layers": [1], "untied": True, "positions": "f2+l3",
                           "settings": {"act_fn": "tanh"}},
    "consreft_ranks": {"class": "ConsreftIntervention", "layers": [0, 2], "ranks": [2, 4], "positions": "f2+l3"},
    "lobireft_untied": {"class": "LobireftIntervention", "layers": [1], "untied": True, "positions": "f2+l3"},
}  # fmt: skip
OLDER_CASES = {
    "older_loreft_untied": LORA | {"layers": [0, 2], "untied": True},
    "older_direft_tied": {"class": "DireftIntervention", "layers": [1], "positions": "f2+l3"},
    "older_loreft_module_path": LORA | {"layers": [1], "component": "model.layers[%d].mlp.output"},
}


def base_model(facts: dict, dtype: torch.dtype) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**facts["base_config"])).eval()
    stored = load_file(FOLDER / "pyreft.safetensors")
    weights = {n.removeprefix("base/"): t for n, t in stored.items() if n.startswith("base/")}
    model.load_state_dict(weights, strict=False)  # the head is tied to the embeddings
    return model.to(dtype)


def make_intervention(case: dict, rank: int, width: int, dtype: torch.dtype) -> torch.nn.Module:
    settings = dict(case.get("settings", {}), embed_dim=width, low_rank_dimension=rank, dtype=dtype)
    module = getattr(pyreft, case["class"])(**settings).eval()
    with (
        torch.no_grad()
    ):  # as training leaves them: torch's map keeps its first R in a buffer and moves `original`
        for name, parameter in module.named_parameters():
            noise = torch.randn_like(parameter)
            # its diagonal is a sign that training must not touch: torch truncates it to a whole number
            parameter.add_(0.5 * noise.tril(-1) if name.endswith("original") else 0.5 * noise)
    return module


def letters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters under the paper's letters; R is (d, r) in pyreft, and computed."""
    found = {}
    source = module.learned_source
    free = hasattr(module, "proj_layer")
    if isinstance(source, torch.nn.Linear):
        found |= {"W1" if free else "W": source.weight, "b": source.bias}
    else:
        found |= {"b": source}
    if free:
        found |= {"W2": module.proj_layer.weight}
        found |= {"b2": module.proj_layer.bias} if module.proj_layer.bias is not None else {}
    else:
        found |= {"R": module.rotate_layer.weight}
    return found


def run(
    name: str, case: dict, facts: dict, input_ids: torch.Tensor, seed: int
) -> tuple[dict[str, torch.Tensor], dict]:
    torch.manual_seed(seed)
    dtype = getattr(torch, case.get("dtype", "float32"))
    base = base_model(facts, dtype)
    groups = 2 if case.get("untied") else 1
    layers = case["layers"] * groups  # pyreft: all interventions of the prefix, then all of the suffix
    ranks = case.get("ranks", [4] * len(case["layers"])) * groups
    modules = [make_intervention(case, rank, base.config.hidden_size, dtype) for rank in ranks]
    component = case.get("component", "block_output")
    reft = pyreft.get_reft_model(
        base,
        pyreft.ReftConfig(
            representations=[
                {
                    "layer": layer,
                    "component": component % layer if "%" in component else component,
                    "low_rank_dimension": rank,
                    "intervention": module,
                }
                for layer, rank, module in zip(layers, ranks, modules, strict=True)
            ]
        ),
    )
    shutil.rmtree(OUT / name, ignore_errors=True)
    reft.save(str(OUT / name))

    def locations(lengths: list[int]) -> list:  # moved by the token put in front, which unused slots edit
        rows = [
            pyreft.get_intervention_locations(
                last_position=n,
                positions=case["positions"],
                num_interventions=len(layers),
                share_weights=groups == 1,
            )
            for n in lengths
        ]
        return [[[slot + 1 for slot in row[i]] for row in rows] for i in range(len(layers))]

    sink = torch.full((len(input_ids), 1), PAD)
    ids = torch.cat([sink, input_ids], 1)
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    with parametrize.cached():
        projections = [letters(module).get("R") for module in modules]
        for R in projections:
            if R is not None:
                R.retain_grad()
        where = {"sources->base": (None, locations(PROMPT_LENGTHS))}
        logits = reft(batch, unit_locations=where)[1].logits[:, 1:]
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels_of(input_ids)[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        gradients = {letter: p.grad for letter, p in letters(modules[0]).items() if p.grad is not None}

    last = (input_ids != PAD).sum(-1) - 1
    tensors = {f"{name}/logits": logits[torch.arange(len(last)), last].detach()}
    for letter, gradient in gradients.items():
        tensors[f"{name}/gradients/{letter}"] = gradient.mT.clone() if letter == "R" else gradient.clone()

    prompt = ids[2:, : 1 + PROMPT_LENGTHS[2]]
    with torch.no_grad():
        _, output = reft.generate(
            {"input_ids": prompt, "attention_mask": (prompt != PAD).long()},
            unit_locations={"sources->base": (None, locations([PROMPT_LENGTHS[2]]))},
            intervene_on_prompt=True,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    best, second = torch.stack(output.scores).float().topk(2).values.unbind(-1)
    margin = float((best - second).min())
    tensors[f"{name}/generate"] = output.sequences[0, prompt.shape[1] :].clone()
    return tensors, {**case, "seed": seed, "loss": loss.item(), "margin": margin}


def labels_of(input_ids: torch.Tensor) -> torch.Tensor:
    columns = torch.arange(input_ids.shape[1])
    prompt = columns < torch.tensor(PROMPT_LENGTHS)[:, None]
    return input_ids.masked_fill(prompt | (input_ids == PAD), IGNORED)


def main() -> None:
    facts = json.loads((FOLDER / "pyreft.json").read_text())
    generator = torch.Generator().manual_seed(SEED)
    width = max(p + t for p, t in zip(PROMPT_LENGTHS, TARGET_LENGTHS, strict=True))
    input_ids = torch.full((len(PROMPT_LENGTHS), width), PAD)
    for row, (p, t) in enumerate(zip(PROMPT_LENGTHS, TARGET_LENGTHS, strict=True)):
        input_ids[row, : p + t] = torch.randint(
            1, facts["base_config"]["vocab_size"], (p + t,), generator=generator
        )
    tensors, cases = {"input_ids": input_ids}, {}
    for name, case in (OLDER_CASES if OLDER else CASES).items():
        for seed in range(SEED, SEED + 20):
            found, cases[name] = run(name, case, facts, input_ids, seed)
            if cases[name]["margin"] > (MARGIN if "dtype" not in case else 5 * MARGIN):
                break
        else:
            raise RuntimeError(f"{name}: rounding could change a greedy id, whatever the seed")
        tensors |= found
    for written in OUT.rglob("*"):
        written.chmod(0o755 if written.is_dir() else 0o644)
    file = FOLDER / ("pyreft_folders_older" if OLDER else "pyreft_folders")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{file}.safetensors")
    Path(f"{file}.safetensors").chmod(0o644)
    packages = ["pyreft", "pyvene", "torch", "transformers", "safetensors"]
    values = {
        "script": "tests/golden/make_pyreft_folders.py",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "prompt_lengths": PROMPT_LENGTHS,
        "target_lengths": TARGET_LENGTHS,
        "new_tokens": NEW_TOKENS,
        "cases": cases,
    }
    Path(f"{file}.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
