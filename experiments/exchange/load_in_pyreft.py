"""Does pyreft load what to_pyreft writes, and compute the same? Run twice; the second run prints and writes the answer.

    python experiments/exchange/load_in_pyreft.py write FOLDER     # where reft_lightning is installed
    pyreft-venv/bin/python experiments/exchange/load_in_pyreft.py check FOLDER

The environment is that of tests/golden/make_pyreft_folders.py.

Each adapter is loaded with pyreft in two ways: by its own ReftModel.load, which makes W and b bfloat16 and forgets
add_bias and act_fn; and file by file into interventions that were built with the arguments that to_pyreft names.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
GOLDEN = HERE.parents[1] / "tests" / "golden"
LENGTH, LAYERS, RANK, POSITIONS = 12, [0, 2], 4, "f2+l3"
METHODS = ["loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft"]
CASES = [
    {"method": method, "tied": tied, "dtype": dtype, "act_fn": act_fn}
    for method in METHODS
    for tied in ("all", "group")
    for dtype in ("float32", "bfloat16")
    for act_fn in (None, "relu")
    if method not in ("consreft", "lobireft") or (act_fn is None and dtype == "float32")
]


def base_model(dtype: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = json.loads((GOLDEN / "pyreft.json").read_text())["base_config"]
    return LlamaForCausalLM(LlamaConfig(**config)).eval().to(getattr(torch, dtype))


def tokens() -> torch.Tensor:
    return torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def name_of(case: dict) -> str:
    return "_".join(str(value) for value in case.values() if value is not None)


def write(folder: Path) -> None:
    import reft_lightning as rl

    for case in CASES:
        settings = {} if case["method"] in ("consreft", "lobireft") else {"act_fn": case["act_fn"]}
        if settings and case["dtype"] == "bfloat16":
            settings["weight_dtype"] = "bfloat16"
        torch.manual_seed(2)
        reft = rl.attach(
            base_model(case["dtype"]), case["method"], rank=RANK, layers=LAYERS, positions=POSITIONS,
            tied=case["tied"], clip="floor", **settings,
        ).eval()  # fmt: skip
        with torch.no_grad():
            for parameter in reft.interventions.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
            logits = reft(input_ids=tokens()).logits
            base = reft.base_model(input_ids=tokens()).logits
        rl.to_pyreft(reft, folder / name_of(case))
        torch.save({"logits": logits, "base": base}, folder / name_of(case) / "expected.pt")


def by_hand(case: dict, folder: Path) -> "pyreft.ReftModel":  # noqa: F821
    import pyreft

    config = json.loads((folder / "config.json").read_text())
    arguments = {"dtype": getattr(torch, case["dtype"]), "act_fn": case["act_fn"], "add_bias": False}
    representations = [
        {
            "layer": layer, "component": component, "low_rank_dimension": rank,
            "intervention": getattr(pyreft, kind.rpartition(".")[2].removesuffix("'>"))(
                embed_dim=32, low_rank_dimension=rank, **arguments
            ),
        }
        for (layer, component, _, _, rank, *_), kind in zip(
            config["representations"], config["intervention_types"], strict=True
        )
    ]  # fmt: skip
    reft = pyreft.get_reft_model(
        base_model(case["dtype"]), pyreft.ReftConfig(representations=representations)
    )
    for key, intervention in reft.interventions.items():
        with torch.no_grad():
            intervention.load_state_dict(torch.load(folder / f"intkey_{key}.bin", weights_only=True))
        intervention.eval()
    return reft


def own_load(case: dict, folder: Path) -> "pyreft.ReftModel":  # noqa: F821
    import pyreft

    with torch.no_grad():
        reft = pyreft.ReftModel.load(str(folder), base_model(case["dtype"]))
    reft.set_device("cpu")
    return reft


def distance(reft: "pyreft.ReftModel", case: dict, folder: Path) -> dict:  # noqa: F821
    import pyreft

    count = len(LAYERS) * (2 if case["tied"] == "group" else 1)
    rows = pyreft.get_intervention_locations(
        last_position=LENGTH,
        positions=POSITIONS,
        num_interventions=count,
        share_weights=case["tied"] == "all",
    )
    ids = torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens()], 1)  # the token that pyreft puts in front
    where = [[[slot + 1 for slot in row]] * 2 for row in rows]
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        logits = reft(batch, unit_locations={"sources->base": (None, where)})[1].logits[:, 1:]
    expected = torch.load(folder / "expected.pt", weights_only=True)
    return {
        "largest_difference": float((logits - expected["logits"]).abs().max()),
        "edit_moves_logits_by": float((expected["logits"] - expected["base"]).abs().max()),
    }


def check(folder: Path) -> None:
    found = []
    for case in CASES:
        place = folder / name_of(case)
        for how, load in (("arguments passed by hand", by_hand), ("ReftModel.load", own_load)):
            try:
                result = distance(load(case, place), case, place)
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {str(error)[:80]}"}
            found.append({**case, "loaded_by": how, **result})
            print(found[-1])
    versions = {
        name: importlib.metadata.version(name) for name in ("pyreft", "pyvene", "torch", "transformers")
    }
    text = json.dumps({"versions": versions, "cases": found}, indent=1)
    (HERE / "load_in_pyreft.json").write_text(text + "\n")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
