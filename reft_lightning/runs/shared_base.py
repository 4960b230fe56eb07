"""Runs side by side on one frozen base model, which each of them trains its own adapter on.

Each is an ordinary run in a thread of its own, with its own data, optimizer, schedule, checkpoints and folder; they
take turns (:mod:`.turns`). Where they train they meet: one forward and one backward pass of the base model serves the
batches of all (:class:`~reft_lightning.speed.joined_pass.JoinedPass`). Whatever else they do, such as evaluating, each
does while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ..adapters.methods import method_named
from ..base_models.random_state import random_state, set_random_state
from ..config.schema import Config, ObjectiveConfig
from ..data import AnyFamily
from ..interventions import intervention_class
from ..speed.joined_pass import Asked, JoinedPass, Trained
from .arguments import attachment, family_of, hf_config_of, model_source, needs_marks
from .kinds import kind_of
from .own_process import needs_own_process
from .turns import Turns

BACKWARD = "backward"  # a question to all, as a batch is
# of a Trainer, what holds for the whole process or is part of a pass
OF_THE_PROCESS = (
    "accelerator", "devices", "strategy", "precision", "plugins", "deterministic", "benchmark", "detect_anomaly",
)  # fmt: skip

_present: ContextVar[Lane | None] = ContextVar("lane", default=None)


def present_lane() -> Lane | None:
    """Return what the run of this thread shares with others; None where it shares nothing."""
    return _present.get()


class SharedBase:
    """A base model and the runs that share it.

    Args:
        names: of the runs.
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        self.runs = {name: Lane(self, name, len(names)) for name in names}
        self.turns = Turns(self.runs, self._answer)
        self.adapters: dict[str, Trained] = {}
        self._base: Any = None
        self._device: Any = None  # of the batches
        self._pass: JoinedPass | None = None

    @property
    def joins(self) -> bool:
        """Whether passes are joined: until they turn out not to be exact, or one run is left."""
        return (self._pass is None or self._pass.works) and len(self.runs) > 1

    def base_model(self, load: Callable[[], Any]) -> Any:
        """Return the base model, which is loaded once."""
        if self._base is None:
            self._base = load()
        return self._base

    def ask(self, name: str, question: Any) -> Any:
        """Ask the pass of all for a run, which others interrupt until it has answered."""
        if isinstance(question, Asked):
            self._device = question.inputs["input_ids"].device
        answer = self.turns.ask(name, question)
        self._put_back()
        return answer

    def _put_back(self) -> None:
        # Lightning moves a model to the CPU when one of its runs has done with it
        if self._base.device != self._device:
            self._base.to(self._device)

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        if self._pass is None:
            self._pass = JoinedPass({name: self.adapters[name] for name in asked})
        self._put_back()
        if ended := [name for name, question in asked.items() if question == BACKWARD]:
            return dict.fromkeys(ended, self._backward(self._pass))
        outputs = self._pass.forward(asked)
        return dict.fromkeys(asked) if outputs is None else dict(outputs)

    def _backward(self, one: JoinedPass) -> Any:
        try:
            one.backward()
        except Exception as error:  # whose gradients are complete nobody knows
            return RuntimeError(
                f"the backward pass of {len(self.runs)} runs on one base model failed ({type(error).__name__}: "
                f"{error}); go on with each by reft-train resume=FOLDER; hydra.launcher.together=N runs fewer at a time"
            )
        return BACKWARD

    def leave(self, name: str) -> None:
        """Go on without a run, which has ended or has failed."""
        del self.runs[name]
        self.adapters.pop(name, None)
        self.turns.leave(name)


