"""The image tokens, the vision tower and the connector of a model that reads images.

They are found in its configuration and its modules, without a table of architectures.
"""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

PLACEHOLDERS = ("image_token_id", "video_token_id")  # in configurations
# Names of the map from the tower's width to the language model's in Hugging Face models, in the order they are tried.
CONNECTORS = ("multi_modal_projector", "connector", "merger", "mm_projector", "aligner")
DEPTHS = ("num_hidden_layers", "depth")


def image_tokens(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the ids of the placeholder tokens of images (or video frames); empty for a text-only model."""
    found = (getattr(config, name, None) for name in PLACEHOLDERS)
    return tuple(token for token in found if isinstance(token, int))


def vision_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path of the vision tower's list of blocks, and the list."""
    modules = dict(model.named_modules())
    tower = model.get_encoder(modality="image") if image_tokens(model.config) else model
    path = next((name for name, module in modules.items() if name and module is tower), None)
    if path is None:
        raise ValueError(f"{type(model).__name__} has no vision tower: it reads no images")
    vision = getattr(model.config, "vision_config", None)
    depth = next((getattr(vision, name) for name in DEPTHS if getattr(vision, name, None) is not None), None)
    lists = {
        name: module
        for name, module in modules.items()
        if name.startswith(f"{path}.") and isinstance(module, nn.ModuleList) and len(module) == depth
    }
    if not lists:
        raise ValueError(
            f"no list of {depth} blocks in {path} of {type(model).__name__}; give component as a module path with "
            "{layer}"
        )
    return max(lists.items(), key=lambda found: sum(p.numel() for p in found[1].parameters()))


def connector_path(model: PreTrainedModel) -> str:
    """Return the path of the module that maps the tower's output to the width of the language model."""
    for connector in CONNECTORS:
        paths = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == connector]
        if paths and image_tokens(model.config):
            return min(paths, key=len)
    raise ValueError(
        f"{type(model).__name__} has no connector named {', '.join(CONNECTORS)}: "
        + ("give another component" if image_tokens(model.config) else "it reads no images")
    )


def width_of_block(block: nn.Module) -> int:
    """Return the width of a block's hidden states, which is that of its first norm."""
    norms = (p for name, p in block.named_parameters() if p.ndim == 1 and "norm" in name)
    return next(norms).shape[0]
