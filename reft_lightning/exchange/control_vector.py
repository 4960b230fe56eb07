"""Control vectors of llama.cpp: ``control_vector.gguf`` with one vector per block, for its ``--control-vector``.

llama.cpp adds ``direction.N`` to the output of block N, 0-based as here, for every token that it reads or generates.
Its loader refuses ``direction.0``, and its buffers have no place for one.
"""

from __future__ import annotations

import logging
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..adapters.reft.config import LayerSpec, ReftConfig
from ..adapters.reft.model import ReftModel
from ..adapters.reft.positions import parse_positions
from ..base_models.decoders import is_decoder
from ..base_models.reading import continues_texts
from ..base_models.stacks import config_of_stack
from ..storage.atomic import write_whole
from ..storage.reading import naming
from ..suggest import needs_extra
from .folding import affine
from .foreign import check_alone, check_not_joint

FILE = "control_vector.gguf"
KIND = "controlvector"  # llama.cpp's name for this architecture


def to_gguf(reft: ReftModel, folder: str | PathLike) -> None:
    """Write an adapter that adds constant vectors to the outputs of blocks as a llama.cpp control vector.

    ``reft.scale`` is folded in: use it in llama.cpp with strength 1.

    Raises:
        ValueError: if an edit, a site or positions do not fit a control vector, with the reason.
    """
    check_alone(reft, "llama.cpp")
    if not (is_decoder(reft.base_model.config) or continues_texts(reft.base_model)):
        raise ValueError(
            f"llama.cpp adds control vectors only to decoders; {type(reft.base_model).__name__} is not a decoder"
        )
    check_config(reft.config)
    vectors = {layer: _vector(reft, layer) for layer in reft.config.layers}
    with needs_extra("gguf", "writing GGUF files needs the gguf package"):
        import gguf
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it would log the name of the temporary file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        writer = gguf.GGUFWriter(partial, KIND)
        writer.add_string(f"{KIND}.model_hint", config_of_stack(reft.base_model).model_type)
        writer.add_uint32(f"{KIND}.layer_count", len(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(folder / FILE, write)


def check_config(config: ReftConfig) -> None:
    """Reject an adapter whose settings do not fit a control vector.

    Raises:
        ValueError: if llama.cpp does not support a head, layer, component or positions, or there are no interventions.
    """
    check_not_joint(config, "llama.cpp")
    if config.heads:
        raise ValueError(f"a control vector cannot hold heads, but this adapter trained {config.heads}")
    if not config.layers:
        raise ValueError("this adapter has no interventions, so there is no control vector")
    for layer in config.layers:
        _check_layer(layer, config.for_layer(layer))


def _check_layer(layer: int, spec: LayerSpec) -> None:
    if spec.component != "block_output":
        raise ValueError(
            f"layer {layer}: llama.cpp adds control vectors only to the output of blocks; got {spec.component!r}"
        )
    if layer == 0:
        raise ValueError(
            "layer 0: llama.cpp adds control vectors only to blocks after the first: train without layer 0"
        )
    positions = parse_positions(spec.positions)
    if str(positions) != "all":
        given = "a position function" if positions.function is not None else f"positions={positions}"
        raise ValueError(
            f"layer {layer}: llama.cpp adds control vectors to every token, in the prompt and after it, so positions "
            f"must be all; got {given}"
        )


def _vector(reft: ReftModel, layer: int) -> Tensor:  # (d,)
    """Return the vector that is added to the output of a block, in float32."""
    (phi,) = reft.interventions[str(layer)]
    with naming(f"layer {layer}"):
        _, V, k = affine(phi, phi.dim)
    if V.any():
        method = reft.config.for_layer(layer).method
        raise ValueError(
            f"layer {layer}: a control vector is the same for all tokens, but the edit of {method!r} depends on the "
            "token; bias, difference_in_means and lobireft add constants"
        )
    return (reft.scale * k).float()
