"""Trained virtual tokens before every row: prompt tuning (embeddings) and prefix tuning (keys and values).

Two hooks on the transformer inside a base model put the tokens before the first columns it reads, and not before later
ones: training, evaluation and every kind of generation take the same path, and rows can be padded on the left.
(peft's own wrapper drops the positions of left-padded rows under prompt tuning.) Virtual tokens have positions
0..v-1 and the text's first token has position v, whatever padding is in between.

A decoder's outputs contain only the text's columns, so labels, ``logits_to_keep`` and a classifier's last token mean
the same as without virtual tokens. An encoder's outputs keep the virtual tokens, and a classifier reads the first of
them, as under peft.

A sliding window counts columns, including padding between virtual tokens and text: in models that have one (Mistral),
the outputs of rows longer than the window depend on the padding.

Shapes: b rows, s columns, v virtual tokens, d width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from ...base_models.caches import CACHE, cache_in, columns_in
from ...base_models.decoders import is_decoder


class VirtualTokens:
    """Put the virtual tokens of a peft model before the tokens that its base model reads.

    Args:
        peft_model: a peft model with a prompt learning method.

    Attributes:
        enabled: whether virtual tokens are inserted.
        calls: the number of calls of the transformer with them.
    """

    def __init__(self, peft_model: Any) -> None:
        self.peft_model = peft_model
        settings = peft_model.active_peft_config
        self.count: int = settings.num_virtual_tokens
        self.prefix = settings.peft_type.value == "PREFIX_TUNING"
        self.enabled = True
        base = peft_model.get_base_model()
        self.decoder = is_decoder(base.config)
        # a language model may call its decoder directly, bypassing the model around it (OPT)
        model: Any = base
        self.inner = model.get_decoder() if isinstance(base, GenerationMixin) else model.base_model
        self._names = list(inspect.signature(self.inner.forward).parameters)
        # for the current call: the columns before the text's, and whether its cache only passes in the prefix
        self._in_front, self._passing = 0, False
        self.calls = 0
        self._hooks = [
            self.inner.register_forward_pre_hook(self._before, with_kwargs=True),
            self.inner.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks from the base model."""
        for hook in self._hooks:
            hook.remove()

    def _before(
        self, module: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        self._in_front, self._passing = 0, False
        if not self.enabled:
            return None
        self.calls += 1
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = kwargs.get("input_ids")
        rows = len(tokens if tokens is not None else kwargs["inputs_embeds"])
        past = cache_in(kwargs)
        first = not columns_in(past)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"virtual tokens need an attention mask of rows and columns; got {shape} (if that comes from a "
                    "static cache, generate with a dynamic one)"
                )
            kwargs["attention_mask"] = F.pad(mask, (self.count, 0), value=1)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + self.count
        if first and self.prefix:
            self._passing = past is None and kwargs.get("use_cache") is False
            kwargs[CACHE] = self._keys_and_values(rows, past)
        elif first:
            self._embeddings(rows, kwargs)
            self._in_front = self.count
        return (), kwargs

    def _keys_and_values(self, rows: int, cache: Any) -> Any:
        """Return the cache, or a new one, with the prefix of every layer added."""
        cache = DynamicCache(config=self.inner.config) if cache is None else cache
        for index, layer in enumerate(self.peft_model.get_prompt(rows).layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    def _embeddings(self, rows: int, kwargs: dict[str, Any]) -> None:
        """Replace token ids with embeddings, those of the virtual tokens first."""
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None:
            embeddings = self.inner.get_input_embeddings()(kwargs["input_ids"])  # (b, s, d)
        prompt = self.peft_model.get_prompt(rows).to(embeddings.dtype)  # (b, v, d)
        kwargs["inputs_embeds"], kwargs["input_ids"] = torch.cat([prompt, embeddings], 1), None
        positions: Tensor | None = kwargs.get("position_ids")
        if positions is not None:
            own = torch.arange(self.count, device=positions.device).expand(len(positions), -1)
            kwargs["position_ids"] = torch.cat([own, positions], 1)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = F.pad(kwargs["token_type_ids"], (self.count, 0), value=0)

    def _after(self, module: Any, args: tuple, output: Any) -> Any:
        if self._in_front and self.decoder:
            output.last_hidden_state = output.last_hidden_state[:, self._in_front :]
        if self._passing:  # the caller wants no cache; generation would continue from this one
            output[CACHE] = None
        return output
