"""Write pyreft.safetensors and pyreft.json: what pyreft itself computes on a tiny Llama.

Run by hand, in an environment of its own; the tests only read the two files. Environment of the stored files:

    python3 -m venv pyreft-venv
    pyreft-venv/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate datasets evaluate matplotlib \
        ipywidgets plotnine scikit-learn -c constraints.txt
    pyreft-venv/bin/pip install --no-deps pyreft==0.1.0 pyvene==0.1.8
    OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 pyreft-venv/bin/python tests/golden/make_pyreft_golden.py

``--no-deps`` because pyreft pins transformers 4.45 and asks for jupyter, wandb and torchvision, unused here.

Everything random is stored in the safetensors file, so a reader needs no seed:

=====================================  ================================================================
``base/<name>``                        state dict of the base model (its config is in the json file)
``batch/input_ids``, ``..mask``        (3, s) right-padded, without the token that pyreft puts in front
``parameters/<set>/<layer>/<group>/*`` R, W, b, W1, W2 of an intervention; matrices (r, d), b (r,)
``logits/base``, ``logits/<case>``     (n, V) at the n real tokens, in the order of the mask's nonzero()
``generate/prompt``, ``generate/..``   (1, s) and (new tokens,)
=====================================  ================================================================

pyreft runs in float64 from base weights that float32 holds exactly, so that rounding hardly enters the
comparison (the Llama code keeps norms and rotary angles in float32). Intervention parameters are stored in
float64, logits in float32.

Names follow the paper: pyreft stores R as a (d, r) weight (transposed here), W of ``learned_source`` and W2
(``proj_layer``) as (r, d). The paper's DiReFT is pyreft's ``NodireftIntervention``. Batches go through pyreft
as its own data sets prepare them: one masked pad token in front (the "sink" that unused location slots point
at), all locations shifted by one, ``attention_mask = ids != pad``.
"""

import importlib.metadata
import json
import platform
from pathlib import Path

import pyreft
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 5
LAYERS = [0, 2]
RANK = 4
PAD = 0
PROMPT_LENGTHS = [7, 9, 12]  # at least 6: floor(n / 2) >= 3, so that neither f3 nor l3 is clipped
TARGET_LENGTHS = [4, 3, 5]
NEW_TOKENS = 8
MARGIN = (
    0.02  # best minus second logit of every greedy step: rounding on another machine cannot change the ids
)
POSITIONS = ["f3", "l2", "f2+l3"]
FOLDER = Path(__file__).parent

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,  # wide enough that attention is far from uniform and an edit moves the logits
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "sdpa",  # eager gives NaN in float64 for the masked token in front
}

# our method name -> pyreft class
CLASSES = {
    "loreft": pyreft.LoreftIntervention,
    "noreft": pyreft.NoreftIntervention,
    "direft": pyreft.NodireftIntervention,
    "direft_orthonormal": pyreft.DireftIntervention,
    "consreft": pyreft.ConsreftIntervention,
    "lobireft": pyreft.LobireftIntervention,
}


def make_intervention(method: str) -> torch.nn.Module:
    arguments = {"embed_dim": CONFIG["hidden_size"], "low_rank_dimension": RANK, "dtype": torch.float64}
    if method in ("noreft", "direft"):
        arguments["add_bias"] = False  # the second bias is not in the paper's formula
    torch.set_default_dtype(torch.float64)  # pyreft offers no dtype for R
    try:
        return CLASSES[method](**arguments)
    finally:
        torch.set_default_dtype(torch.float32)


