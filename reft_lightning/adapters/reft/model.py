r"""A frozen language model with interventions: a set of triples (Phi, P, l).

One hook per site, registered once and bound to the :class:`ReftModel`. Once a call, R is computed for all interventions
and a pre-hook on the base model works out which tokens are selected (P). Outside ``forward`` and ``generate`` of the
ReftModel, and inside ``disabled()``, the hooks do nothing. Calls may be nested, and run in several threads
(:mod:`.calls`); ``disabled()`` and ``scale`` count for all threads.

Shapes: b rows, s columns, d width, n selected tokens.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...base_models.checkpointing import checkpointable
from ...base_models.heads import heads_to_train, parameters_of
from ...base_models.patching import replaced
from ...interventions import check_settings, registered, rotations
from ...suggest import did_you_mean
from ..adapted import ParameterCount
from ..arguments import forward_inputs, known_arguments, left_padded_inputs
from ..attaching import all_or_nothing, attaching, check_base, detached
from ..first_values import FirstValues, fill
from ..masks import Spans, spans_of
from ..saving import check_fit, load_adapter, save_adapter
from .calls import Call, call_of, running
from .config import LayerSpec, ReftConfig, check_architecture
from .edit_plan import EditPlan, token_indices
from .positions import MaskFunction, Positions, parse_positions
from .site_shapes import check_shapes
from .sites import Site, device_at, find_sites, hidden_of, with_hidden

log = logging.getLogger(__name__)
TIED = ("all", "group", "position")
CACHES = ("past_key_values", "cache_params", "state", "mems")  # what base models call what they have read
IDLE_PASSES = 8  # without training, after which a warning says that no pass has edited anything

_REPLACING = threading.RLock()  # held while attributes of a base model are replaced, which all threads see


class ReftModel(nn.Module):
    """A frozen base model and its interventions. Built by :func:`attach` or :meth:`from_pretrained`.

    Args:
        base_model: a Hugging Face model; its parameters are frozen in place, except those of ``heads``.
        config: what to attach, see :func:`attach`.

    Raises:
        ValueError: for a method, layer, component, position or setting that does not exist.
    """

    def __init__(self, base_model: PreTrainedModel, config: ReftConfig) -> None:
        check_base(base_model)
        super().__init__()
        self.base_model: Any = base_model
        self.config = config
        self.scale = config.scale
        self._enabled = True
        self._edited, self._warned = False, False  # whether anything was edited, and that nothing was, said
        self._idle = 0  # passes that edited nothing
        self._compiled: Callable[..., Any] | None = None  # the base model's forward
        if base_model.config.is_encoder_decoder and base_model.get_encoder() is not base_model:
            raise ValueError(
                f"{type(base_model).__name__} has an encoder and a decoder, whose tokens differ; attach to one of "
                "them, such as model.get_encoder()"
            )
        accepted = inspect.signature(base_model.forward).parameters
        self._arguments, self._known = list(accepted), known_arguments(base_model)
        modules = dict(base_model.named_modules())
        self._checkpointable = checkpointable(modules.values())
        self.sites: dict[str, Site] = {}
        self.positions: dict[str, tuple[Positions, str]] = {}
        self.interventions: Any = nn.ModuleDict()
        specs = {layer: config.for_layer(layer) for layer in config.layers}
        sites = find_sites(base_model, {layer: spec.component for layer, spec in specs.items()}, modules)
        check_shapes(base_model, sites.values())
        for layer, spec in specs.items():
            self._add(str(layer), sites[layer], spec, device_at(modules, sites[layer].path))
        self._selected_by: dict[tuple[Positions, str], list[str]] = {}
        for key, selection in self.positions.items():
            self._selected_by.setdefault(selection, []).append(key)
        heads_to_train(base_model, config.heads)
        with attaching(base_model, config, alone=bool(config.heads)):
            for parameter in self._head_parameters().values():
                parameter.requires_grad_(True)
            self._first_heads = FirstValues(self._head_parameters())
            self._hooks = [base_model.register_forward_pre_hook(self._begin, with_kwargs=True)]
            for key, site in self.sites.items():
                module = base_model.get_submodule(site.path)
                if site.end == "output":
                    hook = module.register_forward_hook(partial(self._after, key))
                else:
                    hook = module.register_forward_pre_hook(partial(self._before, key), with_kwargs=True)
                self._hooks.append(hook)

    def _add(self, key: str, site: Site, spec: LayerSpec, device: torch.device) -> None:
        positions = parse_positions(spec.positions, spec.clip)
        if spec.tied not in TIED:
            raise ValueError(
                f"tied must be one of {', '.join(TIED)}; got {spec.tied!r}{did_you_mean(str(spec.tied), TIED)}"
            )
        copies = {"all": 1, "group": positions.groups}.get(spec.tied) or sum(positions.slots())
        cls = registered(spec.method)
        check_settings(cls, spec.settings)
        self.sites[key], self.positions[key] = site, (positions, spec.tied)
        group = nn.ModuleList(cls(site.dim, **spec.settings) for _ in range(copies))
        self.interventions[key] = group if device == torch.get_default_device() else group.to(device)

    def detach(self) -> PreTrainedModel:
        """Take everything off the base model again and return it.

        No hook is left, trained heads have their first values, and what learned before learns again. Save the adapter
        first: this model cannot be used any more.
        """
        self._check_attached()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        fill(self._head_parameters(), self._first_heads.values)
        detached(self.base_model, self.config)
        return self.base_model

    def _check_attached(self) -> None:
        if not self._hooks:
            raise ValueError("this adapter was detached from its base model; attach it again to use it")

    # --- forward and generate ------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, s)
        labels: Tensor | None = None,  # (b, s), the last columns of it, or (b,)
        prompt_mask: Tensor | None = None,  # (b, s) bool
        **kwargs: Any,
    ) -> Any:
        """Run the base model with the edits; returns what the base model returns (``loss``, ``logits``, ...).

        The prompt is ``prompt_mask``; without it, what precedes the first label of a row; without token
        labels, every real token. Padding may stand on either side. Labels of only the last columns, with
        ``logits_to_keep`` of as many, compute only those logits.

        Raises:
            ValueError: for an argument that the base model does not know, with the nearest.
        """
        inputs = forward_inputs(self.base_model, self._known, input_ids, attention_mask, labels, kwargs)
        tokens = inputs["input_ids"] if input_ids is not None else inputs["inputs_embeds"]
        cached = [name for name in CACHES if kwargs.get(name) is not None]
        if cached and prompt_mask is None:
            raise ValueError(
                f"with {cached[0]}, pass prompt_mask (b, cached + new columns): which part is prompt?"
            )
        attention = attention_mask
        if attention is None:
            columns = (tokens if prompt_mask is None else prompt_mask).shape[1]
            attention = tokens.new_ones((tokens.shape[0], columns), dtype=torch.long)
        spans = spans_of(attention, labels, prompt_mask)
        if prompt_mask is None and labels is not None:
            self._check_prompts(spans)
        with self._editing(spans, compiled=True):
            return self.base_model(**inputs)

    def compile(self, **options: Any) -> None:
        """Compile the training step: the forward pass of the base model with its edits, and its backward pass.

        Which tokens are selected depends on the data and is worked out before, uncompiled; the rest is one graph, also
        with ``fullgraph=True``. ``generate``, ``disabled()``, passes without gradients and copies of this model are
        not compiled. Hugging Face's ``gradient_checkpointing_enable`` hooks the embeddings, which breaks the graph:
        call ``base_model.disable_input_require_grads()`` after it, and set ``base_model.config.use_cache`` to False.

        Args:
            **options: of ``torch.compile``.
        """
        self._compiled = torch.compile(self.base_model.forward, **options)

    def generate(
        self,
        input_ids: Tensor | None = None,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, s)
        prompt_mask: Tensor | None = None,  # (b, s) bool
        **kwargs: Any,
    ) -> Any:
        """Generate as Hugging Face does, with the edits on the prompt (and on new tokens where P says so).

        Rows padded on the right are moved to the left first, with every other tensor of rows and columns, so new tokens
        always start at column s. ``inputs`` and ``inputs_embeds`` may be given as in Hugging Face's. Without
        ``attention_mask``, padding is the pad token, unless it is the end-of-text token too. ``prompt_mask`` goes
        with rows that hold the beginning of an answer after their prompt: it is edited as if it had been generated.

        Raises:
            ValueError: for ``guidance_scale``, which reads a second text, for tokens that are missing or given twice,
                or for a mask of another shape.
        """
        defaults = kwargs.get("generation_config") or self.base_model.generation_config
        if self._enabled and kwargs.get("guidance_scale", defaults.guidance_scale) not in (None, 1):
            raise ValueError(
                "guidance_scale reads a second text next to the prompt, in which positions have no meaning; pass a "
                "logits processor that calls this model on that text"
            )
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "prompt_mask": prompt_mask,
            **kwargs,
        }
        arguments = left_padded_inputs(given, self.base_model.generation_config)
        spans = spans_of(arguments["attention_mask"], None, arguments.pop("prompt_mask", None))
        past = kwargs.get("past_key_values")
        read = 0 if past is None else past.get_seq_length()  # as Hugging Face asks it, to cut what was read
        with self._editing(replace(spans, generating=True, read=read)):
            return self.base_model.generate(**arguments)

    def _check_prompts(self, spans: Spans) -> None:
        needy = [str(spec) for spec, _ in self.positions.values() if spec.needs_prompt]
        empty = (spans.target.any(-1) & ~spans.prompt.any(-1)).nonzero().flatten().tolist()
        if needy and empty:
            raise ValueError(
                f"rows {empty} have a label on their first token, so no prompt for the positions {needy[0]!r}: set the "
                "labels of the prompt to -100, or pass prompt_mask"
            )

    @contextmanager
    def _editing(self, spans: Spans, compiled: bool = False) -> Iterator[None]:
        self._check_attached()
        others: list[tuple[nn.Module, str, Callable]] = []
        if torch.is_grad_enabled():
            name = "_gradient_checkpointing_func"
            others = [
                (module, name, partial(self._checkpoint, getattr(module, name)))
                for module in self._checkpointable
                if module.gradient_checkpointing
            ]
            if compiled and self._compiled is not None and self._enabled:
                others.append((self.base_model, "forward", self._compiled))
        call = None
        if self._enabled:  # R is computed once a pass and once a generation, which needs no gradients
            with torch.set_grad_enabled(torch.is_grad_enabled() and not spans.generating):
                rows = rotations(phi for group in self.interventions.values() for phi in group)
                call = Call(self, spans, rows)
        with _REPLACING if others else nullcontext(), replaced(others), running(call):
            yield
        if call is not None:
            self._notice(call)

    def _notice(self, call: Call) -> None:
        """Warn once if nothing is edited: in a whole generation, in a step of training, in the first passes."""
        self._edited = self._edited or call.edited
        if self._edited or self._warned or not self.sites:
            return
        self._idle += 1
        training = self.training and torch.is_grad_enabled()
        if call.spans.generating or training or self._idle >= IDLE_PASSES:
            self._warned = True
            chosen = ", ".join(sorted({str(positions) for positions, _ in self.positions.values()}))
            log.warning(
                "the positions %s select no token in %s, so nothing is edited: tokens after the prompt are only known "
                "with labels or prompt_mask, or in generate()",
                chosen,
                "this generation" if call.spans.generating else f"{self._idle} passes",
            )

    def _checkpoint(self, checkpoint: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint a block: hooks that run again in the backward pass find the plan and the R of this call."""
        if torch.compiler.is_compiling():  # the graph holds what is run again
            return checkpoint(function, *args, **kwargs)
        call = call_of(self)
        again = call and replace(call)  # with the plan of this pass

        def planned(*inputs: Any, **options: Any) -> Any:
            if call_of(self) is call:  # the forward pass
                return function(*inputs, **options)
            with running(again):
                return function(*inputs, **options)

        return checkpoint(planned, *args, **kwargs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run exactly the base model inside the block, its heads as they were before training too."""
        if not self._enabled:
            yield
            return
        with self.unedited(), self._first_heads.restored(self._head_parameters()):
            yield

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Edit nothing inside the block; trained heads stay as they are."""
        enabled, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = enabled

    # --- the hooks ------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Plan a call of the base model: which columns it reads, which of their tokens are selected."""
        call = call_of(self)
        if call is None:
            return
        call.plan = None
        if not self._enabled:
            return
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given["inputs_embeds"]
        call.plan = self._plan_for(call.spans, tokens, given.get("attention_mask"))
        if call.plan is not None:
            call.edited |= any(index.numel() for indices in call.plan.edits.values() for index in indices)

    def _plan_for(self, spans: Spans, tokens: Tensor, attention: Any) -> EditPlan | None:
        columns = spans.next_columns(tokens.shape[1], attention)
        decoding = columns.start >= spans.width
        active = [item for item in self._selected_by.items() if item[0][0].reaches_decode or not decoding]
        if not active:
            return None
        prompt, target = spans.upto(columns.stop, tokens.shape[0])
        edits = {}
        for selection, keys in active:
            edits |= dict.fromkeys(keys, token_indices(*selection, prompt, target, columns))
        return EditPlan(edits, tokens, torch.is_grad_enabled())

    def _plan_at(self, key: str) -> EditPlan | None:
        call = call_of(self)
        return call.plan if call is not None and call.plan is not None and key in call.plan.edits else None

    def _after(self, key: str, module: nn.Module, args: tuple, output: Any) -> Any:
        plan = self._plan_at(key)
        if plan is None:
            return None
        return with_hidden(output, self._edit(key, plan, hidden_of(output)))

    def _before(self, key: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        plan = self._plan_at(key)
        if plan is None:
            return None
        if args:
            return (self._edit(key, plan, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._edit(key, plan, kwargs["hidden_states"])}

    def _edit(self, key: str, plan: EditPlan, hidden: Tensor) -> Tensor:  # (b, s, d) -> (b, s, d)
        site = self.sites[key]
        if hidden.shape[-1] != site.dim:
            raise ValueError(
                f"the {site.end} of {site.path} has width {hidden.shape[-1]}, expected {site.dim}; use the input "
                "of the linear layer that consumes it, as '...{layer}....input'"
            )
        rows, columns = plan.tokens.shape[:2]
        if hidden.shape[:-1].numel() != rows * columns:  # OPT's last map sees them in one dimension
            raise ValueError(
                f"the {site.end} of {site.path} has the shape {tuple(hidden.shape)}, but the model reads "
                f"{rows} rows of {columns} tokens: positions mean nothing there"
            )
        if plan.differentiable and not torch.is_grad_enabled():
            raise ValueError(
                f"no gradient reaches {site.path}: gradient checkpointing with use_reentrant=True cannot train "
                "interventions inside a block; switch it on with use_reentrant=False"
            )
        flat = hidden.reshape(-1, hidden.shape[-1])
        indices = [index.to(hidden.device) for index in plan.edits[key]]
        edited = [
            phi(flat.index_select(0, index), self.scale)
            for phi, index in zip(self.interventions[key], indices, strict=True)
        ]
        if len(edited) > 1:
            indices, edited = [torch.cat(indices)], [torch.cat(edited)]
        return flat.index_copy(0, indices[0], edited[0]).view_as(hidden)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # compiled code neither pickles nor copies

    # --- parameters and files -------------------------------------------------------------------------------------

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every trained tensor once: the interventions, and the heads under ``heads.``.

        A tensor that is shared, as the embeddings with a tied output head, has the name that comes first.
        """
        self._check_attached()
        parts = {"interventions": self.interventions}
        parts |= {f"heads.{head}": self.base_model.get_submodule(head) for head in self.config.heads}
        state: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        for part, module in parts.items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                if names.setdefault(id(tensor), f"{part}.{name}") == f"{part}.{name}":
                    state[f"{part}.{name}"] = tensor.detach()
        return state

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`adapter_state_dict` returned, into the same parameters.

        Raises:
            ValueError: if a tensor is missing, unexpected, or of another shape.
        """
        own = self.adapter_state_dict()
        check_fit(own, state)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by role: ``rotation`` (R), ``weight``, ``bias`` and ``head``."""
        roles: dict[str, list[nn.Parameter]] = {"rotation": [], "weight": [], "bias": [], "head": []}
        for group in self.interventions.values():
            for phi in group:
                for name, parameter in phi.named_parameters():
                    role = "rotation" if name in phi.rotations else "bias" if parameter.ndim < 2 else "weight"
                    roles[role].append(parameter)
        roles["head"] = list(self._head_parameters().values())
        return roles

    def _head_parameters(self) -> dict[str, nn.Parameter]:
        return parameters_of(self.base_model, self.config.heads)

    def parameter_count(self) -> ParameterCount:
        """Count the interventions' parameters against the base model's; heads are in neither, as in the paper."""
        trainable = sum(p.numel() for p in self.interventions.parameters())
        heads = sum(p.numel() for p in self.parameter_roles()["head"])
        base = sum(p.numel() for p in self.base_model.parameters()) - heads
        return ParameterCount.of(trainable, base)

    def print_trainable_parameters(self) -> None:
        """Print the count in PEFT's words."""
        trainable, base, percent = self.parameter_count()
        print(f"trainable params: {trainable:,} || base params: {base:,} || trainable%: {percent:.4f}")

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write ``reft_config.json``, ``reft.safetensors`` and a model card into a folder."""
        save_adapter(folder, self.saved_config(), self.adapter_state_dict(), self.parameter_count())

    def saved_config(self) -> ReftConfig:
        """Return what is attached, with the scale of now."""
        return replace(self.config, scale=self.scale)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Save the adapter and upload it to the Hugging Face hub; needs a login."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        api.create_repo(repo_id, exist_ok=True, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel,
        name: str | PathLike,
        *,
        positions: MaskFunction | None = None,
        strict: bool = True,
    ) -> ReftModel:
        """Attach a saved adapter.

        Args:
            base_model: the model it was trained on.
            name: a folder, or the name of a repository on the Hugging Face hub.
            positions: the callable, where the adapter was trained with one.
            strict: whether the model must have the architecture, number of layers and width of the one that the
                adapter was trained on; otherwise its tensors must fit, no more.

        Raises:
            ValueError: if the adapter does not fit the model, is incomplete, or is of a newer format.
        """
        check_base(base_model)
        config, state = load_adapter(name, positions)
        if strict:
            check_architecture(base_model, config.architecture)
        with all_or_nothing(base_model):
            reft = cls(base_model, config)
            reft.load_adapter_state_dict(state)
        return reft
