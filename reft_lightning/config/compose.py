"""Compose ``conf/`` into one checked :class:`~reft_lightning.config.schema.Config`, and explain errors.

:func:`preflight` runs before Hydra and before torch is imported: a mistake in the arguments or in a YAML file, even in
the last choice of a sweep, ends in a short message that suggests the closest key.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from ..adapters.methods import METHODS, check_beside, method_named
from ..storage.atomic import claim_folder
from ..suggest import did_you_mean
from ..terminal.ranks import is_first_process
from .explain import Vocabulary, shown
from .method_settings import check_settings_mean_something
from .overrides import key_of
from .schema import AUTO, BOUNDS, CHOICES, REFUSED, Config
from .user_paths import with_absolute_paths

if sys.version_info >= (3, 14):
    # argparse now checks every help text that is added, and Hydra 1.3 makes that of --shell-completion only when it is
    # printed. Hydra 1.4 switches this check off, too.
    argparse.ArgumentParser._check_help = lambda self, action: None  # pyright: ignore[reportAttributeAccessIssue]

CONFIG_NAME = "config"
VERSION_BASE = "1.3"
HELP = """\
reft-train: train an adapter for a frozen model (LoReFT, LoRA, ...), then validate and test it
usage: reft-train model=NAME [GROUP=NAME ...] [KEY=VALUE ...]
groups (GROUP=list shows all options of a group):
{groups}
examples:
  reft-train experiment=quickstart
  reft-train model=smollm2_135m data=boolq intervention=direft optimizer.lr=1e-3
  reft-train model.name=OWNER/NAME data=custom data.path=my.csv data.prompt=q data.target=a
  reft-train -m model=smollm2_135m data=boolq seed=42,43   # a run each (launcher=joblib: parallel)
  reft-train resume=FOLDER                                 # continue a stopped run
more:
  reft-train model=NAME --cfg job      prints every key and value, and runs nothing
  reft-train --config-dir FOLDER ...   also reads your own YAML files; --hydra-help: other flags
  each run prints how to chat with it, evaluate it again and repeat it; see README.md and docs/
"""
HELP_WIDTH = 96
# listed first, for newcomers
FIRST = {"model": "smollm2_135m", "experiment": "quickstart", "intervention": "loreft"}
NAME_LENGTH = 150  # bytes in the name of a job's folder
JOINT = ("experiment", "model", "intervention", "data")  # a value of one may not fit a value of another
SWEEPER = "hydra.sweeper.params."  # prefix of a key that a plugin sweeps
# Flags that print something and run nothing.
PASSIVE_FLAGS = ("hydra_help", "shell_completion", "info")

SWEPT = "REFT_SWEPT"  # environment variable that tells a job's process which keys its sweep changes
_swept: set[str] = set()  # keys of the sweep that this process runs
_claimed_folders: list[Path] = []


class CompositionError(ValueError):
    """The arguments or a YAML file cannot be composed; the message says what to write instead."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Args:
        runs: the values a sweep changes -> the configuration, for every run that is checked.
        sweep: whether it asks for several runs.
        folder: folder of the run or the sweep, if the command line names one.
        parent: parent of the folders of such runs otherwise.
        jobs: names of a sweep's jobs, if a sweeper does not draw their values.
    """

    runs: dict[str, Config] = dataclasses.field(default_factory=dict)
    sweep: bool = False
    folder: Path | None = None
    parent: Path = Path("outputs")
    jobs: Sequence[str] = ()

    @property
    def resumes(self) -> bool:
        """Whether it continues its own earlier run, if there is one: ``resume=auto``."""
        return any(run.resume == AUTO for run in self.runs.values())


def config_dir() -> Path:
    """Return the folder of the YAML files: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if folder.joinpath(f"{CONFIG_NAME}.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no conf/{CONFIG_NAME}.yaml in {package} or next to it: install the package again"
    )


