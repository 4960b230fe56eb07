"""Do EasySteer's own classes accept what to_easysteer writes, and does its loreft compute the same edit?

    python experiments/exchange/read_in_easysteer.py CHECKOUT

CHECKOUT/vllm/steer_vectors holds api.py, payloads.py and algorithms/loreft.py of EasySteer-vllm-v1 at 6267ca0, next to
empty __init__.py. The whole vLLM is not needed: of loreft.py, only _transform is called.
"""

import ast
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reft_lightning as rl

METHODS = ["loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft"]
GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


def their_transform(
    checkout: Path,
):  # -> the method of LoReFTAlgorithm, without the base class that needs vLLM
    tree = ast.parse((checkout / "vllm" / "steer_vectors" / "algorithms" / "loreft.py").read_text())
    found = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_transform")
    names = {"torch": torch}
    exec(compile(ast.Module([found], []), "loreft.py", "exec"), names)
    return names["_transform"]


def main(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    from vllm.steer_vectors.api import SteeringSpec
    from vllm.steer_vectors.payloads import ReftIntervention, materialize

    transform = their_transform(checkout)
    config = json.loads((GOLDEN / "pyreft.json").read_text())["base_config"]
    for method in METHODS:
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**config))
        reft = rl.attach(base, method, rank=4, layers=[0, 2], positions="f2+l3", tied="group").eval()
        with torch.no_grad():
            for parameter in reft.interventions.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        with tempfile.TemporaryDirectory() as folder:
            rl.to_easysteer(reft, folder)
            spec = SteeringSpec.model_validate_json((Path(folder) / "steering.json").read_text())
        h, worst, digests = torch.randn(7, config["hidden_size"]), 0.0, True
        phis = [phi for group in reft.interventions.values() for phi in group]
        for vector, phi in zip(spec.vectors, phis, strict=True):
            ((layer, params),) = materialize(vector.data, "cpu", torch.float32, vector.layers).items()
            again = ReftIntervention(
                params["rotate_layer"], params["learned_source_weight"], params["learned_source_bias"], layer
            )
            digests &= again.to_wire()["sha256"] == vector.data["sha256"]
            edited = transform(SimpleNamespace(), h, params | {"scale_factor": vector.scale})
            worst = max(worst, float((edited - phi(h)).detach().abs().max()))
        print(
            json.dumps(
                {"method": method, "vectors": len(spec.vectors), "digests_agree": digests, "worst": worst}
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
