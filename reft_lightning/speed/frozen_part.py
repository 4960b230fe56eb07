r"""What of a training pass no intervention can change, computed without gradient and, if wished, only once.

Two things are constant while the interventions of a frozen model train:

==================  ======================================================================================
the prefix          In a causal model no column left of the first edited token of its row depends on Phi, at any
                    layer. Its keys and values are a cache; gradients pass through the other columns alone. That
                    is worth something for suffix positions (``l7``, ``l1``), nothing for ``f7+l7``.
the layer's input   No block below the lowest edited site depends on Phi. What the last of them says of a
                    row's tokens is the input of everything that trains.
==================  ======================================================================================

Weights of the base that train as well (heads) end what is constant where they stand.
:class:`~.row_store.KeptRows` keeps either over the epochs. Losses and gradients are those of the plain pass up
to rounding.

Shapes: b rows, s columns, c constant columns, n tokens of a row, d width, k the last constant block, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..adapters.reft.model import ReftModel
from ..adapters.reft.sites import block_path
from ..base_models.caches import holds_columns
from ..base_models.patching import replaced
from .row_store import KeptRows

SHORTEST = 8  # constant columns below which a second pass costs more than it saves

Batch = Mapping[str, Any]


class ConstantPrefix:
    """Keys and values of the columns left of the first edited one.

    Args:
        model: of a causal base model, all of it on one device.
        prompts: tokens of each train row's prompt, (n,).
        targets: tokens of its target, (n,).
        behind: of the prompt's, those from the first edited one on, (n,); see :func:`tokens_behind`.

    Attributes:
        lengths: constant tokens of each row, (n,).
        tokens: all tokens of each row, (n,).
        width: numbers a token: keys and values of all heads and layers.
        dtype: of the numbers.
        keepable: whether the cache holds every column; that of a sliding window does not.
        kept: where they are kept; None computes them in each pass.

    Raises:
        ValueError: if the model's cache holds anything but keys and values.
    """

    name = "the keys and values of prefixes"

    def __init__(self, model: ReftModel, prompts: Tensor, targets: Tensor, behind: Tensor) -> None:
        self.model, self.lengths, self.tokens = model, prompts - behind, prompts + targets
        self._behind = behind.tolist()
        self.kept: KeptRows | None = None
        cache = self._compute(*_two_tokens(model), 2)
        if not isinstance(cache, DynamicCache) or not all(isinstance(c, DynamicLayer) for c in cache.layers):
            raise ValueError(f"{type(model.base_model).__name__} has no cache of keys and values alone")
        self.keepable = holds_columns(cache, 2)
        self.shapes = [tuple(t.shape[1::2]) for layer in cache.layers for t in (layer.keys, layer.values)]
        self.dtype = cache.layers[0].keys.dtype
        self.width = sum(heads * dim for heads, dim in self.shapes)

    def columns(self, rows: list[int], boundary: int | None) -> int:
        """Return c, how many columns of a batch are left out; 0 where it is not worth it."""
        columns = (boundary or 0) - max(self._behind[row] for row in rows)
        return columns if columns >= SHORTEST else 0

    def __call__(self, inputs: Batch, rows: list[int], boundary: int | None) -> Any:
        """Return the model's output, with the logits and labels of the last columns alone."""
        columns = self.columns(rows, boundary)
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        if self.kept is None:
            cache = self._compute(ids, attention, columns)
        else:
            cache = self._assemble(
                self._rows(ids, attention, rows, boundary or 0), rows, columns, boundary or 0
            )
        return self.model(**{**inputs, "input_ids": ids[:, columns:]}, past_key_values=cache)

    def _compute(self, ids: Tensor, attention: Tensor, columns: int) -> DynamicCache:
        with torch.no_grad(), self.model.unedited():
            return self.model(
                input_ids=ids[:, :columns],
                attention_mask=attention[:, :columns],
                use_cache=True,
                logits_to_keep=1,
            ).past_key_values

    def _rows(self, ids: Tensor, attention: Tensor, rows: list[int], boundary: int) -> list[Tensor]:
        """Return (constant tokens, width) of each row, kept before or computed now, in memory."""
        found = _kept(self.kept, rows)
        missing = [i for i in range(len(rows)) if i not in found]
        if missing:
            most = boundary - min(self._behind[rows[i]] for i in missing)
            cache = self._compute(ids[missing], attention[missing], most)
            states = [t for layer in cache.layers for t in (layer.keys, layer.values)]  # (b, heads, c, dim)
            flat = torch.cat([t.transpose(1, 2).flatten(2) for t in states], -1).cpu()  # (b, c, width)
            for i, values in zip(missing, flat, strict=True):
                end = boundary - self._behind[rows[i]]  # rows are padded on the left
                found[i] = values[end - int(self.lengths[rows[i]]) : end]
                self.kept.write(rows[i], found[i])
        return [found[i] for i in range(len(rows))]

    def _assemble(self, states: list[Tensor], rows: list[int], columns: int, boundary: int) -> DynamicCache:
        device = self.model.base_model.device
        flat = _buffer((len(rows), columns, self.width), self.dtype, device)
        for i, row in enumerate(rows):
            first = boundary - self._behind[row] - len(states[i])
            flat[i, first:] = states[i][: max(columns - first, 0)]
        flat = flat.to(device, non_blocking=True)
        parts = flat.split([heads * dim for heads, dim in self.shapes], -1)
        states = [
            part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)
        ]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(states[::2], states[1::2], strict=True)):
            cache.update(keys, values, layer)
        return cache