@cache
def register() -> None:
    """Register the schema with Hydra, and the resolvers that YAML files use for names of folders and models."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("claimed", _claimed, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("job_name", _job_name, replace=True)
    OmegaConf.register_new_resolver("base_name", _base_name, replace=True)


def _run_name(*candidates: Any) -> str:
    return next((str(name) for name in candidates if name), "run")


def _claimed(folder: str) -> str:
    # Ranks started by a cluster share the folder of rank 0. A configuration that is only printed claims no folder.
    first = not {"--cfg", "-c"} & set(sys.argv) and is_first_process()
    _claimed_folders[:] = [claim_folder(Path(folder)) if first else Path(folder)]
    return str(_claimed_folders[0])


def sweep_folder(asked: Asked) -> Path | None:
    """Return the folder of the sweep that ran in this process; None if none has started."""
    return asked.folder or next(iter(_claimed_folders), None)


def _job_name(number: int, overrides: Sequence[str]) -> str:
    # Overrides can contain slashes (paths) and can exceed the 255 bytes of a file name.
    name = f"{number}_{','.join(differing(overrides))}".replace("/", "_")
    return name.encode()[:NAME_LENGTH].decode(errors="ignore")


def run_dir(folder: Path) -> str:
    """Return the override that makes a run write into a folder, quoted for any folder name."""
    return "hydra.run.dir='{}'".format(str(folder).replace("'", r"\'"))


def swept() -> set[str]:
    """Return the keys that this process's sweep changes."""
    return set(_swept)


def sweep_over(keys: Iterable[str]) -> None:
    """Set the keys that this process's sweep changes."""
    _swept.clear()
    _swept.update(keys)


