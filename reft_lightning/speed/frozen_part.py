r"""The parts of a training pass that no intervention can change, computed without gradient.

Two parts are constant while the interventions of a frozen model are trained:

=================  ========================================================================================
the prefix         In a causal model, no column left of a row's first edited token depends on Phi, at any
                   layer. Its keys and values are a cache, and gradients pass only through the other columns.
                   This pays for suffix positions (``l7``, ``l1``); with ``f7+l7`` the prefix is empty.
the lower blocks   No block below the lowest edited site depends on Phi. The output of the last of them is
                   the input of everything that is trained.
=================  ========================================================================================

Both end at trained weights of the base (heads). Either part can be kept across epochs
(:class:`~.row_store.RowStore`). Losses and gradients equal those of the plain pass up to rounding.

Shapes: b rows, s columns, c frozen columns, n tokens of a row, d width, k the last frozen block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..adapters.reft.model import ReftModel
from ..adapters.reft.sites import block_path
from ..base_models.caches import CACHE, holds_columns
from ..base_models.patching import replaced
from .agreement import tolerance
from .row_store import RowStore

PADDING = 6  # columns of padding in the test
SHORTEST = 8  # with fewer frozen columns, a second pass costs more than it saves

Batch = Mapping[str, Any]


class FrozenPrefix:
    """Keys and values of the columns left of the first edited one.

    Args:
        model: an adapted causal model, all on one device.
        prompts: number of prompt tokens of each training row, (n,).
        suffixes: number of them from the first edited one on, (n,); see :func:`suffix_lengths`.

    Attributes:
        can_be_kept: whether the cache holds every column, unlike a sliding-window cache.
        bytes: the size of all rows' keys and values.

    Raises:
        ValueError: if the model's cache holds more than keys and values.
    """

    name = "the keys and values of prefixes"

    def __init__(self, model: ReftModel, prompts: Tensor, suffixes: Tensor) -> None:
        self.model = model
        self._suffixes, self._lengths = suffixes.tolist(), (prompts - suffixes).tolist()
        self._store: RowStore | None = None
        cache = self._compute(*_two_tokens(model), 2)
        if not isinstance(cache, DynamicCache) or not all(isinstance(c, DynamicLayer) for c in cache.layers):
            raise ValueError(
                f"the cache of {type(model.base_model).__name__} holds more than keys and values"
            )
        self.can_be_kept = holds_columns(cache, 2)
        self._shapes = [tuple(t.shape[1::2]) for t in _tensors(cache)]  # (heads, dimension)
        self._dtype = _tensors(cache)[0].dtype
        self._width = sum(heads * dimension for heads, dimension in self._shapes)
        self.bytes = sum(self._lengths) * self._width * self._dtype.itemsize

    def keep(self) -> None:
        """Compute each row's keys and values only once."""
        self._store = RowStore()

    def columns(self, rows: Sequence[int], boundary: int | None) -> int:
        """Return c, the number of columns of a batch to leave out; 0 if that is not worth it."""
        columns = (boundary or 0) - max(self._suffixes[row] for row in rows)
        return columns if columns >= SHORTEST else 0

    def __call__(self, inputs: Batch, rows: Sequence[int], boundary: int | None) -> Any:
        """Return the model's output, with the logits and labels of the last columns only."""
        columns = self.columns(rows, boundary)
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        if self._store is None:
            cache = self._compute(ids, attention, columns)
        else:
            cache = self._read(self._store, ids, attention, rows, columns, boundary or 0)
        return self.model(**{**inputs, "input_ids": ids[:, columns:], CACHE: cache})

    def _compute(self, ids: Tensor, attention: Tensor, columns: int) -> Any:
        with torch.no_grad(), self.model.unedited():
            output = self.model(
                input_ids=ids[:, :columns],
                attention_mask=attention[:, :columns],
                use_cache=True,
                logits_to_keep=1,
            )
        return output.get(CACHE)

    def _read(
        self,
        store: RowStore,
        ids: Tensor,
        attention: Tensor,
        rows: Sequence[int],
        columns: int,
        boundary: int,
    ) -> DynamicCache:
        """Return the cache of the first columns, from the kept values of each row."""
        ends = [boundary - self._suffixes[row] for row in rows]  # rows are padded on the left
        starts = [end - self._lengths[row] for end, row in zip(ends, rows, strict=True)]

        def compute(places: list[int]) -> list[Tensor]:
            cache = self._compute(ids[places], attention[places], max(ends[i] for i in places))
            flat = torch.cat([t.transpose(1, 2).flatten(2) for t in _tensors(cache)], -1)  # (b, c, width)
            return [row[starts[i] : ends[i]] for i, row in zip(places, flat, strict=True)]

        device = self.model.base_model.device
        flat = _buffer((len(rows), columns, self._width), self._dtype, device)
        for row, start, kept in zip(flat, starts, store.read(rows, compute), strict=True):
            row[start:] = kept[: max(columns - start, 0)]
        parts = flat.to(device, non_blocking=True).split([heads * dim for heads, dim in self._shapes], -1)
        states = [
            p.unflatten(-1, shape).transpose(1, 2) for p, shape in zip(parts, self._shapes, strict=True)
        ]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(states[::2], states[1::2], strict=True)):
            cache.update(keys, values, layer)
        return cache