class Lane(Callback):
    """One of the runs on a shared base model, as the run itself sees it.

    Args:
        shared: what it shares.
        name: of the run.
        runs: how many there are in the beginning.
    """

    def __init__(self, shared: SharedBase, name: str, runs: int) -> None:
        self.shared, self.name, self.runs = shared, name, runs
        self._joined = False
        self._alone: Callable[..., Any] | None = None

    def enter(self) -> None:
        """Make this the lane of the present thread, when it is its turn."""
        _present.set(self)
        self.shared.turns.begin(self.name)

    def base_model(self, load: Callable[[], Any]) -> Any:
        """Return the base model of all."""
        return self.shared.base_model(load)

    def training_pass(self, model: Any, rows: Any, alone: Callable[..., Any] | None) -> Callable[..., Any]:
        """Return the pass of this run in training; ``alone``: that without the others, None for the model's own."""
        self.shared.adapters[self.name] = Trained(model, rows)
        self._alone = alone or (lambda inputs, rows, boundary: model(**inputs))
        return self

    def __call__(self, inputs: dict[str, Any], rows: list[int], boundary: int | None) -> Any:
        """Return the output for a batch, from the pass of all."""
        output = None
        if self.shared.joins:
            device = inputs["input_ids"].device
            asked = Asked(inputs, rows, boundary or 0, random_state(device))
            output = self.shared.ask(self.name, asked)
            if output is not None:
                set_random_state(asked.random, device)
        self._joined = output is not None
        assert self._alone is not None
        return output if self._joined else self._alone(inputs, rows, boundary)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the gradients on from the logits to the adapter, with those of all."""
        if self._joined:
            self.shared.ask(self.name, BACKWARD)

    def _end_with_all(self, *arguments: Any, **more: Any) -> None:
        if self.shared.turns.stopping:
            raise SIGTERMException

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = _end_with_all


def base_of(config: Config) -> str:
    """Return what runs that share a base model have in common: the model, and how it computes."""
    source = model_source(config, family_of(config))
    if config.model.source != "random":
        source["seed"] = None  # of weights that are not read
    trainer = {name: value for name, value in asdict(config.trainer).items() if name in OF_THE_PROCESS}
    return repr((sorted(source.items()), sorted(trainer.items()), config.matmul_precision))


def why_alone(config: Config) -> str | None:
    """Return why a run cannot share its base model; None where it can."""
    intervention = config.intervention
    family, method = family_of(config), method_named(intervention.method)
    attached = attachment(config, family)
    reasons = {
        f"{intervention.method} changes the base model's own modules or trains nothing": not method.takes_settings,
        f"{intervention.beside} changes the base model's own modules": intervention.beside,
        "a head that is trained is the base model's": attached.get("heads"),
        f"{intervention.method} adds to the loss, or looks at more than single tokens": method.takes_settings
        and any(map(intervention_class(intervention.method).defines, ("penalty", "edit_rows"))),
        f"{config.objective._target_} makes passes of its own": config.objective != ObjectiveConfig(),
        "only runs that train a language model's answers are joined": not kind_of(family).generates,
        "model.base_dropout=true draws random numbers for all rows": config.model.base_dropout,
        "model.gradient_checkpointing=true runs blocks again": config.model.gradient_checkpointing,
        "model.device_map decides where the base model is": config.model.device_map,
        "model.compile=true compiles the pass of one adapter": config.model.compile,
        "kept.limit_gb keeps parts of a pass of its own": config.kept.limit_gb,
        "trainer.max_time counts the seconds of all": config.trainer.max_time,
        "the positions given read marks of their own rows": needs_marks(intervention),
        "several devices": needs_own_process(config.trainer.devices, config.trainer.num_nodes),
        f"resume={config.resume} goes on with a run from where it is": config.resume,
        "callbacks=edit_norms watches a pass of its own": "EditNorms" in str(config.callbacks),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or ("an encoder reads prompts by itself" if _reads_two_texts(config, family) else None)


def _reads_two_texts(config: Config, family: AnyFamily) -> bool:
    try:
        return hf_config_of(model_source(config, family)).is_encoder_decoder
    except (ValueError, OSError, ImportError):
        return False  # the run says itself what is wrong with its model