class ConstantInput:
    """What block k says of each token, where nothing below its output trains.

    Args:
        model: any adapted base model whose blocks take and return the hidden states.
        last: k.
        lengths: tokens of each train row, (n,).
        prompts: of them, those of the prompt, which stands left of the batch's boundary; None for texts that start
            in column 0.

    Attributes:
        width: d.
        dtype: of the hidden states.
        kept: where they are kept; None computes them in each pass, which saves nothing.

    Raises:
        ValueError: if a block returns anything beside the hidden states.
    """

    keepable = True

    def __init__(self, model: ReftModel, last: int, lengths: Tensor, prompts: Tensor | None = None) -> None:
        self.model, self.last, self.lengths = model, last, lengths
        self._tokens = lengths.tolist()
        self._prompts = None if prompts is None else prompts.tolist()
        self.name = f"the output of block {last}"
        self.kept: KeptRows | None = None
        self.blocks = list(model.base_model.get_submodule(block_path(model.base_model)))
        self._beside: tuple[None, ...] | None = None  # what a block returns in a tuple with the hidden states
        ids, attention = _two_tokens(model)
        hidden = self._compute({"input_ids": ids, "attention_mask": attention})
        self.width, self.dtype = hidden.shape[-1], hidden.dtype

    def columns(self, rows: list[int], boundary: int | None) -> int:
        """Return how many columns of a batch blocks are left out for: those of all real tokens."""
        return max(self._tokens[row] for row in rows)

    def __call__(self, inputs: Batch, rows: list[int], boundary: int | None = None) -> Any:
        """Return the model's output."""
        places = [self._place(row, boundary) for row in rows]
        found = _kept(self.kept, rows)
        missing = [i for i in range(len(rows)) if i not in found]
        if missing:
            some = {name: v[missing] if isinstance(v, Tensor) else v for name, v in inputs.items()}
            for i, values in zip(missing, self._compute(some).cpu(), strict=True):
                found[i] = values[places[i]]
                if self.kept is not None:
                    self.kept.write(rows[i], found[i])
        device = inputs["attention_mask"].device
        hidden = _buffer((*inputs["attention_mask"].shape, self.width), self.dtype, device)
        for i, place in enumerate(places):
            hidden[i, place] = found[i]
        hidden = hidden.to(device, non_blocking=True)
        below = [(block, "forward", self._passed) for block in self.blocks[: self.last]]
        with replaced([*below, (self.blocks[self.last], "forward", lambda *_, **__: self._returned(hidden))]):
            return self.model(**inputs)

    def _place(self, row: int, boundary: int | None) -> slice:
        start = 0 if self._prompts is None else (boundary or 0) - self._prompts[row]
        return slice(start, start + self._tokens[row])

    def _compute(self, inputs: Batch) -> Tensor:  # -> (b, s, d)
        block, found = self.blocks[self.last], []
        run = block.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            hidden, *beside = output if isinstance(output, tuple) else (output,)
            if any(other is not None for other in beside):
                raise ValueError(f"{type(block).__name__} returns more than hidden states")
            self._beside = tuple(beside) if isinstance(output, tuple) else None
            found.append(hidden)
            return output

        plain = {name: value for name, value in inputs.items() if name != "labels"}
        if "logits_to_keep" in plain:
            plain["logits_to_keep"] = 1
        above = [(later, "forward", self._passed) for later in self.blocks[self.last + 1 :]]
        with torch.no_grad(), self.model.unedited(), replaced([*above, (block, "forward", recorded)]):
            self.model(**plain)
        return found[0]

    def _passed(self, *args: Any, **kwargs: Any) -> Any:
        return self._returned(args[0] if args else kwargs["hidden_states"])

    def _returned(self, hidden: Tensor) -> Any:
        return hidden if self._beside is None else (hidden, *self._beside)


