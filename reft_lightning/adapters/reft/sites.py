r"""Sites l: where in the base model an intervention acts, found by inspecting the model.

A site is a module and one of its ends (input or output). The blocks are the ``nn.ModuleList`` whose length is the
configuration's number of layers, so no table of architectures is needed. Components:

================  =====================================================================
block_output      the hidden state after block l (the paper's choice)
block_input       the hidden state before block l
attention_output  the output of the block's attention module
head_output       the output of each attention head, before the map that mixes them; ``head_output:0+5`` for two heads
mlp_output        the output of the block's feed-forward module
a module path     e.g. ``model.layers.{layer}.mlp.down_proj`` or ``...o_proj.input``
================  =====================================================================

Two more see only images, in a model that reads images and text:

===================  ==================================================================
vision_block_output  the hidden states after block l of the vision tower
connector_output     the connector's output to the language model; it is layer 0
===================  ==================================================================

Layers and heads are 0-based: layer 0 is the first block. Each head has its own interventions, with the width of a head.
If several query heads share a key and a value, heads are the query heads.

A model with an encoder and a decoder (T5, BART) has these components in both, as ``encoder.block_output`` and
``decoder.block_output``; without the name of a stack, the encoder's are meant, as it reads the prompt.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...base_models.stacks import ENCODER, WHOLE, config_of_stack, stacks_of
from ...base_models.vision import connector_path, vision_blocks, width_of_block
from ...suggest import did_you_mean

COMPONENTS = ("block_output", "block_input", "attention_output", "mlp_output", "head_output")
VISION, CONNECTOR = "vision_block_output", "connector_output"
VISUAL = (VISION, CONNECTOR)
HEAD = "head_output"
# Names of these modules in Hugging Face models, in the order they are looked for inside a block.
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "layer.0.SelfAttention")
# the map that mixes the heads, inside attention
MIXING_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "proj", "output.dense", "o")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2", "output.dense",
             "layer.1.DenseReluDense", "layer.2.DenseReluDense")  # fmt: skip

Change = Callable[[Any], Tensor | None]  # hidden states -> new ones, or None to leave them unchanged


@dataclass(frozen=True)
class Site:
    """A module of the base model (by path) and its end, with the width of the representation there."""

    layer: int
    path: str
    end: str  # "input" or "output"
    dim: int
    divided: int = 1  # the number of parts of the representation: the heads of an attention module
    heads: tuple[int, ...] = (0,)  # the parts with interventions
    stack: str = WHOLE  # the part of the model that reads the tokens: encoder or decoder, if it has both
    visual: bool = False  # whether it sees only images

    @property
    def width(self) -> int:
        """The width of the whole representation; an intervention sees d of it."""
        return self.dim * self.divided

    def parts(self, index: Tensor) -> Tensor:  # (n,) tokens -> (heads, n)
        """Return the indices of the tokens' edited parts among the parts of all tokens."""
        heads = torch.tensor(self.heads, device=index.device)
        return index * self.divided + heads.unsqueeze(-1)

    @property
    def place(self) -> str:
        """A unique name: path and end."""
        return f"{self.path}.{self.end}"


def hidden_of(output: Any) -> Any:
    """Return the hidden states in a module's output: the output itself or its first element."""
    return output[0] if type(output) in (tuple, list) else output


def hook_at(module: nn.Module, end: str, change: Change, first: bool = False) -> RemovableHandle:
    """Hook a function that replaces the hidden states at one end of a module, or returns None to leave them.

    ``first`` puts it before earlier hooks on the output. transformers collects hidden states with such hooks from the
    first pass that needs them, and some models read images from what it collected in the vision tower.
    """
    if end == "output":
        return module.register_forward_hook(partial(_after, change), prepend=first)
    return module.register_forward_pre_hook(partial(_before, change), with_kwargs=True)


def _after(change: Change, module: nn.Module, args: tuple, output: Any) -> Any:
    hidden = change(hidden_of(output))
    if hidden is None or type(output) not in (tuple, list):
        return hidden
    return type(output)([hidden, *output[1:]])