def differing(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a job that differ between the jobs of its sweep; outside a sweep, all of them."""
    found = [text for text in overrides if key_of(text) in _swept]
    return found or [text for text in overrides if key_of(text) != "launcher"]


def _base_name(path: str | None) -> str:
    return Path(path).expanduser().absolute().name if path else ""


def compose(overrides: Sequence[str] = (), extra_dir: str | Path | None = None) -> Config:
    """Compose one run and check it.

    Args:
        overrides: Hydra overrides without sweeps, such as ``["model=tiny_random", "optimizer.lr=1e-3"]``.
        extra_dir: an additional folder of YAML files (``--config-dir``).

    Raises:
        CompositionError: for any invalid key or value.
    """
    with composing(extra_dir) as compose_one:
        return compose_one(overrides)


@contextmanager
def composing(extra_dir: str | Path | None = None) -> Iterator[Callable[[Sequence[str]], Config]]:
    """Compose several runs as :func:`compose` does, composing what they share only once."""
    with _hydra():
        vocabulary = _vocabulary(extra_dir)
        known: dict[tuple[str, ...], DictConfig] = {}
        yield lambda overrides: _compose(list(overrides), vocabulary, known)


def to_config(composed: DictConfig, start: Path = Path()) -> Config:
    """Convert Hydra's composition to the schema's dataclasses; relative paths become absolute, starting from start."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return with_absolute_paths(config, start)


def flags_of(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags and overrides of a command line, parsed as Hydra does; it has no public parser."""
    known, unknown = get_args_parser().parse_known_args(list(argv))
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        raise CompositionError(
            f"unknown flag {unknown[0]}: write arguments as key=value, without dashes: {name}=VALUE; reft-train "
            "--hydra-help lists the flags"
        )
    return known


def flags_first(argv: Sequence[str]) -> list[str]:
    """Return a command line with its flags first: Hydra ignores overrides after a flag that follows an override.

    >>> flags_first(["seed=1", "--cfg", "job", "test=false", "-m", "~logger"])
    ['--cfg', 'job', '-m', 'seed=1', 'test=false', '~logger']
    """
    flags: list[str] = []
    overrides: list[str] = []
    takes = False  # whether the last text was a flag, which may be followed by its value
    for text in argv:
        is_flag = text.startswith("-")
        mine = is_flag or (takes and "=" not in text and not text.startswith("~"))
        (flags if mine else overrides).append(text)
        takes = is_flag
    return flags + overrides


def preflight(argv: Sequence[str]) -> Asked:
    """Compose the runs that the command line asks for; exit with status 2 and a message if one fails.

    In a sweep, the choices of experiment, model, intervention and data are checked in all combinations; every other
    choice is checked with the first of these.
    """
    try:
        return _asked(flags_of(argv))
    except CompositionError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def _asked(arguments: argparse.Namespace) -> Asked:
    if arguments.config_path or arguments.config_name not in (None, CONFIG_NAME):
        raise CompositionError(
            "--config-name and --config-path are not supported, as every run starts from conf/config.yaml: put your "
            "settings in FOLDER/experiment/NAME.yaml, then run reft-train --config-dir FOLDER experiment=NAME"
        )
    if arguments.multirun and (arguments.cfg or arguments.info):
        raise CompositionError("--cfg and --info print a single configuration: leave out --multirun")
    if arguments.experimental_rerun:  # would write into the folder of the run it repeats, which is refused
        raise CompositionError(
            "--experimental-rerun is not supported: to repeat a run, use the command in its results.json; to continue "
            "one that was stopped: reft-train resume=FOLDER"
        )
    if any(getattr(arguments, flag) for flag in PASSIVE_FLAGS):
        return Asked()
    if arguments.help:  # Hydra's own help needs a configuration that composes
        sys.stdout.write(_help(_vocabulary(arguments.config_dir)))
        sys.exit(0)
    with composing(arguments.config_dir) as compose_one:
        vocabulary = _vocabulary(arguments.config_dir)
        asked = _parse(arguments.overrides)
        sweep = arguments.multirun or "MULTIRUN" in {
            o.get_value_string() for o in asked if o.key_or_group == "hydra.mode"
        }
        choices = [_choices(o, vocabulary) for o in asked]
        runs = {what: compose_one(overrides) for what, overrides in _runs(asked, choices, sweep)}
        _check_sweeper(asked, vocabulary)
    if arguments.cfg:  # prints, and runs nothing
        return Asked(runs)
    launchers = [o for o in asked if o.key_or_group == "launcher"]
    if launchers and not (sweep and all(not o.is_sweep_override() for o in launchers)):
        raise CompositionError(
            f"{launchers[-1].input_line}: a launcher starts the jobs of a sweep: give exactly one, with -m"
        )
    named = [o.value() for o in asked if o.key_or_group == ("hydra.sweep.dir" if sweep else "hydra.run.dir")]
    sweeping = [o for o in asked if o.is_sweep_override() or o.key_or_group.startswith(SWEEPER)]
    keys = [o.key_or_group.removeprefix(SWEEPER) for o in sweeping]
    sweep_over(keys or filter(None, os.environ.get(SWEPT, "").split(",")))
    experiment = [o.value() for o in asked if o.key_or_group == "experiment"]
    parent = Path("outputs") / _run_name(next(iter(runs.values())).name, *map(str, experiment[-1:]))
    jobs = [_job_name(number, job) for number, job in enumerate(itertools.product(*choices))] if sweep else ()
    return Asked(runs, sweep, Path(str(named[-1])) if named else None, parent, jobs)


def _help(vocabulary: Vocabulary) -> str:
    lines = []
    for group, options in vocabulary.groups.items():
        if "/" in group or group in ("local", "search", "callbacks", "launcher", "quantization"):
            continue
        names = sorted(shown(options).split(", "), key=lambda name: name != FIRST.get(group))
        lines.append(f"  {group:<13}{_in_short(names, len(options))}")
    return HELP.format(groups="\n".join(lines))


def _in_short(names: Sequence[str], count: int) -> str:
    """Return as many option names of a group as fit on a line of the help."""
    line, width = ", ".join(names), HELP_WIDTH - 15
    return line if len(line) <= width else f"{line[: width - 11].rpartition(', ')[0]}, ... ({count})"


@contextmanager
def _hydra() -> Iterator[None]:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base=VERSION_BASE):
        OmegaConf.register_new_resolver("hydra", _known_later, replace=True)
        try:
            yield
        finally:
            setup_globals()  # Hydra's own


def _known_later(path: str) -> Any:
    """Return a placeholder for a ``${hydra:...}`` value that is known only once a job runs."""
    return {"runtime.cwd": os.getcwd(), "job.num": 0}.get(path, f"hydra:{path}")


def _vocabulary(extra_dir: str | Path | None) -> Vocabulary:
    if extra_dir is None:
        return Vocabulary([config_dir()])
    if not Path(extra_dir).is_dir():
        raise CompositionError(f"--config-dir {extra_dir}: no such folder")
    return Vocabulary([config_dir(), Path(extra_dir).resolve()])


def _parse(overrides: Iterable[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])  # parse_override, singular, does not know glob()
        except HydraException as error:
            key, _, value = text.partition("=")
            quoted = f"{key}=\"'{value}'\"" if value and not set(value) & set("'\"[]{},") else "key=\"'a=b'\""
            raise CompositionError(
                f"cannot read the argument {text!r}: {str(error).splitlines()[0]}\n"
                "Write key=value, +key=value for a new entry of a dictionary, key=[a,b] for a list, and "
                f"quotes around text with special characters or letters other than a to z: {quoted}"
            ) from error
    return parsed


def _runs(
    parsed: Sequence[Override], choices: Sequence[list[str]], sweep: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield (choices, overrides) of each run to check."""
    sweeping = [i for i, o in enumerate(parsed) if o.is_sweep_override()]
    if sweeping and not sweep:
        raise _several_values(parsed[sweeping[0]], "add --multirun to run each value, or write a list as")

    def run(chosen: Mapping[int, str]) -> tuple[str, list[str]]:
        texts = {i: chosen.get(i, own[0]) for i, own in enumerate(choices) if own}
        return " ".join(texts[i] for i in sweeping if i in texts), list(texts.values())

    joint = [i for i in sweeping if choices[i] and parsed[i].key_or_group.partition(".")[0] in JOINT]
    for chosen in itertools.product(*(choices[i] for i in joint)):
        yield run(dict(zip(joint, chosen, strict=True)))
    for i in sweeping:
        for text in choices[i][1:] if i not in joint else ():
            yield run({i: text})


def _choices(override: Override, vocabulary: Vocabulary) -> list[str]:
    """Return the overrides of the single runs; none for an interval, from which a sweeper draws."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        return []
    group, chosen = override.key_or_group, override.value()
    files = [option for option in vocabulary.groups.get(group, ()) if "/" not in option]
    is_glob = isinstance(chosen, Glob)  # Hydra resolves it only in a configuration that composes
    values = chosen.filter(files) if is_glob else override.sweep_string_iterator()
    texts = [f"{override.get_key_element()}={value}" for value in values]
    if not texts:
        has = f"; {group} is one of {shown(files)}" if is_glob and files else ""
        raise CompositionError(f"{override.input_line} matches no value{has}")
    return texts


def _check_sweeper(asked: Iterable[Override], vocabulary: Vocabulary) -> None:
    """Refuse an interval unless a sweeper draws from it."""
    drawn = [str(o.input_line) for o in asked if o.is_sweep_override() and not o.is_discrete_sweep()]
    others = [str(o.input_line) for o in asked if not o.is_sweep_override()]
    if drawn:
        composed = hydra_compose(CONFIG_NAME, [*others, *_search_path(vocabulary)], return_hydra_config=True)
        if composed.hydra.sweeper._target_.endswith("BasicSweeper"):
            raise CompositionError(
                f"{drawn[0]}: the default sweeper cannot draw from an interval: list values, as in choice(1e-4,1e-3), "
                "use reft-search, or install a Hydra sweeper and add hydra/sweeper=NAME"
            )


def _search_path(vocabulary: Vocabulary) -> list[str]:
    return [f"hydra.searchpath=['file://{folder}']" for folder in vocabulary.folders[1:]]


def _several_values(override: Override, instead: str) -> CompositionError:
    key = override.key_or_group
    return CompositionError(
        f"{override.input_line} has several values: {instead} {key}=[...], and quote a string with a comma: "
        f"{key}=\"'a, b'\""
    )


def _compose(
    overrides: list[str], vocabulary: Vocabulary, known: dict[tuple[str, ...], DictConfig]
) -> Config:
    parsed = _parse(overrides)
    for override in parsed:
        if override.is_sweep_override():  # a key that accepts any string would take it literally
            raise _several_values(override, "a single run takes one; write a list as")
        _check_override(override, vocabulary)
    # Hydra reads all files, then sets the values in order: the trailing ones can be set on a copy
    plain = [
        o.type == OverrideType.CHANGE and o.package is None and not o.is_hydra_override() for o in parsed
    ]
    whole = max((i for i, is_plain in enumerate(plain, start=1) if not is_plain), default=0)
    late = {i: o for i, o in enumerate(parsed) if i >= whole and o.key_or_group not in vocabulary.groups}
    begin = tuple(text for i, text in enumerate(overrides) if i not in late)
    try:
        if begin not in known:
            known[begin] = hydra_compose(CONFIG_NAME, overrides=[*begin, *_search_path(vocabulary)])
        config = copy.deepcopy(known[begin])
        for override in late.values():
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise CompositionError(_explain(error, overrides, vocabulary)) from error
    try:
        composed = to_config(config)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise CompositionError(
            _no_model(overrides, vocabulary)
            if key == "model.name"
            else f"{key} has no value: write {key}=..."
        ) from error
    except OmegaConfBaseException as error:
        where = error.full_key or "the configuration"
        raise CompositionError(f"{where}: {str(error).splitlines()[0]}") from error
    _check_values(composed)
    _check_intervention(composed, overrides, vocabulary)
    return composed


# Checks, from the command line to the composed values.


def _check_override(override: Override, vocabulary: Vocabulary) -> None:
    name, text = override.key_or_group, str(override.input_line)
    if name == "search":
        raise CompositionError(f"{text}: search belongs to another command: reft-search {text}")
    if override.is_hydra_override() or override.package is not None:
        return
    if name in vocabulary.groups:
        option = override.value()
        several = [option] if isinstance(option, str) else option  # logger=[csv,wandb]
        for chosen in several if isinstance(several, list) else ():
            if not isinstance(chosen, str) or chosen not in vocabulary.groups[name]:
                raise CompositionError(vocabulary.unknown_option(name, str(chosen), text))
        if "/" in name:  # a folder inside a group
            group, _, folder = name.partition("/")
            raise CompositionError(f"{text}: write {group}={folder}/{option}")
    elif name not in vocabulary.keys:
        if not vocabulary.is_free(name):
            raise CompositionError(vocabulary.unknown_key(name, text))
    elif name == "name" and "${hydra:" in text:
        raise CompositionError(
            f"{text}: the folder is named before Hydra knows this value; each job of a sweep has its own folder in it"
        )
    elif override.is_delete():
        raise CompositionError(f"{text}: a key of the schema cannot be deleted; set {name}=null instead")


def _check_values(config: Config) -> None:
    for name, allowed in CHOICES.items():
        value = operator.attrgetter(name)(config)
        if value is not None and value not in allowed:
            hint = did_you_mean(str(value), allowed)
            raise CompositionError(f"{name} must be one of {', '.join(allowed)}; got {value!r}{hint}")
    for name, bounds in BOUNDS.items():
        value = operator.attrgetter(name)(config)
        if value is not None and not bounds.allow(value):
            raise CompositionError(f"{name} must {bounds}; got {value}")
    for name, refused in REFUSED.items():
        value = operator.attrgetter(name)(config)
        if isinstance(value, str | int) and value in refused:
            raise CompositionError(f"{name}={value} {refused[value]}")
    for key, allowed in (
        ("layers", "all, a list of ids, or settings by layer"),
        ("tied", "all, group or position"),
    ):
        if getattr(config.intervention, key) is None:
            raise CompositionError(f"intervention.{key} must be {allowed}; got null")
    if isinstance(config.trainer.max_time, int | float):
        raise CompositionError(
            "trainer.max_time must be a string DD:HH:MM:SS, or a dictionary such as {hours: 3}; got "
            f"{config.trainer.max_time}"
        )
    if config.trainer.deterministic not in (True, False, "warn", None):  # any other string would be truthy
        raise CompositionError(
            f"trainer.deterministic must be true, false or warn; got {config.trainer.deterministic!r}"
        )
    needs = {"local": ["path"], "wheel": ["package", "sha256"], "random": ["config"], "hub": ["name"]}
    source = config.model.source
    for key in needs[source]:
        if not getattr(config.model, key):
            raise CompositionError(f"model.source={source} needs model.{key}: write model.{key}=...")
    if config.data.source == "local" and not config.data.path:
        raise CompositionError(
            "data.source=local needs a path: write data.path=FOLDER (or a file, with data=custom or vqa)"
        )
    if config.data.source == "wheel" and bool(config.data.package) != bool(config.data.sha256):
        raise CompositionError(
            "data.source=wheel takes data.package=NAME==VERSION and data.sha256=DIGITS together, or neither if the "
            "family has its own wheel"
        )


def _check_intervention(config: Config, overrides: Sequence[str], vocabulary: Vocabulary) -> None:
    """Check method, settings and options; torch or peft is needed only for options and for an unlisted method."""
    intervention, heads = config.intervention, config.intervention.heads
    paths = isinstance(heads, list) and all(isinstance(path, str) for path in heads)
    if not (paths or heads is None or heads == "auto"):
        raise CompositionError(
            f"intervention.heads must be auto or a list of module paths, such as [classifier]; got {heads!r}"
        )
    listed = intervention.method in vocabulary.groups["intervention"]
    try:
        method = method_named(intervention.method)
        check_settings_mean_something(method, intervention, overrides)
        check_beside(method, intervention.beside, intervention.beside_options)
        if intervention.options or not listed:
            method.check_options(intervention.options)
        if intervention.beside:
            METHODS[intervention.beside].check_options(intervention.beside_options)
    except (ValueError, ImportError) as error:
        raise CompositionError(str(error)) from error


# Hydra's error messages, in the terms of this project.


def _explain(error: Exception, overrides: Sequence[str], vocabulary: Vocabulary) -> str:
    message = str(error).strip()
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if "No match in the defaults list" in message:  # `override /modle: x` in an experiment
        for file, group, _ in _experiment_defaults(overrides, vocabulary):
            if group not in vocabulary.groups:
                return vocabulary.unknown_group(group, str(file))
    if "@experiment." in message:  # a file without the @package line
        return _no_package(vocabulary.file(message.split("'")[1]))
    if "Config group override must be a string or a list" in message:
        for text in overrides:
            name, _, value = text.partition("=")
            if name in vocabulary.groups and value in ("", "null"):
                leave_out = f"; to leave it out, write ~{name}" if vocabulary.is_free(f"{name}.x") else ""
                return f"{text}: {name} must be one of {shown(vocabulary.groups[name])}{leave_out}"
    missing = getattr(error, "missing_cfg_file", None)
    if missing:
        return _missing_file(missing, overrides, vocabulary) or message
    if "raised while composing config" in message:
        # Three lines: In 'FILE': ERROR raised while composing config / reason / full_key: optimizer.lrr
        lines = message.splitlines()
        where = vocabulary.file(lines[0].split("'")[1])
        full_key = next((line.split("full_key:")[1].strip() for line in lines if "full_key:" in line), "")
        if full_key.partition(".")[0] == "experiment":
            return _no_package(where)
        if "KeyError" in lines[0] or "AttributeError" in lines[0]:
            return vocabulary.unknown_key(full_key, where)
        return f"{where}: {vocabulary.wrong_type(full_key, lines[1])}"
    if isinstance(cause, ValidationError) and cause.full_key:
        written = [o for o in overrides if o.lstrip("+").startswith(f"{cause.full_key}=")]
        reason = vocabulary.wrong_type(cause.full_key, str(cause).splitlines()[0])
        return f"{written[-1] if written else 'the configuration'}: {reason}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):  # a dictionary that lacks the key
        for override in overrides:
            key, lacks = override.partition("=")[0], cause.full_key or ""
            if did := vocabulary.unknown_entry(lacks if lacks.startswith(f"{key}.") else key):
                return f"{override}: {did}"
    return message.replace("To append to your config use", "A new entry of a dictionary needs a plus:")


def _no_package(file: str) -> str:
    return f"{file}: an experiment must begin with the line `# @package _global_`, as its keys belong to the whole run"


def _missing_file(name: str, overrides: Sequence[str], vocabulary: Vocabulary) -> str:
    """Explain a missing YAML file, naming the file whose defaults list asks for it."""
    parts = name.split("/")
    if parts[:2] == ["hydra", "launcher"]:  # of conf/launcher
        # the plugin for Ray asks for a cloudpickle that is too old for joblib
        ray = "'ray[default]' && pip install --no-deps hydra-ray-launcher"
        needed = ray if parts[-1] == "ray" else "'reft_lightning[cluster]'"
        return f"launcher={parts[-1]} needs a Hydra plugin: pip install {needed}"
    for depth in range(len(parts) - 1, 0, -1):
        group, option = "/".join(parts[:depth]), "/".join(parts[depth:])
        if group in vocabulary.groups:
            asked = _experiment_defaults(overrides, vocabulary)
            files = [str(file) for file, g, o in asked if (g, o) == (group, option)]
            return vocabulary.unknown_option(group, option, files[0] if files else f"{group}={option}")
    return ""


def _experiment_defaults(overrides: Sequence[str], vocabulary: Vocabulary) -> Iterator[tuple[Path, str, str]]:
    """Yield (file, group, option) for each entry of the chosen experiment's defaults list."""
    for name in (o.partition("=")[2] for o in overrides if o.startswith("experiment=")):
        file = Path(vocabulary.file(f"experiment/{name}"))
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        for entry in (content or {}).get("defaults", []):
            for key, option in entry.items() if isinstance(entry, dict) else ():
                yield file, key.removeprefix("override ").lstrip("/"), str(option)


def _no_model(overrides: Sequence[str], vocabulary: Vocabulary) -> str:
    known = vocabulary.groups
    if resumed := [text for text in overrides if text.startswith("resume=")]:
        others = ", ".join(text for text in overrides if text not in resumed)
        return (
            f"{resumed[-1]} takes no other arguments, as the run continues with the configuration saved in its folder: "
            f"leave out {others or 'the flags'}"
        )
    return (
        f"no model was chosen: write model=NAME, with NAME one of {shown(known['model'])},\n"
        "or model.name=OWNER/NAME for a model on the hub, or model=local model.path=FOLDER,\n"
        f"or experiment=NAME, with NAME one of {shown(known['experiment'])}"
    )