def _kept(store: KeptRows | None, rows: Sequence[int]) -> dict[int, Tensor]:
    """Return place in the batch -> what is kept of the row there."""
    if store is None:
        return {}
    return {i: store.read(row) for i, row in enumerate(rows) if store.has(row)}


def _buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros in memory that a GPU can read while the CPU goes on."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _two_tokens(model: ReftModel) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[0, 1]], device=model.base_model.device)
    return ids, torch.ones_like(ids)


# --- what is constant -----------------------------------------------------------------------------------------------


def last_constant_block(model: ReftModel) -> int:
    """Return k, the last block with neither a site nor a trained weight in it or below it; -1 where there is none."""
    path = block_path(model.base_model)
    ends = (_constant_below(site.path, site.end, path) for site in model.sites.values())
    return min([last_untrained(model), *ends])


def last_untrained(model: ReftModel) -> int:
    """Return the last block whose output no trained weight of the base has a part in; -1 where there is none.

    Weights outside the backbone (``lm_head``, ``classifier``) and its pooler stand above all blocks, unless they are
    the embeddings, too. Any other weight counts as one below the blocks.
    """
    base, path = model.base_model, block_path(model.base_model)
    count = len(list(base.get_submodule(path)))
    backbone = base.base_model_prefix if hasattr(base, base.base_model_prefix) else None
    last = count - 1
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if name.startswith(f"{path}."):
            last = min(last, int(name.removeprefix(f"{path}.").partition(".")[0]) - 1)
        elif backbone is None or (
            name.startswith(f"{backbone}.") and not name.startswith(f"{backbone}.pooler.")
        ):
            last = -1
    return last


def _constant_below(site: str, end: str, blocks: str) -> int:
    if not site.startswith(f"{blocks}."):
        return -1
    number, _, inside = site.removeprefix(f"{blocks}.").partition(".")
    return int(number) if end == "output" and not inside else int(number) - 1


def tokens_behind(model: ReftModel, prompts: Tensor, targets: Tensor) -> Tensor:  # (n,), (n,) -> (n,)
    """Return how many prompt tokens of each row stand from its first edited token on, at least one.

    One, where only tokens behind the prompt are edited: the column before the target predicts its first token.
    """
    behind = torch.ones_like(prompts)
    for start in range(0, len(prompts), 1024):
        rows = slice(start, start + 1024)
        n, width = prompts[rows, None], int((prompts[rows] + targets[rows]).max())
        columns = torch.arange(width)
        prompt, target = columns < n, (columns >= n) & (columns < n + targets[rows, None])
        chosen = torch.zeros_like(prompt)
        for positions, _ in set(model.positions.values()):
            chosen |= torch.stack(positions.select(prompt, target)).ge(0).any(0)
        first = torch.where(chosen.any(-1), chosen.int().argmax(-1), width)
        behind[rows] = (n.squeeze(-1) - first).clamp(min=1)
    return behind
