r"""Steering specifications of EasySteer, a vLLM with edits of hidden states: ``steering.json``, all in one file.

It holds one vector an intervention, with the payload of its ``loreft`` algorithm, which computes
:math:`h + s\,R^\top (W h + b - R h)` at the output of a block and does not ask for orthonormal rows. So every
low-rank edit :math:`U^\top (V h + c)` without an activation fits, with :math:`R = U, W = V + U, b = c`. Tensors are
float32, base64 of their bytes; EasySteer knows a payload by the sha256 of its content.

The server takes it as ``--steering-config steering.json``, a request as its field ``steering``.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.reft.config import ReftConfig
from ..adapters.reft.model import ReftModel
from ..adapters.reft.positions import Term
from ..interventions import Subspace
from ..storage.atomic import write_json
from .foreign import check_alone, check_not_joint

log = logging.getLogger(__name__)

FILE = "steering.json"
WIRE_VERSION = 1  # of EasySteer's payloads


def to_easysteer(reft: ReftModel, folder: str | PathLike) -> None:
    """Write an adapter as a steering specification of EasySteer, ``steering.json``.

    Raises:
        ValueError: for an intervention, a site, a tying or positions that EasySteer does not have, and why.
    """
    check_alone(reft, "EasySteer")
    check_config(reft.config)
    vectors: list[dict[str, Any]] = []
    for layer in reft.config.layers:
        spec, (positions, tied) = reft.config.for_layer(layer), reft.positions[str(layer)]
        where = f"layer {layer}"
        if spec.component != "block_output":
            raise ValueError(f"{where}: EasySteer edits the output of blocks only; got {spec.component!r}")
        kinds = {term.kind for term in positions.terms}
        shares = any(term.share is not None for term in positions.terms)
        if positions.function is not None or shares or not kinds <= {"f", "l", "prompt", "decode", "all"}:
            given = "position function" if positions.function is not None else f"positions {positions}"
            raise ValueError(f"{where}: EasySteer takes no {given}; use fN, lN, prompt, decode or all")
        if tied == "position":
            raise ValueError(
                f"{where}: tied='position' has an intervention a position, whose clipped prompts EasySteer cannot "
                "follow; use tied='all' or 'group'"
            )
        groups = [positions.terms] if tied == "all" else [(term,) for term in positions.terms]
        for terms, phi in zip(groups, reft.interventions[str(layer)], strict=True):
            if not isinstance(phi, Subspace) or not phi.edits_tokens:
                raise ValueError(
                    f"{where}: {spec.method!r} is not of the form U'(V h + c) of the six low-rank methods, which "
                    "EasySteer's loreft payload holds"
                )
            U, V, c = (tensor.detach().float() for tensor in phi.affine())
            vectors.append({
                "data": _payload(layer, U.mT, V + U, c), "algorithm": "loreft", "scale": float(reft.scale),
                "layers": [layer], "apply": _apply(terms),
            })  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"vectors": vectors, "conflict": "priority"})
    bounded = sorted({str(p) for p, _ in reft.positions.values() for term in p.terms if term.kind in "fl"})
    if bounded:
        log.warning(
            "EasySteer does not halve prompts shorter than %s ask for: there, other tokens are edited than here",
            ", ".join(bounded),
        )


def check_config(config: ReftConfig) -> None:
    """Reject an adapter whose settings EasySteer does not have.

    Raises:
        ValueError: for interventions that were trained with a LoRA, a trained head, or no interventions.
    """
    check_not_joint(config, "EasySteer")
    if not config.layers:
        raise ValueError("this adapter has no interventions, so there is nothing to write for EasySteer")
    if config.heads:
        raise ValueError(f"EasySteer serves the base model's own heads; this adapter trained {config.heads}")


def _apply(terms: tuple[Term, ...]) -> dict[str, Any]:
    """Return the clause of EasySteer that selects the tokens of some terms."""
    clause: dict[str, Any] = {}
    for term in terms:
        if term.kind in ("prompt", "all"):
            clause["prompt"] = "all"
        if term.kind == "all" or (term.kind == "decode" and term.count is None):
            clause["generation"] = "all"
        elif term.kind == "decode":
            clause["generation_window"] = [0, term.count]
        elif term.kind == "f":
            # positions past the end would be clamped to the last token
            clause["prompt_window"] = [0, term.count]
        elif term.kind == "l":
            clause["prompt_positions"] = list(range(-(term.count or 0), 0))
    return clause


def _payload(layer: int, R: Tensor, W: Tensor, b: Tensor) -> dict[str, Any]:  # (d, r), (r, d), (r,)
    """Return a payload in the form in which EasySteer sends it, with the digest by which it knows it."""
    arrays = {"learned_source_bias": b, "learned_source_weight": W, "rotate_layer": R}
    digest = hashlib.sha256(f"reft:{WIRE_VERSION}".encode())
    tensors = {}
    for name, tensor in sorted(arrays.items()):
        array = tensor.cpu().contiguous().numpy().astype("<f4")
        data = array.tobytes()
        digest.update(name.encode() + str(array.shape).encode() + data)
        tensors[name] = {"shape": list(array.shape), "data": base64.b64encode(data).decode("ascii")}
    digest.update(f"layer={layer!r}".encode())
    return {
        "version": WIRE_VERSION, "kind": "reft", "tensors": tensors, "extra": {"layer": layer},
        "sha256": digest.hexdigest(),
    }  # fmt: skip