def parameters(method: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of one pyreft intervention under the paper's names."""
    source = module.learned_source
    if method in ("noreft", "direft"):
        return {"W1": source.weight, "b": source.bias, "W2": module.proj_layer.weight}
    R = module.rotate_layer.weight.mT  # (d, r) -> (r, d)
    if method in ("consreft", "lobireft"):
        return {"R": R, "b": source}
    return {"R": R, "W": source.weight, "b": source.bias}


def make_model(base: LlamaForCausalLM, modules: list[torch.nn.Module], layers: list[int]) -> pyreft.ReftModel:
    representations = [
        {"layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": module}
        for layer, module in zip(layers, modules, strict=True)
    ]
    reft = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    held = [value[0] if isinstance(value, (list, tuple)) else value for value in reft.interventions.values()]
    if len(held) != len(modules) or any(a is not b for a, b in zip(held, modules, strict=True)):
        raise RuntimeError(
            "pyreft reordered or copied the interventions: the parameters saved would be wrong"
        )
    return reft


def locations(positions: str, lengths: list[int], count: int, share_weights: bool, shift: int) -> list:
    """pyreft's locations, (interventions, batch, slots), moved right by `shift`."""
    rows = [
        pyreft.get_intervention_locations(
            last_position=n, positions=positions, num_interventions=count, share_weights=share_weights
        )
        for n in lengths
    ]
    return [[[slot + shift for slot in row[i]] for row in rows] for i in range(count)]


def clipping_facts() -> dict[str, dict[str, list]]:
    """What pyreft selects for prompts of 1..8 tokens: -1 is the slot of the token put in front."""
    facts = {}
    for positions in ("f3+l3", "f3", "l3"):
        for tied, share in (("all", True), ("group", False)):
            count = 1 if share or "+" not in positions else 2
            facts[f"{positions} tied={tied}"] = {
                str(n): pyreft.get_intervention_locations(
                    last_position=n, positions=positions, num_interventions=count, share_weights=share
                )
                for n in range(1, 9)
            }
    return facts


@torch.no_grad()
def main() -> None:
    torch.manual_seed(SEED)
    base = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    tensors = {f"base/{name}": t.clone() for name, t in base.state_dict().items() if name != "lm_head.weight"}
    base = base.double()

    width = max(p + t for p, t in zip(PROMPT_LENGTHS, TARGET_LENGTHS, strict=True))
    input_ids = torch.full((len(PROMPT_LENGTHS), width), PAD)
    for row, (p, t) in enumerate(zip(PROMPT_LENGTHS, TARGET_LENGTHS, strict=True)):
        input_ids[row, : p + t] = torch.randint(1, CONFIG["vocab_size"], (p + t,))
    mask = (input_ids != PAD).long()
    with_sink = torch.cat([torch.full_like(input_ids[:, :1], PAD), input_ids], dim=1)
    batch = {"input_ids": with_sink, "attention_mask": (with_sink != PAD).long()}
    prompt = input_ids[1:2, : PROMPT_LENGTHS[1]].clone()
    single = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    tensors |= {"batch/input_ids": input_ids, "batch/attention_mask": mask, "generate/prompt": prompt}

    def real(logits: torch.Tensor) -> torch.Tensor:  # (b, 1 + s, V) -> (n, V)
        return logits[:, 1:][mask.bool()].float()

    def greedy(output) -> torch.Tensor:
        ids = output.sequences[0, prompt.shape[1] :].clone()
        best, second = torch.stack(output.scores).topk(2).values.unbind(-1)  # each (new tokens, 1)
        if (best - second).min() < MARGIN or len(ids.unique()) < 3:
            raise RuntimeError(
                f"choose another seed: {ids.tolist()}, smallest margin {(best - second).min():.4f}"
            )
        return ids

    generate_arguments = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    tensors["logits/base"] = real(base(**batch).logits)
    tensors["generate/base"] = greedy(base.generate(**single, **generate_arguments))

    cases, generations = [], []
    for method in CLASSES:
        for tied in ("all", "group"):
            groups = ["all"] if tied == "all" else ["prefix", "suffix"]
            layers = LAYERS * len(groups)  # pyreft: all prefix interventions, then all suffix interventions
            modules = [make_intervention(method).eval() for _ in layers]
            for module in modules:  # pyreft starts W, b near zero for a wide model; a visible edit tests more
                for parameter in parameters(method, module).values():
                    if parameter.is_leaf:
                        parameter.normal_(std=0.5)
            parameter_set = f"{method}.{tied}"
            for layer, group, module in zip(
                layers, [g for g in groups for _ in LAYERS], modules, strict=True
            ):
                for name, value in parameters(method, module).items():
                    tensors[f"parameters/{parameter_set}/{layer}/{group}/{name}"] = value.detach().clone()
            reft = make_model(base, modules, layers)
            for positions in POSITIONS if tied == "all" else ["f2+l3"]:
                where = locations(positions, PROMPT_LENGTHS, len(layers), tied == "all", shift=1)
                _, output = reft(batch, unit_locations={"sources->base": (None, where)})
                case = f"{method}.{tied}.{positions}"
                tensors[f"logits/{case}"] = real(output.logits)
                cases.append(
                    {
                        "name": case,
                        "method": method,
                        "pyreft_class": CLASSES[method].__name__,
                        "tied": tied,
                        "positions": positions,
                        "parameters": parameter_set,
                        "max_change": float((tensors[f"logits/{case}"] - tensors["logits/base"]).abs().max()),
                    }
                )
            if tied == "all":
                where = locations("f2+l3", [prompt.shape[1]], len(layers), True, shift=0)
                _, output = reft.generate(
                    single,
                    unit_locations={"sources->base": (None, where)},
                    intervene_on_prompt=True,
                    **generate_arguments,
                )
                tensors[f"generate/{method}"] = greedy(output)
                generations.append({"method": method, "positions": "f2+l3", "parameters": parameter_set})

    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise RuntimeError(f"not finite: {broken}")
    save_file({name: value.contiguous() for name, value in tensors.items()}, FOLDER / "pyreft.safetensors")
    (FOLDER / "pyreft.safetensors").chmod(0o644)
    packages = ["pyreft", "pyvene", "torch", "transformers", "safetensors"]
    facts = {
        "script": "tests/golden/make_pyreft_golden.py",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "seed": SEED,
        "base_config": CONFIG,
        "layers": LAYERS,
        "rank": RANK,
        "prompt_lengths": PROMPT_LENGTHS,
        "target_lengths": TARGET_LENGTHS,
        "new_tokens": NEW_TOKENS,
        "cases": cases,
        "generations": generations,
        "short_prompt_locations": clipping_facts(),
    }
    (FOLDER / "pyreft.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
