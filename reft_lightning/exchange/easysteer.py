r"""Steering specifications of EasySteer, a vLLM that edits hidden states, in a single file ``steering.json``.

The file has one vector per intervention, with the payload of EasySteer's ``loreft`` algorithm. This computes
:math:`h + s\,R^\top (W h + b - R h)` at the output of a block and does not need orthonormal rows, so every
low-rank edit :math:`U^\top (V h + c)` without an activation fits, with :math:`R = U, W = V + U, b = c`. Tensors are
float32, as base64 of their bytes; EasySteer identifies a payload by the sha256 of its content.

The server takes the file as ``--steering-config steering.json``, a request in its field ``steering``.
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
WIRE_VERSION = 1  # version of EasySteer's payloads


def to_easysteer(reft: ReftModel, folder: str | PathLike) -> None:
    """Write an adapter as a steering specification for EasySteer, ``steering.json``.

    Raises:
        ValueError: if EasySteer does not support an intervention, site, tying or positions, with the reason.
    """
    check_alone(reft, "EasySteer")
    check_config(reft.config)
    vectors: list[dict[str, Any]] = []
    for layer in reft.config.layers:
        spec, (positions, tied) = reft.config.for_layer(layer), reft.positions[str(layer)]
        where = f"layer {layer}"
        if spec.component != "block_output":
            raise ValueError(f"{where}: EasySteer edits only the output of blocks; got {spec.component!r}")
        kinds = {term.kind for term in positions.terms}
        shares = any(term.share is not None for term in positions.terms)
        if positions.function is not None or shares or not kinds <= {"f", "l", "prompt", "decode", "all"}:
            given = "a position function" if positions.function is not None else f"positions {positions}"
            raise ValueError(
                f"{where}: EasySteer does not support {given}; use fN, lN, prompt, decode or all"
            )
        if tied == "position":
            raise ValueError(
                f"{where}: tied='position' has one intervention per position, which EasySteer cannot clip for short "
                "prompts; use tied='all' or 'group'"
            )
        groups = [positions.terms] if tied == "all" else [(term,) for term in positions.terms]
        for terms, phi in zip(groups, reft.interventions[str(layer)], strict=True):
            if not isinstance(phi, Subspace) or not phi.edits_tokens:
                raise ValueError(
                    f"{where}: {spec.method!r} does not have the form U'(V h + c) of the six low-rank methods, which "
                    "EasySteer's loreft payload needs"
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
            "EasySteer does not clip %s in short prompts, so it edits different tokens there than this library",
            ", ".join(bounded),
        )


def check_config(config: ReftConfig) -> None:
    """Reject an adapter whose settings EasySteer does not support.

    Raises:
        ValueError: if there are no interventions, they were trained together with a LoRA, or a head was trained.
    """
    check_not_joint(config, "EasySteer")
    if not config.layers:
        raise ValueError("this adapter has no interventions, so there is nothing to write for EasySteer")
    if config.heads:
        raise ValueError(
            f"EasySteer serves the base model's own heads, but this adapter trained {config.heads}"
        )


def _apply(terms: tuple[Term, ...]) -> dict[str, Any]:
    """Return EasySteer's clause that selects the tokens of some terms."""
    clause: dict[str, Any] = {}
    for term in terms:
        if term.kind in ("prompt", "all"):
            clause["prompt"] = "all"
        if term.kind == "all" or (term.kind == "decode" and term.count is None):
            clause["generation"] = "all"
        elif term.kind == "decode":
            clause["generation_window"] = [0, term.count]
        elif term.kind == "f":
            # EasySteer would clamp positions past the end to the last token
            clause["prompt_window"] = [0, term.count]
        elif term.kind == "l":
            clause["prompt_positions"] = list(range(-(term.count or 0), 0))
    return clause


def _payload(layer: int, R: Tensor, W: Tensor, b: Tensor) -> dict[str, Any]:  # (d, r), (r, d), (r,)
    """Return a payload in EasySteer's wire format, with the digest that identifies it."""
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
