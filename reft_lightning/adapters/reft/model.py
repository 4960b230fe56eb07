r"""A frozen language model with interventions: a set of triples (Phi, P, l).

The triples belong to one :class:`~.adapter.Adapter`, named ``default``, or to several: applied in sequence, as a
weighted sum, or a different one for each row of a batch.

There is one hook per site, registered once and bound to the :class:`ReftModel`. Once per call, R is computed for all
interventions in use, and a pre-hook on the base model finds the selected tokens (P, :mod:`.edit_plan`); at the sites,
:mod:`.editing` edits them. Outside ``forward`` and ``generate`` of the ReftModel, and inside ``disabled()``, the hooks
do nothing. Calls can be nested, and can run in several threads (:mod:`.calls`). ``disabled()`` takes effect in all
threads at once; ``nulled()``, ``scale`` and ``set_adapter`` affect calls that begin later, including the blocks that
gradient checkpointing recomputes for them.

Shapes: b rows, s columns, d width, n selected tokens.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ...base_models.caches import CACHE, RENAMED, cache_in, columns_in
from ...base_models.checkpointing import checkpointable
from ...base_models.heads import heads_to_train, parameters_of
from ...base_models.loading import number_of_parameters
from ...base_models.patching import replaced
from ...base_models.reading import continues_texts
from ...base_models.stacks import DECODER, stacks_of
from ...base_models.vision import image_tokens
from ...interventions import INTERVENTIONS, Intervention, rotations
from ...storage.reading import naming
from ...suggest import did_you_mean
from ..adapted import ParameterCount
from ..arguments import forward_inputs, known_arguments, left_padded_inputs
from ..attaching import all_or_nothing, attaching, check_base, detached, shown, unseen_draws
from ..first_values import FirstValues, fill
from ..masks import Spans, asked_again, check_one_text, marked, spans_of, spans_of_labels
from ..plain import plain
from ..saving import check_fit, load_adapter, load_beside, save_adapter, tensors_of, warn_of_half
from .adapter import Adapter
from .adapter_set import DEFAULT, AdapterSet, partitions_of
from .base_of import load_base_of
from .calls import Call, Choice, call_of, running
from .config import ReftConfig, check_architecture, config_of
from .edit_plan import plan_of
from .editing import edit_images, edit_tokens
from .first_passes import sources_of, with_critical
from .positions import MaskFunction, Positions
from .sites import Site, hook_at

log = logging.getLogger(__name__)
CACHES = (CACHE, *RENAMED, "state", "mems")  # base models' names for their caches
DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # of speculative decoding
INSTEAD = {  # names in PEFT and pyreft -> names here
    "add_weighted_adapter": "set_adapter({name: weight, ...})",
    "get_base_model": "base_model",
    "merge_and_unload": "reft_lightning.merge(reft), if the weights can hold the edits",
    "model": "base_model",
    "save": "save_pretrained(folder)",
    "set_device": "to(device)",
    "unload": "detach()",
}
IDLE_PASSES = 8  # passes without training and without an edit before a warning

_REPLACING = threading.RLock()  # held while attributes of a base model, which all threads share, are replaced


class ReftModel(nn.Module):
    """A frozen base model and its interventions. Built by :func:`attach` or :meth:`from_pretrained`.

    Args:
        base_model: a Hugging Face model; its parameters are frozen in place, except those of ``heads``.
        config: what to attach; see :func:`attach`.

    Raises:
        ValueError: if a method, layer, component, position or setting does not exist.
    """

    def __init__(self, base_model: PreTrainedModel, config: ReftConfig) -> None:
        check_base(base_model)
        super().__init__()
        self.base_model: Any = base_model
        self._noted = config  # noted on the base model; the first adapter may be deleted
        self._enabled, self._nulled = True, False
        self._asked_again = False  # whether the warning about labels with gaps was given
        self._idle: int | None = 0  # passes without edits; None after an edit or a warning
        self._compiled: Callable[..., Any] | None = None  # the base model's forward
        self.penalty_weight = 1.0  # weight of the interventions' penalties in the loss
        stacks = {name: base_model.get_submodule(path) for name, path in stacks_of(base_model).items()}
        self._arguments = {name: list(inspect.signature(s.forward).parameters) for name, s in stacks.items()}
        self._known = known_arguments(base_model)
        self._checkpointable = checkpointable(base_model.modules())
        self._image_tokens = image_tokens(base_model.config)
        self.adapters: Any = AdapterSet()
        adapter = Adapter.build(base_model, config)
        heads_to_train(base_model, config.heads)
        with attaching(base_model, config, alone=bool(config.heads)):
            heads = parameters_of(base_model, config.heads)
            for parameter in heads.values():
                parameter.requires_grad_(True)
            self._first_heads = FirstValues(heads)
            self._hooks = {
                name: stack.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True)
                for name, stack in stacks.items()
            }
            self._insert({DEFAULT: adapter})

    @classmethod
    def joining(cls, models: Mapping[str, ReftModel]) -> ReftModel:
        """Return a model that shares the adapters of several models on one base; ``adapter_names`` chooses."""
        first = next(iter(models.values()))
        reft = cls(first.base_model, first.config)
        reft._insert({name: model.adapters.first for name, model in models.items()})
        reft.delete_adapter(DEFAULT)
        return reft

    @property
    def config(self) -> ReftConfig:
        """The configuration of the first adapter, as in all properties that do not name an adapter."""
        return self.adapters.first.config

    @property
    def interventions(self) -> Any:  # a ModuleDict
        """Layer -> the Phi of its positions."""
        return self.adapters.first.interventions

    @property
    def sites(self) -> dict[str, Site]:
        """Layer -> the site of its Phi."""
        return self.adapters.first.sites

    @property
    def positions(self) -> dict[str, tuple[Positions, str]]:
        """Layer -> P, and how its Phi are tied."""
        return self.adapters.first.positions

    @property
    def device(self) -> torch.device:
        """The device for the base model's inputs."""
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model's weights."""
        return self.base_model.dtype

    @property
    def scale(self) -> float:
        """The strength of every edit, in calls that begin after it is set.

        Setting it changes all adapters; ``adapters[name].scale`` is the strength of one.
        """
        return self.adapters.first.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        for adapter in self.adapters.values():
            adapter.scale = scale

    def detach(self) -> PreTrainedModel:
        """Remove everything from the base model and return it.

        No hook is left, trained heads get their first values back, and parameters require gradients as before. Save the
        adapter first: this model cannot be used afterwards.
        """
        self._check_attached()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        fill(self._head_parameters(), self._first_heads.values)
        detached(self.base_model, self._noted)
        return self.base_model

    def _check_attached(self) -> None:
        if not self._hooks:
            raise ValueError("this adapter was detached from its base model; attach it again to use it")

    # --- several adapters ----------------------------------------------------------------------------------------

    @property
    def adapter_names(self) -> list[str]:
        """The adapters on the base model, in the order they were added."""
        return list(self.adapters)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that edit, in order."""
        return [choice.adapter for choice in self.adapters.active]

    def add_adapter(self, adapter_name: str, method: Any = "loreft", **settings: Any) -> None:
        """Attach another adapter, which edits only once :meth:`set_adapter` or ``adapter_names`` name it.

        Args:
            adapter_name: its name, of letters, digits, ``-`` and ``_``.
            method: see :func:`attach`.
            **settings: see :func:`attach`.

        Raises:
            ValueError: if :func:`attach` would raise, the name is taken, or there are trained heads.
        """
        self._check_attached()
        config = config_of(self.base_model, method, **{"heads": False, **settings})
        self.adapters.check_new({adapter_name: config})
        self._insert({adapter_name: Adapter.build(self.base_model, config)})

    def load_adapter(
        self,
        name: str | PathLike,
        adapter_name: str,
        *,
        positions: str | MaskFunction | None = None,
        strict: bool = True,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Add a saved adapter, or load its tensors into an existing one that was attached in the same way.

        The latter only changes values; hooks and compiled code stay. ``adapter_name`` is the adapter's name here; the
        other arguments are those of :meth:`from_pretrained`.

        Raises:
            ValueError: if :meth:`from_pretrained` would raise, the adapter of that name was attached differently, or
                the saved one was trained together with a peft method, which would change the base model for all.
        """
        self._check_attached()
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        config, state = load_adapter(name, positions, revision=revision, subfolder=subfolder, **hub)
        if strict:
            check_architecture(self.base_model, config.architecture)
        if config.beside:
            raise ValueError(
                f"{name} was trained together with {config.beside}, which changes the base model for every adapter: "
                "load it onto a base model of its own with ReftModel.from_pretrained"
            )
        if adapter_name in self.adapters:
            self._swap(adapter_name, config, state)
            return
        self.adapters.check_new({adapter_name: config, **dict.fromkeys(config.partitions)})
        with unseen_draws():
            adapter = Adapter.build(self.base_model, config)
        _put(tensors_of(self._parts(adapter)), state, f" {adapter_name}")
        self._insert({adapter_name: adapter} | partitions_of(adapter))

    def _swap(self, name: str, config: ReftConfig, state: dict[str, Tensor]) -> None:
        adapter = self.adapters[name]
        if differing := self.saved_config(name).differing(config):
            raise ValueError(
                f"there is already an adapter {name!r}, attached differently ({'; '.join(differing)}): give the new "
                "one another name, or delete_adapter() the old one first"
            )
        _put(tensors_of(self._parts(adapter)), state, f" {name}")
        adapter.scale = config.scale

    def add_partition(self, adapter_name: str, rows: Sequence[int], *, of: str = DEFAULT) -> None:
        r"""Add an adapter that shares the parameters of another and edits only along some rows K of its directions U.

        .. math:: \Phi_K(h) = h + U_K^\top c(h)_K \quad \text{for} \quad \Phi(h) = h + U^\top c(h)

        Partitions can be trained on different tasks (``adapter_names`` assigns the rows of a batch to them) and used
        separately or together. They are saved with the adapter that they are part of.

        Args:
            adapter_name: name of the partition.
            rows: K, numbers in 0..r-1.
            of: the adapter that it is part of.

        Raises:
            ValueError: if the adapter is unknown, its edit is not such a sum, or it does not have the rows.
        """
        self._check_attached()
        self.adapters.check_known([of])
        self.adapters.check_new({adapter_name: None})
        owner, rows = self.adapters[of], plain("rows", rows)
        part = owner.partition(rows)
        owner.partitions[adapter_name] = rows
        self._insert({adapter_name: part})

    def set_adapter(self, adapters: str | Sequence[str] | Mapping[str, float] | None) -> None:
        """Choose which adapters edit, in calls without ``adapter_names``.

        Args:
            adapters: a name; several names, each adapter editing the output of the one before; a dict from names to
                weights, for the weighted sum of their edits of the same hidden state (weights can be negative); or None
                for no adapter.

        Raises:
            ValueError: if a name is unknown or given twice, or a weight is not a finite number.
        """
        self._check_attached()
        self.adapters.choose(adapters)

    def disable_adapter(self, adapter_name: str) -> None:
        """Stop an adapter from editing until :meth:`set_adapter` names it again.

        Raises:
            ValueError: if the name is unknown.
        """
        self._check_attached()
        self.adapters.leave_out(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the base model, with the hooks that only it needs.

        Raises:
            ValueError: if the name is unknown, it is the last adapter, or it still has partitions.
        """
        self._check_attached()
        self.adapters.remove(adapter_name)
        places = {site.place for adapter in self.adapters.values() for site in adapter.sites.values()}
        for place in self._hooks.keys() - places - self._arguments.keys():
            self._hooks.pop(place).remove()
        self._forget_graphs()

    def _insert(self, adapters: Mapping[str, Adapter]) -> None:
        for name, adapter in adapters.items():
            for site in adapter.sites.values():
                if site.place not in self._hooks:
                    edit = partial(self._edit_images if site.visual else self._edit, site.place)
                    module = self.base_model.get_submodule(site.path)
                    self._hooks[site.place] = hook_at(module, site.end, edit, first=site.visual)
            self.adapters[name] = adapter.train(self.training)
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        if self._compiled is not None:
            torch.compiler.reset()  # compiled code contains the hooks of its first pass

    # --- forward and generate ------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, s)
        labels: Tensor | None = None,  # (b, s), only its last columns, or (b,)
        prompt_mask: Tensor | None = None,  # (b, s) bool
        adapter_names: Sequence[Any] | None = None,  # b of them
        row_values: Mapping[str, Tensor] | None = None,  # name -> (b, ...)
        edit_mask: Tensor | None = None,  # (b, s) bool
        image_mask: Tensor | None = None,  # (b, s) bool
        source_ids: Tensor | None = None,  # (b, s'), texts with their own padding
        source_mask: Tensor | None = None,  # (b, s')
        **kwargs: Any,
    ) -> Any:
        """Run the base model with the edits and return its output (``loss``, ``logits``, ...).

        ``prompt_mask`` marks the prompt. Without it, the prompt is everything before the first label of a row; without
        token labels, and for taggers and masked language models, every real token. Rows can be padded on either side.
        With labels for only the last columns, and ``logits_to_keep`` for as many, only those logits are computed.

        ``adapter_names`` gives each row its own adapter: a name, a pair of a name and a strength, or None (or
        ``"__base__"``) for the base model. Without it, the adapters of :meth:`set_adapter` edit all rows.
        ``row_values`` are for interventions that need a value for each row, such as the number of a concept.
        ``edit_mask`` marks tokens for the positions ``given``. ``image_mask`` marks image tokens; without it, those
        with the id ``image_token_id`` of the configuration (``inputs_embeds`` and cached columns have no ids).
        ``source_ids`` are the prompts from which interchange interventions take hidden states, as computed by the
        unedited base model.

        In training, ``loss`` includes ``penalty``, the weighted sum of the interventions' penalties. If an intervention
        reads whole prompts (:mod:`reft_lightning.interventions.rows`), no cache is returned, as it would lack what
        it found in the prompts.

        In a model with an encoder and a decoder, the encoder's input, or the part that ``prompt_mask`` covers, is the
        prompt. The decoder's own prompt is its input up to the first label or, without labels, its first token;
        ``decode`` selects the tokens after it.

        Raises:
            ValueError: if the base model does not know an argument (suggesting the closest), an adapter is unknown, or
                a row holds several texts.
        """
        inputs = forward_inputs(self.base_model, self._known, input_ids, attention_mask, labels, kwargs)
        tokens = inputs["input_ids"] if input_ids is not None else inputs["inputs_embeds"]
        cached = [name for name in CACHES if kwargs.get(name) is not None]
        if cached and prompt_mask is None and not self._reads_two:
            raise ValueError(
                f"with {cached[0]}, pass prompt_mask (b, cached + new columns) to mark the prompt"
            )
        attention = attention_mask
        if self._enabled:
            check_one_text(attention, len(tokens), kwargs)
        if attention is None:
            columns = (tokens if prompt_mask is None else prompt_mask).shape[1]
            attention = tokens.new_ones((tokens.shape[0], columns), dtype=torch.long)
        written = labels if labels is not None and continues_texts(self.base_model) else None
        decoder = None
        if self._reads_two and written is not None:  # labels are the decoder's tokens
            decoder, written = spans_of_labels(written, kwargs.get("decoder_attention_mask")), None
        spans = spans_of(attention, written, prompt_mask)
        chosen = self.adapters.chosen_by(adapter_names, len(tokens))
        if prompt_mask is None and written is not None:
            self.check_prompts(spans, written, chosen[0])
        spans = self._with_marks(
            spans, chosen[0], input_ids, kwargs.get("inputs_embeds"), edit_mask, image_mask
        )
        source = source_ids, source_mask
        with self._editing(spans, chosen, row_values, source, decoder, compiled=True) as call:
            output = self.base_model(**inputs)
        return output if call is None else self._with_findings(output, call)

    def _with_findings(self, output: Any, call: Call) -> Any:
        """Add the interventions' penalties, which most lack, and drop a cache that would be incomplete."""
        used = self.adapters.used_by(call.choices)
        seeing = any(adapter.seeing_rows or adapter.critical for adapter in used)
        penalties: list[Tensor] = []
        if self.training and torch.is_grad_enabled():
            own = (phi.penalty() for adapter in used for phi in adapter.penalized)
            penalties = [penalty for penalty in (*own, *call.penalties) if penalty is not None]
        if (seeing or penalties) and not isinstance(output, ModelOutput):
            raise ValueError("return_dict=False has no place for the interventions' outputs: leave it out")
        if seeing and output.get(CACHE) is not None:
            output[CACHE] = None
        if penalties:
            loss = output.get("loss")
            device = penalties[0].device if loss is None else loss.device
            output["penalty"] = self.penalty_weight * torch.stack([p.to(device) for p in penalties]).sum()
            if loss is not None:
                output["loss"] = loss + output["penalty"]
        return output

    def compile(self, **options: Any) -> None:
        """Compile the training step: the base model's forward pass with its edits, and its backward pass.

        The selected tokens depend on the data and are found beforehand, uncompiled; the rest is a single graph, even
        with ``fullgraph=True``. ``generate``, ``disabled()``, passes without gradients and copies of this model are
        not compiled. Hugging Face's ``gradient_checkpointing_enable`` hooks the embeddings, which breaks the graph:
        call ``base_model.disable_input_require_grads()`` after it, and set ``base_model.config.use_cache`` to False.

        Args:
            **options: options of ``torch.compile``.

        Raises:
            ValueError: if an intervention reads whole rows, or the model has an encoder and a decoder.
        """
        if self._reads_two:
            raise ValueError(
                f"{type(self.base_model).__name__} has an encoder and a decoder, and their edited tokens are found "
                "between the two, in the middle of the graph: leave out compile()"
            )
        for name, adapter in self.adapters.items():
            if adapter.seeing_rows:
                raise ValueError(
                    f"the adapter {name!r} cannot be compiled: {adapter.seeing_rows} keeps values of the prompts from "
                    "one pass to the next; leave out model.compile"
                )
        self._compiled = torch.compile(self.base_model.forward, **options)

    def generate(
        self,
        input_ids: Tensor | None = None,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, s)
        prompt_mask: Tensor | None = None,  # (b, s) bool
        adapter_names: Sequence[Any] | None = None,  # b of them
        row_values: Mapping[str, Tensor] | None = None,  # name -> (b, ...)
        edit_mask: Tensor | None = None,  # (b, s) bool
        image_mask: Tensor | None = None,  # (b, s) bool
        source_ids: Tensor | None = None,  # (b, s'), texts with their own padding
        source_mask: Tensor | None = None,  # (b, s')
        **kwargs: Any,
    ) -> Any:
        """Generate as Hugging Face does, with the edits on the prompt (and on new tokens, if P selects them).

        Right-padded rows are first moved to left padding, with every other tensor of rows and columns, so new tokens
        always start at column s. ``inputs`` and ``inputs_embeds`` can be given as in Hugging Face. Without
        ``attention_mask``, the pad token counts as padding, unless it is also the end-of-text token. If rows contain
        the beginning of an answer after their prompt, ``prompt_mask`` separates them: the answer is edited as if it had
        been generated. ``adapter_names``, ``row_values``, ``edit_mask``, ``image_mask`` and ``source_ids`` are as in
        :meth:`forward`.

        In a model with an encoder and a decoder, the encoder's rows keep their padding, and the decoder's prompt is
        the input it starts with: one token, or ``decoder_input_ids``.

        Raises:
            ValueError: if ``guidance_scale`` is given (it reads a second text), tokens are missing or given twice, a
                mask has the wrong shape, or speculative decoding meets edits of a decoder that has an encoder.
        """
        defaults = kwargs.get("generation_config") or self.base_model.generation_config
        if self._enabled and kwargs.get("guidance_scale", defaults.guidance_scale) not in (None, 1):
            raise ValueError(
                "guidance_scale reads a second text in addition to the prompt, and positions are undefined there; pass "
                "a logits processor that calls this model on that text"
            )
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "prompt_mask": prompt_mask,
            "edit_mask": edit_mask,
            "image_mask": image_mask,
            **kwargs,
        }
        arguments = left_padded_inputs(given, self.base_model)
        spans = spans_of(arguments["attention_mask"], None, arguments.pop("prompt_mask", None))
        masks = arguments.pop("edit_mask", None), arguments.pop("image_mask", None)
        # as in Hugging Face, which cuts off the columns read
        read = 0 if self._reads_two else columns_in(cache_in(kwargs)) or 0
        if self._enabled:
            check_one_text(arguments["attention_mask"], len(spans.prompt), arguments)
        chosen = self.adapters.chosen_by(adapter_names, len(spans.prompt))
        drafts = [name for name in DRAFTS if kwargs.get(name) or getattr(defaults, name, None)]
        sites = (site for adapter in self.adapters.used_by(chosen[0]) for site in adapter.sites.values())
        if self._enabled and drafts and any(site.stack == DECODER for site in sites):
            raise ValueError(
                f"{drafts[0]} puts a draft right after the decoder's first token, so edits of the decoder cannot tell "
                "where its prompt ends: leave it out"
            )
        texts = arguments.get("input_ids"), arguments.get("inputs_embeds")
        spans = self._with_marks(spans, chosen[0], *texts, *masks)
        spans = replace(spans, generating=True, read=read)
        with self._editing(spans, chosen, row_values, (source_ids, source_mask)):
            return self.base_model.generate(**arguments)

    def _with_marks(
        self,
        spans: Spans,
        choices: Sequence[Choice],
        ids: Tensor | None,
        embeds: Tensor | None,
        edit: Tensor | None,
        image: Tensor | None,
    ) -> Spans:
        """Return the spans with marks on tokens: from the caller, for images, and from a first pass."""
        if image is None and embeds is None and ids is not None and ids.shape == spans.prompt.shape:
            image = self._images_in(ids)
        spans = marked(spans, edit=edit, image=image)
        critical = {count for adapter in self.adapters.used_by(choices) for count in adapter.critical}
        if not critical or not self._enabled:
            return spans
        return with_critical(self.base_model, self._known, spans, critical, ids, embeds)

    def _images_in(self, input_ids: Tensor) -> Tensor | None:  # (b, s) -> (b, s)
        """Return a mask of image tokens; None if the model reads no images."""
        if not self._image_tokens:
            return None
        if input_ids.is_meta:  # no values, so no images
            return torch.zeros(input_ids.shape, dtype=torch.bool)
        return torch.isin(input_ids, torch.tensor(self._image_tokens, device=input_ids.device))

    def check_prompts(self, spans: Spans, labels: Tensor, choices: Sequence[Choice]) -> None:
        """Reject rows without a prompt if a chosen adapter's positions need one, and warn about several prompts."""
        used = self._positions_of(choices)
        needy = [str(spec) for spec in used if spec.needs_prompt]
        empty = (spans.target.any(-1) & ~spans.prompt.any(-1)).nonzero().flatten().tolist() if needy else []
        if empty:
            raise ValueError(
                f"rows {empty} have a label on their first token, so no prompt for the positions {needy[0]!r}: set the "
                "labels of the prompt to -100, or pass prompt_mask"
            )
        apart = [str(spec) for spec in used if str(spec) not in ("all", "given")]
        if apart and not self._asked_again and asked_again(spans, labels):
            self._asked_again = True
            log.warning(
                "the labels of a row have gaps, as if it had several answers: for the positions %s its prompt ends at "
                "the first label, so later questions count as answer in training, but as prompt in generation. Give "
                "each answer its own row, or pass prompt_mask",
                apart[0],
            )

    def _positions_of(self, choices: Sequence[Choice]) -> list[Positions]:
        used = self.adapters.used_by(choices)
        return [positions for adapter in used for positions, _ in adapter.layers_by_positions]

    @contextmanager
    def _editing(
        self,
        spans: Spans,
        chosen: tuple[tuple[Choice, ...], bool],
        row_values: Mapping[str, Tensor] | None,
        source: tuple[Tensor | None, Tensor | None],
        decoder: Spans | None = None,
        compiled: bool = False,
    ) -> Iterator[Call | None]:
        """Make the base model's passes inside the block edit; None if edits are disabled."""
        self._check_attached()
        values = {name: torch.as_tensor(value) for name, value in (row_values or {}).items()}
        for name, value in values.items():
            if len(value) != len(spans.prompt):
                raise ValueError(
                    f"row_values[{name!r}] has {len(value)} rows, but the batch has {len(spans.prompt)}"
                )
        (choices, summed), used = chosen, self.adapters.used_by(chosen[0])
        call = None
        if self._enabled:  # fixed for the whole call: the adapters, their strength, R
            with torch.set_grad_enabled(torch.is_grad_enabled() and not spans.generating):
                rows = rotations(phi for adapter in used for phi in adapter.orthonormal)
            strong = tuple(c._replace(weight=c.weight * self.adapters[c.adapter].scale) for c in choices)
            call = Call(
                self, self.adapters, spans, strong, summed, self._nulled, rows, given=values, decoder=decoder
            )
            if source[0] is not None:
                images = self._images_in(source[0])
                call.sources = sources_of(self.base_model, self._known, call, source[0], source[1], images)
        others = self._replacements(used, compiled) if torch.is_grad_enabled() else []
        with _REPLACING if others else nullcontext(), replaced(others), running(call):
            yield call
        if call is not None and not call.begun:
            raise ValueError(
                "the base model ran without the hooks of this ReftModel, so nothing was edited: shallow copies "
                "(copy.copy, nn.DataParallel, which Trainer uses if one process sees several GPUs) have no hooks of "
                "their own. Use copy.deepcopy, or one process per GPU (torchrun, accelerate launch)"
            )
        if call is not None:
            self._notice(call)

    def _replacements(self, used: Sequence[Adapter], compiled: bool) -> list[tuple[nn.Module, str, Callable]]:
        """Return what replaces functions of the base model in a pass with gradients, as (module, name, function)."""
        name = "_gradient_checkpointing_func"
        found: list[tuple[nn.Module, str, Callable]] = [
            (module, name, partial(self._checkpoint, getattr(module, name)))
            for module in self._checkpointable
            if module.gradient_checkpointing
        ]
        seeing = any(adapter.seeing_rows for adapter in used)
        if compiled and self._compiled is not None and self._enabled and not seeing:
            found.append((self.base_model, "forward", self._compiled))
        return found

    def _notice(self, call: Call) -> None:
        """Warn once if nothing is edited in a whole generation, a training step, or the first passes."""
        if self._idle is None or call.edited:
            self._idle = None
        elif positions := self._positions_of(call.choices):
            self._idle += 1
            training = self.training and torch.is_grad_enabled()
            if call.spans.generating or training or self._idle >= IDLE_PASSES:
                log.warning(
                    "the positions %s select no token in %s, so nothing is edited: tokens after the prompt are known "
                    "only with labels or prompt_mask, or in generate()",
                    ", ".join(sorted(set(map(str, positions)))),
                    "this generation" if call.spans.generating else f"{self._idle} passes",
                )
                self._idle = None

    def _checkpoint(self, checkpoint: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint a block: hooks that run again in the backward pass use the plan and the R of this call."""
        if torch.compiler.is_compiling():  # the graph contains the recomputation
            return checkpoint(function, *args, **kwargs)
        call = call_of(self)
        # with the plan of this pass, and the values kept from its prompts so far
        again = call and call.again()

        def planned(*inputs: Any, **options: Any) -> Any:
            if call_of(self) is call:  # the forward pass
                return function(*inputs, **options)
            with running(again and again.again()):
                return function(*inputs, **options)

        return checkpoint(planned, *args, **kwargs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run exactly the base model inside the block, with the heads it had before training."""
        if not self._enabled:
            yield
            return
        with self.unedited(), self._first_heads.restored(self._head_parameters()):
            yield

    def unedited(self) -> AbstractContextManager[None]:
        """Edit nothing inside the block; trained heads stay as they are."""
        return replaced([(self, "_enabled", False)])

    @contextmanager
    def nulled(self) -> Iterator[None]:
        """Remove from hidden states the components the edits would add, in calls that begin inside the block.

        Each intervention defines this as ``null``.

        Raises:
            ValueError: if an intervention of an active adapter cannot be nulled; the message lists those that can.
        """
        for phi in (phi for name in self.active_adapters for phi in self.adapters[name].modules()):
            if isinstance(phi, Intervention) and not phi.defines("null"):
                able = [name for name, cls in INTERVENTIONS.items() if cls.defines("null")]
                raise ValueError(
                    f"{type(phi).__name__} has no null(h), so it cannot be nulled; {', '.join(able)} can"
                )
        with replaced([(self, "_nulled", True)]):
            yield

    # --- the hooks ------------------------------------------------------------------------------------------------

    @property
    def _reads_two(self) -> bool:
        return len(self._arguments) > 1

    def _begin(self, stack: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Plan a pass of the base model or of one of its stacks: the columns it reads, and the selected tokens."""
        call = call_of(self)
        if call is None:
            return
        call.plan, call.begun = None, True
        if not self._enabled:
            return
        given = {**dict(zip(self._arguments[stack], args, strict=False)), **kwargs}
        call.plan = plan_of(call, stack, given, reads_images=bool(self._image_tokens))
        if call.plan is not None:
            call.edited |= call.plan.edits_anything

    def _edit(self, place: str, hidden: Tensor) -> Tensor | None:  # (b, s, d) -> (b, s, d)
        """Return the hidden states at a site with their edits; None if the call makes none there."""
        call = call_of(self)
        if call is None or call.plan is None or place not in call.plan.edits:
            return None
        return edit_tokens(call, call.plan, place, hidden)

    def _edit_images(self, place: str, hidden: Tensor) -> Tensor | None:  # (images, n, d) or (n, d)
        """Do the same for images: in a generation, before the base model's first pass."""
        call = call_of(self)
        return None if call is None or not self._enabled else edit_images(call, place, hidden)

    def __getattr__(self, name: str) -> Any:
        """For an unknown attribute, add to the error the equivalent of another library's name, or where it is."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            base, hint = vars(self).get("_modules", {}).get("base_model"), ""
            if name in INSTEAD:
                hint = f"; here it is {INSTEAD[name]}"
            elif not name.startswith("_") and (hasattr(type(base), name) or name in vars(base or self)):
                hint = (
                    f"; its base_model has it: reft.base_model.{name}. For code that expects a transformers model, use "
                    "integrations.transformers.as_pretrained(reft)"
                )
            raise AttributeError(f"{error}{hint}", name=name, obj=self) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # compiled code cannot be pickled or copied

    # --- parameters and files -------------------------------------------------------------------------------------

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every trained tensor once: interventions, heads under ``heads.``, other adapters under ``adapters.``.

        A shared tensor, such as the embeddings with a tied output head, appears under its first name.
        """
        self._check_attached()
        others = {f"adapters.{name}": self.adapters[name] for name in self.adapter_names[1:]}
        return tensors_of(self._parts(self.adapters.first) | others)

    def _parts(self, adapter: Adapter) -> dict[str, nn.Module]:
        """Return the modules that the file of an adapter stores."""
        heads = {f"heads.{head}": self.base_model.get_submodule(head) for head in adapter.config.heads}
        return {"interventions": adapter.interventions, **heads}

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`adapter_state_dict` returned, into the same parameters.

        Raises:
            ValueError: if a tensor is missing or unexpected, or has the wrong shape.
        """
        _put(self.adapter_state_dict(), state)

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by role: ``rotation`` (R), ``weight``, ``bias`` and ``head``."""
        roles: dict[str, list[nn.Parameter]] = {"rotation": [], "weight": [], "bias": [], "head": []}
        whole = self.adapters.whole.values()
        for phi in (phi for adapter in whole for group in adapter.interventions.values() for phi in group):
            for name, parameter in phi.named_parameters():
                role = "rotation" if name in phi.rotations else "bias" if parameter.ndim < 2 else "weight"
                roles[role].append(parameter)
        roles["head"] = list(self._head_parameters().values())
        return roles

    def _head_parameters(self) -> dict[str, nn.Parameter]:
        return parameters_of(self.base_model, self.config.heads)

    def parameter_count(self) -> ParameterCount:
        """Count the interventions' parameters and the base model's; neither includes heads, as in the paper."""
        trainable = sum(p.numel() for p in self.adapters.parameters())
        heads = sum(p.numel() for p in self._head_parameters().values())
        base = number_of_parameters(self.base_model) - heads
        return ParameterCount.of(trainable, base)

    def print_trainable_parameters(self) -> None:
        """Print the count in PEFT's format."""
        trainable, base, percent = self.parameter_count()
        print(f"trainable params: {trainable:,} || base params: {base:,} || trainable%: {percent:.4f}")

    def save_pretrained(self, folder: str | PathLike, selected_adapters: Sequence[str] | None = None) -> None:
        """Write ``reft_config.json``, ``reft.safetensors`` and a model card into a folder.

        Args:
            folder: folder of the first adapter; every other adapter gets a subfolder with its name.
            selected_adapters: names of the adapters to write; None for all. Partitions are written with their adapter.

        Raises:
            ValueError: if a name is unknown.
        """
        self._check_attached()
        whole = self.adapters.whole
        names = list(whole) if selected_adapters is None else list(selected_adapters)
        self.adapters.check_known(names)
        if parts := [name for name in names if name not in whole]:
            raise ValueError(f"{', '.join(parts)} are parts of other adapters, which are saved with them")
        base = self.parameter_count().base
        for name in names:
            adapter, first = self.adapters[name], name == self.adapter_names[0]
            trained = sum(p.numel() for p in adapter.parameters())
            save_adapter(
                Path(folder, "" if first else name),
                self.saved_config(name),
                tensors_of(self._parts(adapter)),
                ParameterCount.of(trained, base),
            )

    def saved_config(self, adapter_name: str | None = None) -> ReftConfig:
        """Return an adapter's configuration, with its current scale and partitions."""
        adapter = self.adapters.first if adapter_name is None else self.adapters[adapter_name]
        return replace(adapter.config, scale=adapter.scale, partitions=dict(adapter.partitions))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> None:
        """Save the adapter and upload it to the Hugging Face hub; needs a login.

        Args:
            repo_id: ``OWNER/NAME``; created if it does not exist.
            private: whether a new repository is private; None for the owner's default.
            token: an access token; None for that of the login.
            revision: a branch, created if it does not exist; None for ``main``.
            commit_message: the commit's message; None for the hub's default.
            create_pr: whether to open a pull request with the files instead.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, exist_ok=True, private=private)
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel | str | PathLike,
        name: str | PathLike | None = None,
        *,
        positions: str | MaskFunction | None = None,
        strict: bool = True,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
        **loading: Any,
    ) -> ReftModel:
        """Attach a saved adapter in evaluation mode: dropout stays off until ``train()`` is called.

        If it was trained together with a peft method, that adapter is loaded too, unless the base model already has a
        peft adapter: the interventions are then attached to the model with that adapter.

        Args:
            base_model: the model it was trained on; or the adapter's name, to load that model too.
            name: a folder, or the name of a repository on the Hugging Face hub.
            positions: the callable, if the adapter was trained with one; or positions that replace those it was trained
                with, in all layers without their own.
            strict: whether the model must have the architecture, number of layers and width of the one that the
                adapter was trained on; otherwise only its tensors must fit.
            revision: a branch, tag or commit of the adapter's repository.
            subfolder: a subfolder of its folder or repository.
            token: an access token for private repositories, including the base model's.
            cache_dir: cache for downloads, including the base model; None for the hub's default.
            local_files_only: whether to use only files in that cache, without accessing the hub.
            **loading: arguments of the base model's own ``from_pretrained`` (``dtype``, ``device_map``), if it is
                loaded here.

        Raises:
            ValueError: if the adapter does not fit the model, is incomplete, or has a newer format.
            FileNotFoundError: if it, or the base model that it names, cannot be found, saying what was tried.
        """
        named = isinstance(base_model, str | PathLike)  # names the adapter, and through it the base model
        if named == (name is not None):
            raise ValueError(
                "give from_pretrained(base_model, name), or from_pretrained(name), which loads the base model too; got "
                f"{shown(base_model)} and {name!r}"
            )
        if loading and not named:
            own = [key for key in inspect.signature(cls.from_pretrained).parameters if key != "loading"]
            raise ValueError(
                f"from_pretrained(base_model, name) takes no {', '.join(loading)}: the base model is already loaded; "
                f"from_pretrained(name) takes arguments for loading it{did_you_mean(next(iter(loading)), own)}"
            )
        source: Any = base_model if named else name
        if not named:
            check_base(base_model)
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        place: dict[str, Any] = {"revision": revision, "subfolder": subfolder, **hub}
        config, state = load_adapter(source, positions, **place)
        settings: dict[str, Any] | None = None  # of the peft method
        if not named and hasattr(base_model, "peft_config"):
            if config.beside:
                log.warning(
                    "the base model already has a peft adapter, so the one trained together with these interventions "
                    "is not loaded"
                )
        elif config.beside:
            settings, tensors = load_beside(source, **place)
            state |= tensors
        else:
            warn_of_half(source, subfolder)
        model: Any = load_base_of(config, **hub, **loading) if named else base_model
        with naming(source), all_or_nothing(model), unseen_draws():
            if strict:
                check_architecture(model, config.architecture)
            if settings is None:
                reft = cls(model, config)
            else:
                from ..baselines.joint import join  # which imports this class

                reft = join(model, config, settings)
            reft.load_adapter_state_dict(state)
            if config.partitions:
                reft.adapters.check_new(dict.fromkeys(config.partitions))
            reft._insert(partitions_of(reft.adapters.first))
        return reft.eval()


def _put(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str = "") -> None:
    """Copy the tensors of a file into existing ones, if they fit."""
    check_fit(own, state, what)
    fill(own, state)
