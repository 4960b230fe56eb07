"""The methods of the peft library as adapted models.

peft creates the trained parameters and inserts them into the base model, which is then called directly, by the same
code as for ReFT. Adapters are saved in peft's own format, so peft can load them without this package.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from ...base_models.caches import cache_in, columns_in, states_in, window_of
from ...base_models.decoders import is_decoder
from ...base_models.stacks import reads_two_texts
from ..attaching import attaching, check_base, detached
from ..methods import METHODS, Method, peft_class
from .in_place import Baseline, BaselineConfig
from .virtual_tokens import VirtualTokens

log = logging.getLogger(__name__)
ADAPTER = "default"  # peft's name for the one adapter there is


class PeftBaseline(Baseline):
    """A base model with an adapter of the peft library. Heads are peft's ``modules_to_save``, which are trained copies.

    Args:
        base_model: a Hugging Face model, changed in place.
        method: ``peft/lora`` or another method of the library.
        heads: paths of modules to train in addition; counted separately.
        options: arguments of peft's configuration class.

    Raises:
        ValueError: if a method, option or head is unknown, or peft refuses something, such as unknown target modules.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        method: Method,
        heads: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_base(base_model)
        name = base_model.config.name_or_path or None
        config = BaselineConfig(method.name, dict(options or {}), list(heads), name)
        settings = peft_config(method, config.options)
        # peft matches every module whose path ends in a head's name
        if more := [n for n, _ in base_model.named_modules() if n.endswith(tuple(heads)) and n not in heads]:
            raise ValueError(
                f"{method.name} would train {', '.join(more)} besides the heads {', '.join(heads)}, as peft matches "
                "the ends of names; add them to intervention.heads"
            )
        if method.virtual_tokens and reads_two_texts(base_model):
            raise ValueError(
                f"{method.name} puts virtual tokens before one text, but {type(base_model).__name__} reads two; use "
                "peft/lora"
            )
        if method.needs_cache and not is_decoder(base_model.config):
            raise ValueError(
                f"{method.name} needs a key/value cache, which the encoder {type(base_model).__name__} does not have; "
                "use peft/prompt_tuning"
            )
        if method.virtual_tokens:
            _check_columns(base_model, method.name)
        with attaching(base_model, config, alone=True):
            super().__init__(config, base_model, ())
            settings.modules_to_save = list(heads) or None
            try:
                self.peft_model = _with_adapter(base_model, settings)
            except (TypeError, ArithmeticError) as error:  # from a value that peft uses without checking it
                raise ValueError(f"peft cannot use the options {config.options}: {error}") from error
            self._virtual = VirtualTokens(self.peft_model) if settings.is_prompt_learning else None

    @property
    def base_model(self) -> PreTrainedModel:
        """The Hugging Face model, with the adapter inserted."""
        return self.peft_model.get_base_model()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted model; see :meth:`Baseline.forward`."""
        if self._virtual is None or not self._enabled:
            return super().forward(*args, **kwargs)
        before = self._virtual.calls
        output = super().forward(*args, **kwargs)
        if self._virtual.calls == before:
            raise ValueError(
                f"{type(self.base_model).__name__} does not call its {type(self._virtual.inner).__name__}, before "
                f"which the virtual tokens would be inserted; {self.config.method} cannot be used with it"
            )
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapted model; see :meth:`Baseline.generate`."""
        if self._virtual is not None and self._enabled and columns_in(cache_in(kwargs)):
            raise ValueError(
                f"{self.config.method} puts {self._virtual.count} virtual tokens into the cache, and generate would "
                "leave out as many tokens of the text: leave out the cache"
            )
        return super().generate(*args, **kwargs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run exactly the base model inside the block, with the head it had before training."""
        if not self._enabled:
            yield
            return
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        parts = [
            m for m in self.peft_model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
        with super().disabled():
            self._switch(parts, False)
            try:
                yield
            finally:
                self._switch(parts, True)

    def detach(self) -> PreTrainedModel:
        """Remove peft's modules, including trained heads, and return the base model; save the adapter first."""
        from peft.utils.other import AuxiliaryTrainingWrapper

        base = self.base_model
        for module in list(base.modules()):
            for name, part in list(module.named_children()):
                if isinstance(part, AuxiliaryTrainingWrapper):
                    setattr(module, name, part.original_module)  # unload() would leave the trained head
        if self._virtual is None:
            self.peft_model.unload()
        else:
            self._virtual.remove()
        vars(base).pop("peft_config", None)  # or peft would warn about a second adapter
        detached(base, self.config)
        return base

    def _switch(self, parts: list[Any], on: bool) -> None:
        for part in parts:
            part.enable_adapters(on)
        if self._virtual is not None:
            self._virtual.enabled = on

    def _is_head(self, name: str) -> bool:
        return ".modules_to_save." in name

    def _is_vector(self, parameter: nn.Parameter) -> bool:
        one_line = parameter.numel() == max(parameter.shape, default=1)
        flat = METHODS[self.config.method].flat_vectors and one_line
        return flat or super()._is_vector(parameter)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every trained tensor, and those that peft saves with them, under peft's names."""
        from peft import get_peft_model_state_dict

        # embeddings of the base are never trained; "auto" would ask the hub for the size of its vocabulary
        return get_peft_model_state_dict(self.peft_model, adapter_name=ADAPTER, save_embedding_layers=False)

    def _load(self, state: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.peft_model, dict(state), ADAPTER)

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write peft's ``adapter_config.json`` and ``adapter_model.safetensors``."""
        settings = self.peft_model.peft_config[ADAPTER]
        settings.base_model_name_or_path = self.config.base_model
        settings.task_type = _task_of(self.base_model)
        try:
            self.peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        finally:
            settings.task_type = None


def _check_columns(model: PreTrainedModel, name: str) -> None:
    """Refuse or warn about a model in which padding between the virtual tokens and a text changes its outputs."""
    config, kind = model.config.get_text_config(), type(model).__name__
    if states := states_in(config):
        raise ValueError(
            f"{name} puts virtual tokens before the padding of a row, and {states} layers of {kind} keep a running "
            "state, which the padding would change; use interventions or peft/lora"
        )
    if window := window_of(config):
        log.warning(
            "%s puts virtual tokens before the padding of a row, and layers of %s look back at %d columns: the outputs "
            "of a longer row depend on its padding",
            name, kind, window,
        )  # fmt: skip


def peft_config(method: Method, options: Mapping[str, Any]) -> Any:
    """Return peft's configuration object of a method with some options."""
    method.check_options(options)
    try:
        return peft_class(method.peft)(**options, **method.peft_fixed)
    except TypeError as error:
        raise ValueError(f"{method.name}: {error}") from error


def _with_adapter(base_model: PreTrainedModel, settings: Any) -> Any:
    # The class for any task: those for a specific task train heads that were not named, and their forward is not used.
    from peft import PeftModel

    on_meta = next(base_model.parameters()).is_meta
    with warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5.23 renames
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*deprecated", FutureWarning)
        # peft corrects this setting for GPT-2 itself
        warnings.filterwarnings("ignore", ".*fan_in_fan_out is set to", UserWarning)
        return PeftModel(base_model, settings, ADAPTER, low_cpu_mem_usage=on_meta)


def _task_of(model: PreTrainedModel) -> str:
    """Return peft's task type for a model, which decides which of peft's classes loads the adapter."""
    if isinstance(model, GenerationMixin):
        return "SEQ_2_SEQ_LM" if reads_two_texts(model) else "CAUSAL_LM"
    return "SEQ_CLS" if "ForSequenceClassification" in type(model).__name__ else "FEATURE_EXTRACTION"