def _before(change: Change, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    hidden = change(args[0] if args else kwargs.get("hidden_states"))
    if hidden is None:
        return None
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def check_layers(layers: str | Sequence[int], num_layers: int, none_allowed: bool = False) -> list[int]:
    """Return the requested layer ids.

    Raises:
        ValueError: unless layers is ``"all"`` or distinct ids in 0..num_layers-1.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers must be 'all' or a list of ids in 0..{num_layers - 1}; got {layers!r}")
        if not num_layers and not none_allowed:
            raise ValueError(
                "layers=all selects no layer, as the model has none (num_hidden_layers=0): nothing would be trained"
            )
        return list(range(num_layers))
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    if not isinstance(layers, Sequence):
        raise ValueError(f"layers must be 'all' or a list of ids in 0..{num_layers - 1}; got {layers!r}")
    ids = list(layers)
    for layer in ids:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < num_layers:
            raise ValueError(
                f"layer must lie in 0..{num_layers - 1}, as the model has {num_layers} layers; got {layer!r}"
            )
    if len(set(ids)) < len(ids):
        raise ValueError(f"layers must be distinct; got {ids}")
    if not ids and not none_allowed:
        raise ValueError(
            f"layers is empty and no heads are given, so nothing would be trained: name at least one of "
            f"0..{num_layers - 1}, or 'all', or give heads to train only a classifier's head"
        )
    return ids


def stack_of(model: PreTrainedModel, component: Any) -> tuple[str, str]:
    """Return the stack of a model that a component belongs to, and the component's name there.

    ``decoder.block_output`` in T5 gives ``("decoder", "block_output")``. A module path is returned unchanged.
    """
    stacks = stacks_of(model)
    if len(stacks) == 1 or not isinstance(component, str):
        return WHOLE, component
    stack, _, inside = component.partition(".")
    if "{layer}" in component:
        return next((s for s, path in stacks.items() if component.startswith(f"{path}.")), WHOLE), component
    return (stack, inside) if stack in stacks else (ENCODER, component)


def layers_with(model: PreTrainedModel, component: Any) -> int:
    """Return the number of layers with a component, in the language model, one of its stacks, or the vision tower."""
    if component == CONNECTOR:
        return 1
    if component == VISION:
        return len(vision_blocks(model)[1])
    return number_of_layers(model, stack_of(model, component)[0])


def number_of_layers(model: PreTrainedModel, stack: str = WHOLE) -> int:
    """Return the number of blocks of the language model, or of one of its stacks, in the configuration."""
    layers = getattr(config_of_stack(model, stack), "num_hidden_layers", None)
    if layers is None:
        raise ValueError(
            f"the configuration of {type(model).__name__} has no num_hidden_layers: it is not a language model"
        )
    return layers


def block_path(model: PreTrainedModel, stack: str = WHOLE) -> str:
    """Return the path of the list of blocks, e.g. ``model.layers``; in an encoder-decoder, that of one stack."""
    num_layers = number_of_layers(model, stack)
    stacks = stacks_of(model)
    inside = f"{stacks[stack or ENCODER]}." if len(stacks) > 1 else ""
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(inside)
    }
    found = [name for name, length in lists.items() if length == num_layers]
    # A list inside a block (T5's block.N.layer, the experts of a mixture) is not the list of blocks.
    found = [n for n in found if not any(n.startswith(f"{outer}.") for outer in lists if outer != n)]
    # A vision or audio tower can have equally many blocks; the language model's path has one of these names.
    if len(found) > 1:
        text = [
            n for n in found if any(part in n for part in ("language_model", "text_model", "text_decoder"))
        ]
        found = text or found
    if len(found) != 1:
        what = f"{len(found)} lists" if found else "no list"
        raise ValueError(
            f"{what} of {num_layers} blocks in {type(model).__name__} "
            f"({', '.join(found or lists) or 'no ModuleList'}); "
            "give component as a module path with {layer}"
        )
    return found[0]


def find_sites(model: PreTrainedModel, components: Mapping[int, str]) -> dict[int, Site]:
    """Return the site of each layer's component."""
    where = {layer: stack_of(model, component) for layer, component in components.items()}
    named = {stack for stack, name in where.values() if str(name).partition(":")[0] in COMPONENTS}
    blocks = {stack: block_path(model, stack) for stack in named}
    return {
        layer: replace(_site(model, f"{blocks.get(stack, '')}.{layer}", layer, name, stack), stack=stack)
        for layer, (stack, name) in where.items()
    }


def _module_at(model: PreTrainedModel, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _site(model: PreTrainedModel, block: str, layer: int, component: str, stack: str) -> Site:
    config = config_of_stack(model, stack)
    if isinstance(component, str) and "{layer}" in component:
        path, end = component.replace("{layer}", str(layer)), "output"
        for suffix in ("input", "output"):
            if path.endswith(f".{suffix}") and _module_at(model, path) is None:
                path, end = path[: -len(suffix) - 1], suffix
    elif isinstance(component, str) and component.partition(":")[0] == HEAD:
        return _head_site(model, block, layer, component, config)
    elif component in VISUAL:
        return _visual_site(model, layer, component, config.hidden_size)
    elif component in COMPONENTS:
        path, end = block, "input" if component == "block_input" else "output"
        names = {"attention_output": ATTENTION_NAMES, "mlp_output": MLP_NAMES}.get(component)
        if names:
            path = f"{path}.{_child(model, path, names, component)}"
    else:
        raise ValueError(
            f"unknown component {component!r}; allowed: {', '.join((*COMPONENTS, *VISUAL))}, or a module path with "
            f"{{layer}}{', in the encoder or, as in decoder.block_output, in the decoder' if stack else ''}"
            f"{did_you_mean(str(component), (*COMPONENTS, *VISUAL))}"
        )
    module = _module_at(model, path)
    if module is None:
        near = difflib.get_close_matches(path, dict(model.named_modules()), n=5, cutoff=0.5)
        raise ValueError(
            f"{type(model).__name__} has no module {path!r}; the closest are {', '.join(near) or 'none'}"
        )
    return Site(layer, path, end, width_at(module, end, config.hidden_size))


def _visual_site(model: PreTrainedModel, layer: int, component: str, width: int) -> Site:
    if component == CONNECTOR:
        check_layers([layer], 1)
        return Site(layer, connector_path(model), "output", width, visual=True)
    path, blocks = vision_blocks(model)
    check_layers([layer], len(blocks))
    return Site(layer, f"{path}.{layer}", "output", width_of_block(blocks[layer]), visual=True)


def _head_site(
    model: PreTrainedModel, block: str, layer: int, component: str, config: PretrainedConfig
) -> Site:
    attention = f"{block}.{_child(model, block, ATTENTION_NAMES, HEAD)}"
    count = getattr(config, "num_attention_heads", None)
    if not count:
        raise ValueError(f"the configuration of {type(model).__name__} has no num_attention_heads")
    path = f"{attention}.{_child(model, attention, MIXING_NAMES, HEAD)}"
    width = width_at(model.get_submodule(path), "input", config.hidden_size)
    if width % count:
        raise ValueError(
            f"the input of {path} has width {width}, not a multiple of the {count} heads of {type(model).__name__}"
        )
    _, colon, listed = component.partition(":")
    heads = tuple(range(count))
    if colon:
        heads = tuple(int(head) if head.isdecimal() else -1 for head in listed.split("+"))
    if len(set(heads)) < len(heads) or not all(0 <= head < count for head in heads):
        raise ValueError(
            f"component {component!r} must name distinct heads in 0..{count - 1}, as in head_output:0+{count - 1}; "
            "head_output without numbers means all heads"
        )
    return Site(layer, path, "input", width // count, count, heads)


def _child(model: PreTrainedModel, block: str, names: tuple[str, ...], component: str) -> str:
    inside = dict(model.get_submodule(block).named_modules())
    for name in names:
        if name in inside:
            return name
    candidates = ", ".join(f"'{block.rsplit('.', 1)[0]}.{{layer}}.{name}'" for name in inside if name)
    raise ValueError(
        f"{component} was not found in {block} of {type(model).__name__}; give one of these paths as the component: "
        f"{candidates}"
    )


def width_at(module: nn.Module, end: str, stream: int) -> int:
    """Return d at a site: the width of a linear map, or else of the residual stream."""
    module = dict(module.named_children()).get("base_layer", module)  # the map inside a peft adapter
    if isinstance(module, nn.Linear):
        return module.in_features if end == "input" else module.out_features
    if isinstance(module, Conv1D):  # GPT-2's linear map, which stores (in, out)
        return module.weight.shape[0 if end == "input" else 1]
    return stream


def device_at(model: nn.Module, path: str) -> torch.device:
    """Return the device of a module's parameters or, if it has none, of an enclosing module's."""
    while (parameter := next(model.get_submodule(path).parameters(), None)) is None:
        path = path.rpartition(".")[0]
    return parameter.device