class FrozenBlocks:
    """The output of block k for every token, computed once and kept; nothing up to block k is trained.

    Args:
        model: an adapted base model whose blocks take and return the hidden states.
        last: k.
        lengths: number of tokens of each training row, (n,).
        prompts: number of them in the prompt, which ends at the batch's boundary; None if texts start in column 0.

    Attributes:
        bytes: the size of all rows' hidden states.

    Raises:
        ValueError: if a block returns more than the hidden states, or its hidden states depend on the padding of a
            batch, which differs between epochs (ConvBERT, YOSO).
    """

    def __init__(self, model: ReftModel, last: int, lengths: Tensor, prompts: Tensor | None = None) -> None:
        self.model, self.last = model, last
        self._lengths = lengths.tolist()
        self._prompts = None if prompts is None else prompts.tolist()
        self.name = f"the output of block {last}"
        self._store = RowStore()
        self._blocks = blocks_of(model)
        # the rest of the tuple that a block returns; None if it returns only the hidden states
        self._others: tuple[None, ...] | None = None
        ids, attention = _two_tokens(model)
        hidden = self._compute({"input_ids": ids, "attention_mask": attention})
        self._width, self._dtype = hidden.shape[-1], hidden.dtype
        self.bytes = sum(self._lengths) * self._width * self._dtype.itemsize
        self._check_padding(ids, attention, hidden)

    def _check_padding(self, ids: Tensor, attention: Tensor, alone: Tensor) -> None:
        sides = (0, PADDING) if self._prompts is None else (PADDING, 0)
        padded = self._compute({"input_ids": F.pad(ids, sides), "attention_mask": F.pad(attention, sides)})
        padded = padded[:, : ids.shape[1]] if self._prompts is None else padded[:, PADDING:]
        if not (padded - alone).abs().max() <= tolerance(self.model) * alone.abs().max():
            raise ValueError("its hidden states depend on the padding of a batch")

    def columns(self, rows: Sequence[int], boundary: int | None) -> int:
        """Return the number of columns for which the lower blocks are left out: that of the longest row."""
        return max(self._lengths[row] for row in rows)

    def __call__(self, inputs: Batch, rows: Sequence[int], boundary: int | None) -> Any:
        """Return the model's output."""
        places = [self._columns_of(row, boundary) for row in rows]

        def compute(missing: list[int]) -> list[Tensor]:
            some = {name: v[missing] if isinstance(v, Tensor) else v for name, v in inputs.items()}
            return [row[places[i]] for i, row in zip(missing, self._compute(some), strict=True)]

        attention = inputs["attention_mask"]
        hidden = _buffer((*attention.shape, self._width), self._dtype, attention.device)
        for row, place, kept in zip(hidden, places, self._store.read(rows, compute), strict=True):
            row[place] = kept
        hidden = hidden.to(attention.device, non_blocking=True)
        below = [(block, "forward", self._pass_on) for block in self._blocks[: self.last]]
        with replaced(
            [*below, (self._blocks[self.last], "forward", lambda *_, **__: self._returned(hidden))]
        ):
            return self.model(**inputs)

    def _columns_of(self, row: int, boundary: int | None) -> slice:
        start = 0 if self._prompts is None else (boundary or 0) - self._prompts[row]
        return slice(start, start + self._lengths[row])

    def _compute(self, inputs: Batch) -> Tensor:  # -> (b, s, d)
        block, found = self._blocks[self.last], []
        run = block.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            hidden, *others = output if isinstance(output, tuple) else (output,)
            if any(other is not None for other in others):
                raise ValueError(f"{type(block).__name__} returns more than hidden states")
            self._others = tuple(others) if isinstance(output, tuple) else None
            found.append(hidden)
            return output

        plain = {name: value for name, value in inputs.items() if name != "labels"}
        if "logits_to_keep" in plain:
            plain["logits_to_keep"] = 1
        above = [(later, "forward", self._pass_on) for later in self._blocks[self.last + 1 :]]
        with torch.no_grad(), self.model.unedited(), replaced([*above, (block, "forward", recorded)]):
            self.model(**plain)
        return found[0]

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        return self._returned(args[0] if args else kwargs["hidden_states"])

    def _returned(self, hidden: Tensor) -> Any:
        return hidden if self._others is None else (hidden, *self._others)


