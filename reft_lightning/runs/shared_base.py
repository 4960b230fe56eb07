"""Train several runs concurrently on one frozen base model, each with its own adapter.

Each is an ordinary run in its own thread, with its own data, optimizer, schedule, checkpoints and folder; they take
turns (:mod:`.turns`). Their training steps are joined: one forward and one backward pass of the base model serve the
batches of all runs (:class:`~reft_lightning.speed.joined_pass.JoinedPass`). Anything else, such as evaluation, a run
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

BACKWARD = "backward"  # the request for a joint backward pass
# Trainer settings that apply to the whole process or to the pass
OF_THE_PROCESS = (
    "accelerator", "devices", "strategy", "precision", "plugins", "deterministic", "benchmark", "detect_anomaly",
)  # fmt: skip

_present: ContextVar[Lane | None] = ContextVar("lane", default=None)


def present_lane() -> Lane | None:
    """Return the lane of this thread's run; None if it shares nothing with other runs."""
    return _present.get()


class SharedBase:
    """A base model and the runs that share it."""

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
        """Whether passes are joined: until they turn out to be inexact, or only one run is left."""
        return (self._pass is None or self._pass.works) and len(self.runs) > 1

    def base_model(self, load: Callable[[], Any]) -> Any:
        """Return the base model, loading it once."""
        if self._base is None:
            self._base = load()
        return self._base

    def ask(self, name: str, question: Any) -> Any:
        """Return the joined pass's answer for a run; other runs take their turns until it is there."""
        if isinstance(question, Asked):
            self._device = question.inputs["input_ids"].device
        answer = self.turns.ask(name, question)
        self._put_back()
        return answer

    def _put_back(self) -> None:
        # Lightning moves the model to the CPU when one of the runs ends
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
        except Exception as error:  # it is unknown whose gradients are complete
            return RuntimeError(
                f"the backward pass of {len(self.runs)} runs on one base model failed ({type(error).__name__}: "
                f"{error}); continue each with reft-train resume=FOLDER; hydra.launcher.together=N runs fewer at a time"
            )
        return BACKWARD

    def leave(self, name: str) -> None:
        """Continue without a run that has ended or failed."""
        del self.runs[name]
        self.adapters.pop(name, None)
        self.turns.leave(name)


class Lane(Callback):
    """One run's view of a shared base model.

    Args:
        shared: the shared base model and its runs.
        name: name of the run.
        runs: number of runs at the start.
    """

    def __init__(self, shared: SharedBase, name: str, runs: int) -> None:
        self.shared, self.name, self.runs = shared, name, runs
        self._joined = False
        self._alone: Callable[..., Any] | None = None

    def enter(self) -> None:
        """Make this the lane of the current thread, and wait for its turn."""
        _present.set(self)
        self.shared.turns.begin(self.name)

    def base_model(self, load: Callable[[], Any]) -> Any:
        """Return the shared base model."""
        return self.shared.base_model(load)

    def training_pass(self, model: Any, rows: Any, alone: Callable[..., Any] | None) -> Callable[..., Any]:
        """Return this run's training pass; ``alone`` is the pass used without others, None for the model's own."""
        self.shared.adapters[self.name] = Trained(model, rows)
        self._alone = alone or (lambda inputs, rows, boundary: model(**inputs))
        return self

    def __call__(self, inputs: dict[str, Any], rows: list[int], boundary: int | None) -> Any:
        """Return the output for a batch, from the joined pass if there is one."""
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
        """Propagate the gradients from the logits to the adapter, together with those of all runs."""
        if self._joined:
            self.shared.ask(self.name, BACKWARD)

    def _end_with_all(self, *arguments: Any, **more: Any) -> None:
        if self.shared.turns.stopping:
            raise SIGTERMException

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = _end_with_all


def base_of(config: Config) -> str:
    """Return what runs must have in common to share a base model: the model, and its numerical settings."""
    source = model_source(config, family_of(config))
    if config.model.source != "random":
        source["seed"] = None  # seeds only random weights
    trainer = {name: value for name, value in asdict(config.trainer).items() if name in OF_THE_PROCESS}
    return repr((sorted(source.items()), sorted(trainer.items()), config.matmul_precision))


def why_alone(config: Config) -> str | None:
    """Return why a run cannot share its base model; None if it can."""
    intervention = config.intervention
    family, method = family_of(config), method_named(intervention.method)
    attached = attachment(config, family)
    reasons = {
        f"{intervention.method} changes the base model's own modules or trains nothing": not method.takes_settings,
        f"{intervention.beside} changes the base model's own modules": intervention.beside,
        "a trained head belongs to the base model": attached.get("heads"),
        f"{intervention.method} adds to the loss, or reads more than single tokens": method.takes_settings
        and any(map(intervention_class(intervention.method).defines, ("penalty", "edit_rows"))),
        f"{config.objective._target_} runs its own passes": config.objective != ObjectiveConfig(),
        "only runs that train a language model to generate are joined": not kind_of(family).generates,
        "model.base_dropout=true draws random numbers for all rows": config.model.base_dropout,
        "model.gradient_checkpointing=true recomputes blocks": config.model.gradient_checkpointing,
        "model.device_map places the base model itself": config.model.device_map,
        "model.compile=true compiles the pass of a single adapter": config.model.compile,
        "kept.limit_gb keeps activations of a run's own pass": config.kept.limit_gb,
        "trainer.max_time would count the seconds of all runs": config.trainer.max_time,
        "the positions `given` need the marks of the run's own rows": needs_marks(intervention),
        "it uses several devices": needs_own_process(config.trainer.devices, config.trainer.num_nodes),
        f"resume={config.resume} continues a run at its own step": config.resume,
        "callbacks=edit_norms watches a run's own pass": "EditNorms" in str(config.callbacks),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or ("an encoder reads prompts separately" if _reads_two_texts(config, family) else None)


def _reads_two_texts(config: Config, family: AnyFamily) -> bool:
    try:
        return hf_config_of(model_source(config, family)).is_encoder_decoder
    except (ValueError, OSError, ImportError):
        return False  # the run itself reports what is wrong with its model