def _tensors(cache: Any) -> list[Tensor]:
    """Return the keys and values of each layer in turn, (b, heads, c, dimension)."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros in CPU memory, pinned if the device is a GPU so that copying does not block."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _two_tokens(model: ReftModel) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[0, 1]], device=model.base_model.device)
    return ids, torch.ones_like(ids)


# --- what is frozen -------------------------------------------------------------------------------------------------


def blocks_of(model: ReftModel) -> list[nn.Module]:
    """Return the base model's blocks."""
    blocks = model.base_model.get_submodule(block_path(model.base_model))
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


def last_frozen_block(model: ReftModel) -> int:
    """Return k, the last block with no site and no trained weight in it or below it; -1 if there is none."""
    path = block_path(model.base_model)
    ends = (_last_block_below(site.path, site.end, path) for site in model.sites.values())
    return min([last_untrained_block(model), *ends])


def last_untrained_block(model: ReftModel) -> int:
    """Return the last block whose output depends on no trained weight of the base; -1 if there is none.

    Weights outside the backbone (``lm_head``, ``classifier``), and its pooler, are above all blocks, unless they are
    tied to the embeddings. Any other weight counts as below the blocks.
    """
    base, path = model.base_model, block_path(model.base_model)
    last = len(blocks_of(model)) - 1
    backbone = base.base_model_prefix if hasattr(base, base.base_model_prefix) else None
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


def _last_block_below(site: str, end: str, blocks: str) -> int:
    if not site.startswith(f"{blocks}."):
        return -1
    number, _, inside = site.removeprefix(f"{blocks}.").partition(".")
    return int(number) if end == "output" and not inside else int(number) - 1


def suffix_lengths(model: ReftModel, prompts: Tensor, targets: Tensor) -> Tensor:  # (n,), (n,) -> (n,)
    """Return the number of prompt tokens of each row from its first edited one on, at least 1.

    It is 1 if only target tokens are edited: the column before the target predicts its first token.
    """
    suffixes = torch.ones_like(prompts)
    for start in range(0, len(prompts), 1024):
        rows = slice(start, start + 1024)
        n, width = prompts[rows, None], int((prompts[rows] + targets[rows]).max())
        columns = torch.arange(width)
        prompt, target = columns < n, (columns >= n) & (columns < n + targets[rows, None])
        chosen = torch.zeros_like(prompt)
        for positions, _ in set(model.positions.values()):
            chosen |= torch.stack(positions.select(prompt, target)).ge(0).any(0)
        first = torch.where(chosen.any(-1), chosen.int().argmax(-1), width)
        suffixes[rows] = (n.squeeze(-1) - first).clamp(min=1)
    return suffixes
